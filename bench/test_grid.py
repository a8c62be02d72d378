"""MAGT against MulT over the grid: FLOPs counted three ways, bytes kept for the backward pass, time. One row a case."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import nn

from bench.grid import COUNTED, DEVICE, MAGT_, NARROW, SAMPLES, TIMED, Case
from bench.measure import bytes_for_backward, count_with_fvcore, count_with_torch


@lru_cache
def bytes_per_utterance(case: Case) -> int:
    """With a fused attention kernel: the CPU's, on every machine, so that the digits are the same."""
    samples = case.length if case.variant == MAGT_ else 1
    model = case.model("cpu")
    return bytes_for_backward(model, case.inputs(samples, "cpu"), model.parameters()) // samples


def facts(case: Case, samples: int) -> dict:
    """What each row says of its case. FLOPs of the forward pass on `samples` utterances, and bytes it leaves behind."""
    flops = case.flops(samples)
    return {
        "variant": case.variant,
        "length": case.length,
        "width": case.width,
        "samples": samples,
        "params": sum(p.numel() for p in case.model("meta").parameters()),
        "flops": flops.total,
        "flops_attention": flops.attention,
        "flops_linear": flops.linear,
        "bytes": samples * bytes_per_utterance(case),
    }


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_count(row, case):
    model, inputs = case.model("meta"), case.inputs(SAMPLES, "meta")
    unfused = bytes_for_backward(model, inputs, model.parameters())  # the meta device spells attention out
    by_torch = row(
        lambda: count_with_torch(model, inputs), 1, kind="count", bytes_unfused=unfused, **facts(case, SAMPLES)
    )
    assert by_torch == count_with_fvcore(model, inputs) == case.flops(SAMPLES)


@pytest.fixture
def sized(timed):
    """A case as it is run; under --benchmark-disable, where nobody takes the time, narrow and on few samples."""

    def size(case: Case) -> tuple[Case, int]:
        if timed:
            return case, case.timed_samples()
        return replace(case, width=min(case.width, NARROW[0])), case.length if case.variant == MAGT_ else 1

    return size


@pytest.mark.parametrize("case", TIMED, ids=str)
def test_forward(row, sized, case):
    case, samples = sized(case)
    model, inputs = case.model(DEVICE), case.inputs(samples, DEVICE)
    row(lambda: model(*inputs), 5, kind="forward", **facts(case, samples))


@lru_cache(maxsize=1)  # its state, made in the first step, is twice the size of the model
def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


@pytest.mark.parametrize("case", TIMED, ids=str)
def test_step(row, sized, case):
    case, samples = sized(case)
    model, inputs = case.model(DEVICE), case.inputs(samples, DEVICE)
    optimizer = optimizer_of(model)

    def step():
        outputs = model(*inputs)
        logits = outputs.logits.values() if case.variant == MAGT_ else [outputs]
        loss = sum(x.square().mean() for x in logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    row(step, 3, kind="step", **facts(case, samples))
