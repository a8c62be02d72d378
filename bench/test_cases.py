"""The measurements, a row of results each: counts and bytes, inference, training, a stage-2 step, the encoders."""

from dataclasses import asdict

import pytest
import torch

from bench import cases, cost
from bench.cases import DEVICE, REFERENCE, inference, training


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        quick = metafunc.config.getoption("benchmark_disable")
        metafunc.parametrize("case", cases.QUICK if quick else cases.CASES, ids=str)


def test_count(record, timed, case):
    """FLOPs, three ways that must agree exactly. Bytes with the CPU's fused attention, the same on every machine."""
    samples = case.fewest
    model, inputs = case.build("meta"), case.inputs(samples, "meta")
    on_cpu = case if timed else case.narrow()
    real, real_inputs = on_cpu.build("cpu"), on_cpu.inputs(on_cpu.fewest, "cpu")
    flops = case.flops(samples)
    by_torch = record(
        lambda: cost.count_with_torch(model, inputs),
        rounds=1,
        kind="count",
        **asdict(case),
        samples=samples,
        params=sum(p.numel() for p in model.parameters()),
        flops=flops.total,
        flops_attention=flops.attention,
        flops_linear=flops.linear,
        bytes=cost.bytes_for_backward(real.train(), real_inputs),
        bytes_no_dropout=cost.bytes_for_backward(real.eval(), real_inputs),
        bytes_unfused=cost.bytes_for_backward(model.train(), inputs),  # the meta device has no fused attention
    )
    assert by_torch == cost.count_with_fvcore(model, inputs) == flops


@pytest.mark.parametrize("mode", [inference, training], ids=lambda mode: mode.__name__)
def test_time(record, timed, case, mode):
    reference = REFERENCE
    if not timed:
        case, reference = case.narrow(), REFERENCE.narrow()
    samples = case.timed_samples(DEVICE) if timed else case.fewest
    reference_samples = reference.timed_samples(DEVICE) if timed else reference.fewest
    record(
        mode(case, samples, DEVICE),
        reference=mode(reference, reference_samples, DEVICE),
        kind=mode.__name__,
        **asdict(case),
        samples=samples,
        reference_samples=reference_samples,
        flops=(3 if mode is training else 1) * case.flops(samples).total,
    )


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("corpus", cases.STAGE2)
def test_stage2_step(record, timed, corpus, dtype):
    stage = cases.STAGE2[corpus]
    lengths = stage.lengths if timed else [3, 1]
    step, flops = cases.stage2_step(stage, lengths, dtype, DEVICE)
    record(step, rounds=3, kind="stage2", corpus=corpus, mode=dtype, utterances=sum(lengths), flops=3 * flops.total)


@pytest.mark.parametrize("name", cases.ENCODERS)
def test_encoder_count(record, name):
    """On the meta device; so the bytes include the attention weights, which a fused kernel does not keep."""
    model, inputs = cases.encoder(name, "meta")
    flops, vectors = cost.count_with_torch(model, (inputs,)), model(inputs).last_hidden_state.shape[1]
    assert vectors == dict(zip(cases.ENCODERS, cases.ENCODED))[name]
    again = record(
        lambda: cost.count_with_torch(model, (inputs,)),
        rounds=1,
        kind="encoder count",
        encoder=name,
        samples=len(inputs),
        vectors=vectors,
        params=sum(p.numel() for p in model.parameters()),
        flops=flops.total,
        bytes=cost.bytes_for_backward(model, (inputs,)),
    )
    assert again == flops  # nothing in the model is random


@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA: minutes on a CPU")
@pytest.mark.parametrize("name", cases.ENCODERS)
def test_encoder_step(record, name):
    model, inputs = cases.encoder(name, DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        loss = model(inputs).last_hidden_state.mean(dim=1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    record(step, kind="encoder step", encoder=name, samples=len(inputs))
