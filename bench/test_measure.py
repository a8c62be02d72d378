"""The measures themselves: FLOPs worked by hand, bytes worked by hand, and the properties that the tables build on."""

from statistics import median

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench import lengths
from bench.grid import CORPORA, MAGT_, MATCHED, MEMORIES, PUBLISHED, Case, conversations, utterances
from bench.measure import Flops, bytes_for_backward, count_with_fvcore, count_with_torch, magt_flops, mult_flops
from bench.mult import MulT, MulTConfig
from data import MODALITIES
from fusion import MAGT, FusionConfig

SMALL = [Case(MAGT_, 4, 16), Case(MATCHED, 3, 16), Case(MEMORIES, 3, 16), Case(PUBLISHED, (2, 3, 5), 40)]


def test_flops_by_hand():
    """MAGT with text alone, D = 2, on conversations of 3 and 1 utterances. Key and value count as two linear layers."""
    config = FusionConfig({"text": 2}, num_classes=5, num_speakers=1, width=2, heads=1)
    one_linear = 2 * 4 * 2 * 2  # rows, in, out
    block, gate, merge, classifier = 6 * one_linear, one_linear, one_linear, 2 * 4 * 2 * 5
    attention = 2 * (2 * 3 * 3 * 2) + 2 * (2 * 1 * 1 * 2)
    assert magt_flops(config, [3, 1]) == Flops(attention, linear=block + gate + merge + classifier)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_three_counts_agree_where_widths_and_lengths_differ(modalities, missing):
    widths, lengths = dict(zip(MODALITIES[:modalities], (12, 16, 20))), [7, 1, 4]
    with torch.device("meta"):
        magt = MAGT(FusionConfig(widths, 5, 3, width=16, heads=4))
        features = {m: torch.empty(12, width) for m, width in widths.items()}
        present = dict.fromkeys(list(widths)[1:], torch.ones(12, dtype=torch.bool)) if missing else {}
        inputs = features, torch.zeros(12, dtype=torch.int64), lengths, present
    assert count_with_torch(magt, inputs) == count_with_fvcore(magt, inputs) == magt_flops(magt.config, lengths)


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
    counts = {
        "IEMOCAP": {"train": (108, 5163), "dev": (12, 647), "test": (31, 1623)},
        "MELD": {"train": (1038, 9989), "dev": (114, 1109), "test": (280, 2610)},
    }
    for name, expected in counts.items():
        splits = getattr(lengths, name)
        assert {split: (len(many), sum(many)) for split, many in splits.items()} == expected
        assert CORPORA[name].lengths == tuple(splits["train"])
    everyone = sum(lengths.IEMOCAP.values(), [])
    assert (min(everyone), median(everyone), max(everyone)) == (8, 47, 110)
    assert (min(lengths.MELD["test"]), max(lengths.MELD["test"])) == (1, 33)


@pytest.mark.parametrize("name", CORPORA)
def test_epochs_hold_every_conversation_once(name):
    corpus = CORPORA[name]
    assert sorted(n for batch in corpus.epoch() for n in batch) == sorted(corpus.lengths)
    assert corpus.typical_batch() in corpus.epoch()
    sizes = [len(batch) * max(batch) for batch in corpus.epoch()]
    size = len(corpus.typical_batch()) * max(corpus.typical_batch())
    assert sum(s < size for s in sizes) <= len(sizes) / 2 and sum(s > size for s in sizes) < len(sizes) / 2


def test_conversations_are_what_magt_takes():
    features, speakers, many, present = inputs = conversations([3, 1], 16, "cpu")
    assert many == [3, 1] and present == {} and {x.shape for x in features.values()} == {(4, 16)}
    assert speakers.min() >= 1  # 0 is a speaker never seen in training
    logits = Case(MAGT_, 4, 16).model("cpu")(*inputs).logits
    assert {m: x.shape for m, x in logits.items()} == dict.fromkeys(MODALITIES, (4, 6))
