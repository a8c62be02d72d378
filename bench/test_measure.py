"""The measures themselves: FLOPs worked by hand, bytes worked by hand, and the properties that the tables build on."""

from statistics import median

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench import lengths
from bench.grid import CORPORA, MAGT_, MATCHED, MEMORIES, MODALITIES, PUBLISHED, Case, conversations, utterances
from bench.measure import Flops, bytes_for_backward, count_with_fvcore, count_with_torch, magt_flops, mult_flops
from bench.mult import MulT, MulTConfig
from fusion import MAGT, FusionConfig

SMALL = [Case(MAGT_, 4, 16), Case(MATCHED, 3, 16), Case(MEMORIES, 3, 16), Case(PUBLISHED, (2, 3, 5), 40)]


def test_flops_by_hand():
    """MAGT with text alone, D = 2, on one conversation of 3 utterances. Key and value count as two linear layers."""
    config = FusionConfig({"text": 2}, num_classes=5, num_speakers=1, width=2, heads=1)
    one_linear = 2 * 3 * 2 * 2  # rows, in, out
    block, gate, merge, classifier = 6 * one_linear, one_linear, one_linear, 2 * 3 * 2 * 5
    assert magt_flops(config, 1, 3) == Flops(attention=2 * (2 * 3 * 3 * 2), linear=block + gate + merge + classifier)


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_three_counts_agree_where_widths_differ(modalities):
    widths = dict(zip(MODALITIES[:modalities], (12, 16, 20)))
    with torch.device("meta"):
        magt = MAGT(FusionConfig(widths, 5, 3, width=16, heads=4))
        features = {m: torch.empty(2, 7, width) for m, width in widths.items()}
        mask, places = torch.ones(2, 7, dtype=torch.bool), torch.arange(14)
        inputs = features, torch.zeros(2, 7, dtype=torch.int64), mask, dict.fromkeys(widths, mask), places
    assert count_with_torch(magt, inputs) == count_with_fvcore(magt, inputs) == magt_flops(magt.config, 2, 7)


def test_three_counts_agree_on_two_modalities_of_mult():
    frames = {"text": 4, "audio": 9}
    config = MulTConfig({"text": 12, "audio": 16}, 5, width=16, heads=4, layers=2)
    with torch.device("meta"):
        mult = MulT(config)
    inputs = utterances([frames] * 3, config.widths, "meta")
    assert count_with_torch(mult, inputs) == count_with_fvcore(mult, inputs) == mult_flops(config, 3, frames)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward_and_backward_are_three_forwards(case):
    """Each product has two more in the backward pass. (An input projection only where its input wants a gradient.)"""
    samples = 12
    model, inputs = case.model("meta"), case.inputs(samples, "meta")
    if case.variant == PUBLISHED:
        for x in inputs[0].values():
            x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        sum(x.sum() for x in tree_leaves(model(*inputs))).backward()
    assert counter.get_total_flops() == 3 * case.flops(samples).total


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_flops_and_bytes_are_proportional_to_samples(case):
    model, kept = case.model("cpu"), {}
    for samples in (4, 8, 12):
        kept[samples] = bytes_for_backward(model, case.inputs(samples, "cpu"), model.parameters())
        assert kept[samples] * 4 == kept[4] * samples
        assert [n * 4 for n in case.flops(samples)] == [n * samples for n in case.flops(4)]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_bytes_on_the_meta_device_are_those_of_unfused_attention(case):
    kept = {}
    for device in ("cpu", "meta"):
        model = case.model(device)
        with sdpa_kernel(SDPBackend.MATH):
            kept[device] = bytes_for_backward(model, case.inputs(4, device), model.parameters())
    assert kept["cpu"] == kept["meta"]


def test_bytes_by_hand():
    x = torch.randn(2, 3)
    linear = nn.Linear(3, 5)
    assert bytes_for_backward(linear, (x,), linear.parameters()) == 2 * 3 * 4  # the input, for the weight's gradient
    assert bytes_for_backward(linear, (x,)) == 2 * 3 * 4  # no gradient goes to the input: the weight is not kept
    twice = nn.Sequential(linear, nn.ReLU(), nn.Linear(5, 7))
    # ReLU's output is ReLU's own and the next layer's input: one storage.
    assert bytes_for_backward(twice, (x,), twice.parameters()) == 2 * 3 * 4 + 2 * 5 * 4
    with torch.no_grad():
        assert bytes_for_backward(twice, (x,), twice.parameters()) == 0


def test_lengths_are_those_of_the_corpora():
    counts = {"train": (1038, 9989), "dev": (114, 1109), "test": (280, 2610)}
    assert {split: (len(many), sum(many)) for split, many in lengths.MELD.items()} == counts
    assert (min(lengths.MELD["test"]), max(lengths.MELD["test"])) == (1, 33)

    train, test = lengths.IEMOCAP_RECONSTRUCTED["train"], lengths.IEMOCAP_RECONSTRUCTED["test"]
    assert (len(train), sum(train), len(test), sum(test)) == (120, 5810, 31, 1623)
    assert (min(train + test), max(train + test), median(train)) == (8, 110, 47)


@pytest.mark.parametrize("name", CORPORA)
def test_epochs_hold_every_conversation_once(name):
    corpus = CORPORA[name]
    assert sorted(n for batch in corpus.batches() for n in batch) == sorted(corpus.lengths)
    assert corpus.typical_batch() in corpus.batches()
    padded, valid = corpus.padded_flops(corpus.batches()), corpus.valid_flops(corpus.batches())
    assert padded.attention > valid.attention and padded.linear == valid.linear


def test_padding_is_marked():
    features, speakers, mask, present, places = conversations([3, 1], 16, "cpu")
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert places.tolist() == [0, 1, 2, 3] and all(x is mask for x in present.values())
    assert speakers[~mask].eq(-1).all() and speakers[mask].ge(0).all()
    assert {x.shape for x in features.values()} == {(2, 3, 16)}
