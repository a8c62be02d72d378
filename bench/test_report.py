"""Tables on synthetic rows with a known answer; stored results and the numbers that docs/benchmark.md quotes."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import report
from bench.cases import CASES, ENCODERS, FRAME_MODELS, FRAMES, MAGT_L, MAGT_U, MATCHED, PUBLISHED, REFERENCE, STAGE2

DOCS = Path(__file__).parent.parent / "docs" / "benchmark.md"
ENVIRONMENT = {"device": "cpu", "cpu": "x", "threads": 2, "torch": "2", "matrix_rates": {"float32": {"layers": 1e11}}}


def synthetic_rows(linear: int = 0) -> list[dict]:
    """Rows where section 4.7 is right if linear = 0: FLOPs are those of attention, n * D for each of n rows."""
    encoder = {"kind": "encoder count", "samples": 4, "flops": 1, "params": 1, "vectors": 9, "bytes": 1}
    stage2 = {"kind": "stage2", "mode": "float32", "utterances": 9, "flops": 1, "seconds": [1, 2, 3]}
    rows = [*({**encoder, "encoder": name} for name in ENCODERS), *({**stage2, "corpus": name} for name in STAGE2)]
    for case in CASES:
        n, samples = max(case.frames.values()), 2 * case.fewest
        L = 1 if case.model == MAGT_U else n
        attention, rest, kept = (samples * L * x for x in (16 * n * case.width, 16 * linear, 8 * case.width))
        facts = {**asdict(case), "samples": samples, "flops": attention + rest}
        count = {"kind": "count", "params": 1, "flops_attention": attention, "flops_linear": rest}
        rows.append({**facts, **count, "bytes": kept, "bytes_no_dropout": kept, "bytes_unfused": kept})
        time = {"seconds": [(attention + rest) * x for x in (1, 2, 4)], "peak_bytes": kept}
        base = {"reference_samples": 128, "reference_seconds": [128 * 16 * 64 * 768.0] * 3}
        rows += [{"kind": kind, **facts, **time, **base} for kind in ("inference", "training")]
    return rows


def test_a_right_paper_is_found_right():
    rows = synthetic_rows()
    attention, _, kept = report.granularity(rows).values()
    assert set(attention) == set(kept) == {1}
    for model in (MAGT_U, *FRAME_MODELS):
        powers = [report.exponent(rows, model, measure) for measure in report.MEASURES]
        assert powers == pytest.approx([2, 2, 2, 1, 2, 1, 1, 1])
    assert report.costs_less_from(rows, MAGT_L, "all FLOPs") == "8"  # L^2 = U


def test_linear_layers_are_noticed():
    rows = synthetic_rows(linear=10**9)
    assert report.exponent(rows, MAGT_L, "attention FLOPs") == pytest.approx(2)
    assert report.exponent(rows, MAGT_L, "all FLOPs") == pytest.approx(1, abs=0.01)
    low, high = report.granularity(rows)["all FLOPs, in 1/L"]
    assert low < 1 < high and high - low < 0.01


def test_ratios_are_those_of_paired_rounds():
    rows = synthetic_rows()
    one = report.select(rows, "training", MAGT_L)[8]
    one.update(samples=2, seconds=[2.0, 8.0, 3.0], reference_samples=4, reference_seconds=[4.0, 4.0, 12.0])
    assert report.ratio(rows, MAGT_L, 8, "training, time") == (1.0, 0.5, 4.0)
    assert str(report.ratio(rows, MAGT_L, 8, "training, time")) == "1 (0.5 to 4)"
    assert str(report.ratio(rows, MAGT_L, 8, "training, bytes kept")) == "8"


@pytest.mark.parametrize("unit, expected", [(100.0, 10), (10.0**9, math.inf), (1.0, 0)])
def test_crossing(unit, expected):
    assert report.crossing({L: L**2 / unit for L in FRAMES}) == pytest.approx(expected)


def test_each_gpu_has_its_file():
    assert report.results_path({"device": "cuda", "gpu": "NVIDIA GeForce RTX 4090"}).name == "geforce-rtx-4090.json"


def test_report_and_figure(tmp_path):
    report.save(tmp_path / "cpu.json", ENVIRONMENT, synthetic_rows())
    assert report.load(tmp_path / "cpu.json") == (ENVIRONMENT, synthetic_rows())
    text = (tmp_path / "cpu.md").read_text()
    assert text.count(report.NOT_MEASURED) == 2 * 3 * 5 + 3 * 2  # three modes of each corpus, three encoders' steps
    assert (tmp_path / "cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_are_those_of_this_code(path):
    environment, rows = report.load(path)
    assert report.results_path(environment) == path
    for case in CASES:
        row = report.select(rows, "count", case.model)[case.length]
        assert (row["flops_attention"], row["flops_linear"]) == case.flops(row["samples"])
    assert path.with_suffix(".md").read_text() == report.markdown(environment, rows)


def quotes() -> list[str]:
    """Every passage of docs/benchmark.md with a measured number, made from results/cpu.json."""
    environment, rows = report.load(report.RESULTS / "cpu.json")
    magt = report.select(rows, "count", MAGT_U)[REFERENCE.length]
    _, (low, high), _ = report.granularity(rows).values()
    encoders = report.encoder_flops(rows)
    kept, dry = (
        [report.ratio(rows, MATCHED, L, measure).median / L for L in FRAMES]
        for measure in ("training, bytes kept", "kept without dropout")
    )
    from_L = {m: report.costs_less_from(rows, PUBLISHED, m) for m in report.MEASURES}
    power = {m: report.exponent(rows, MAGT_L, m) for m in report.MEASURES}
    unfused = report.exponent(rows, PUBLISHED, "kept if attention is not fused")
    best = max(environment["matrix_rates"]["float32"].values())
    shares = [report.achieved(report.select(rows, "inference", PUBLISHED)[L]) / best for L in FRAMES]
    return [
        f"attention is {magt['flops_attention'] / magt['flops']:.1%} of MAGT's FLOPs",
        f"{float(low):.2f}/L to {float(high):.2f}/L",
        f"L^{power['inference, time']:.2f} in inference and L^{power['training, time']:.2f} in training",
        *(f"{L} in {measure.replace(',', '')}" for measure, L in list(from_L.items())[1:6]),
        f"{encoders / 1e9:,.0f} GFLOP an utterance, {encoders * magt['samples'] / magt['flops']:,.0f} times MAGT",
        f"{min(kept):.2f} L to {max(kept):.2f} L times the bytes",
        f"{min(dry):.2f} L to {max(dry):.2f} L without dropout",
        f"the bytes grow with L^{unfused:.2f}",
        f"MulT as published reaches {min(shares):.0%} to {max(shares):.0%} of it",
        report.crossing_table(rows),
        report.lengths_table(rows),
        report.where(environment),
    ]


def test_the_page_quotes_the_stored_results():
    stale = [quote for quote in quotes() if quote not in DOCS.read_text()]
    assert not stale, "rewrite these sentences in docs/benchmark.md after reading results/cpu.md"
