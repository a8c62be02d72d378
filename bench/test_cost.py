"""FLOPs and bytes worked out by hand, and the properties that the tables build on."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import cost
from bench.cases import CASES, MAGT_L, MAGT_U, MATCHED, PUBLISHED, Case
from bench.cost import Flops, bytes_for_backward, peak_bytes
from bench.mult import MulT
from fusion import FusionConfig

SMALL = [Case(MAGT_U, 4, 16), Case(MAGT_L, 5, 16), Case(MATCHED, 3, 16), Case(PUBLISHED, (2, 3, 5), 40)]


def test_flops_by_hand():
    """MAGT with text only, D = 2, on conversations of 3 and 1 utterances. Key and value count as two linear layers."""
    config = FusionConfig({"text": 2}, num_classes=5, num_speakers=1, width=2, heads=1)
    one_linear = 2 * 4 * 2 * 2  # rows, in, out
    block, gate, merge, classifier = 6 * one_linear, one_linear, one_linear, 2 * 4 * 2 * 5
    attention = 2 * (2 * 3 * 3 * 2) + 2 * (2 * 1 * 1 * 2)
    assert cost.magt_flops(config, [3, 1]) == Flops(attention, linear=block + gate + merge + classifier)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward_and_backward_are_three_forwards(case):
    """Each product has two in the backward pass. (An input projection only where its input needs a gradient.)"""
    model, inputs = case.build("meta"), case.inputs(12, "meta")
    for x in inputs[0].values():
        x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        output = model(*inputs)
        logits = [output] if isinstance(model, MulT) else output.logits.values()
        sum(x.sum() for x in logits).backward()
    assert counter.get_total_flops() == 3 * case.flops(12).total


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_costs_are_proportional_to_the_utterances(case):
    model = case.build("cpu").train()
    for n in (8, 12):
        kept = [bytes_for_backward(model, case.inputs(samples, "cpu")) for samples in (4, n)]
        assert kept[1] * 4 == kept[0] * n
        assert [x * 4 for x in case.flops(n)] == [x * n for x in case.flops(4)]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_bytes_on_the_meta_device_are_those_of_unfused_attention(case):
    with sdpa_kernel(SDPBackend.MATH):
        kept = {bytes_for_backward(case.build(device).train(), case.inputs(4, device)) for device in ("cpu", "meta")}
    assert len(kept) == 1


def test_bytes_by_hand():
    x, linear = torch.randn(2, 3), nn.Linear(3, 5)
    assert bytes_for_backward(linear, (x,)) == 2 * 3 * 4  # the input, for the weight's gradient
    # ReLU's output is saved by ReLU and, as its input, by the next layer: one storage.
    two = nn.Sequential(linear, nn.ReLU(), nn.Linear(5, 7))
    assert bytes_for_backward(two, (x,)) == 2 * 3 * 4 + 2 * 5 * 4
    assert bytes_for_backward(two.requires_grad_(False), (x,)) == 0


def test_peak_by_hand():
    """Three tensors of 4,000 bytes, two of them at a time."""
    x = torch.randn(1000)
    assert 8000 <= peak_bytes(lambda: x.exp().sin().cos(), "cpu") < 8100


def test_cases():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert all(case.timed_samples("cpu") % case.fewest == 0 for case in CASES)
