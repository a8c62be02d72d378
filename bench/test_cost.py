"""Bytes worked out by hand, and the properties that the tables build on. FLOPs: three counts, in test_cases.py."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import MAGT_L, MAGT_U, MATCHED, PUBLISHED, Case, logits_of
from bench.cost import bytes_for_backward, peak_bytes

SMALL = [Case(MAGT_U, 4), Case(MAGT_L, 5), Case(MATCHED, 3), Case(PUBLISHED, (2, 3, 5))]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_costs_are_proportional(case):
    """To the utterances. And forward and backward are three forwards, if the inputs need a gradient too."""
    model = case.build("cpu").train()
    once, thrice = (bytes_for_backward(model, case.inputs(samples, "cpu")) for samples in (4, 12))
    assert thrice == 3 * once
    assert case.flops(12) == tuple(3 * x for x in case.flops(4))
    model, inputs = case.build("meta"), case.inputs(4, "meta")
    for x in inputs[0].values():
        x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        sum(x.sum() for x in logits_of(model(*inputs))).backward()
    assert counter.get_total_flops() == 3 * sum(case.flops(4))


def test_bytes_by_hand():
    x, linear = torch.randn(2, 3), nn.Linear(3, 5)
    assert bytes_for_backward(linear, (x,)) == 2 * 3 * 4  # the input, for the weight's gradient
    # ReLU's output is saved by ReLU and, as its input, by the next layer: one storage.
    two = nn.Sequential(linear, nn.ReLU(), nn.Linear(5, 7))
    assert bytes_for_backward(two, (x,)) == 2 * 3 * 4 + 2 * 5 * 4
    # Three tensors of 4,000 bytes, two of them at a time.
    x = torch.randn(1000)
    assert 8000 <= peak_bytes(lambda: x.exp().sin().cos(), "cpu") < 8100
