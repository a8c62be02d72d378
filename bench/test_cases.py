"""The measurements, a row of results each: counts and bytes, inference, training, a stage-2 step, the encoders."""

import pytest

from bench import cases, cost
from bench.cases import DEVICE


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        quick = metafunc.config.getoption("benchmark_disable")
        metafunc.parametrize("case", cases.QUICK if quick else cases.CASES, ids=str)


def test_count(benchmark, record_property, case):
    """FLOPs, three ways that must agree exactly. Bytes with the CPU's fused attention, the same on every machine."""
    samples, flops = case.fewest, case.flops(case.fewest)
    model, inputs = case.build("meta"), case.inputs(samples, "meta")
    by_torch = benchmark.pedantic(lambda: cost.count_with_torch(model, inputs))
    assert by_torch == cost.count_with_fvcore(model, inputs) == flops
    real, real_inputs = case.build("cpu"), case.inputs(samples, "cpu")
    facts = {
        "flops": sum(flops),
        "flops_attention": flops.attention,
        "bytes": cost.bytes_for_backward(real.train(), real_inputs),
        "bytes_no_dropout": cost.bytes_for_backward(real.eval(), real_inputs),
    }
    record_property("row", {"kind": "count", "case": str(case), "samples": samples, **facts})


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_time(benchmark, measure, record_property, case, mode):
    reference = cases.REFERENCE if benchmark.enabled else cases.QUICK[0]
    samples, reference_samples = (x.timed_samples(DEVICE) if benchmark.enabled else x.fewest for x in (case, reference))
    facts = measure(
        cases.timed_call(mode, case, samples, DEVICE),
        cases.timed_call(mode, reference, reference_samples, DEVICE),
    )
    facts["flops"] = (3 if mode == "training" else 1) * sum(case.flops(samples))
    facts["reference_samples"] = reference_samples
    record_property("row", {"kind": mode, "case": str(case), "samples": samples, **facts})


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_stage2_step(benchmark, measure, record_property, dtype):
    lengths = cases.STAGE2_LENGTHS if benchmark.enabled else [3, 1]
    step, flops = cases.stage2_step(lengths, dtype, DEVICE)
    facts = {"dtype": dtype, "samples": sum(lengths), "flops": 3 * sum(flops), **measure(step, rounds=3)}
    record_property("row", {"kind": "step", "case": f"stage 2, {dtype}", **facts})


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
@pytest.mark.parametrize("name, vectors", list(zip(cases.ENCODERS, cases.ENCODED)))
def test_encoder(measure, record_property, name, vectors):
    """FLOPs of a step everywhere; on CUDA the step itself, which takes minutes on a CPU."""
    model, inputs = cases.encoder(name, "meta")
    assert model(inputs).last_hidden_state.shape[1] == vectors
    facts = {"dtype": "float32", "samples": len(inputs), "flops": 3 * sum(cost.count_with_torch(model, (inputs,)))}
    if DEVICE == "cuda":
        model, inputs = cases.encoder(name, DEVICE)
        loss_of = lambda: model(inputs).last_hidden_state.mean(dim=1).square().mean()  # noqa: E731
        facts |= measure(cases.training_step(model, loss_of, update=True))
    record_property("row", {"kind": "step", "case": name, **facts})
