"""Numbers with a known answer, stored results, and what docs/benchmark.md quotes of them."""

import math

import pytest

from bench import report
from bench.cases import CASES, ENCODERS, FRAMES, LENGTHS, MAGT_L, MATCHED, PUBLISHED, REFERENCE, Case

STORED = report.RESULTS / "cpu.json"


def test_ratios_are_those_of_paired_rounds():
    case = Case(MAGT_L, 8)
    row = {"kind": "training", "case": str(case), "samples": 2, "seconds": [2.0, 8.0, 3.0]}
    row |= {"reference_samples": 4, "reference_seconds": [4.0, 4.0, 12.0]}
    assert report.ratio([row], case, "training, time") == (1.0, 0.5, 4.0)


@pytest.mark.parametrize("unit, expected", [(100.0, 10), (10.0**9, math.inf), (1.0, 0)])
def test_crossing(unit, expected):
    assert report.crossing({L: L**2 / unit for L in FRAMES}) == pytest.approx(expected)


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_stored_results_are_those_of_this_code(path, tmp_path, monkeypatch):
    environment, rows = report.load(path)
    for case in CASES:
        row, flops = report.find(rows, "count", case), case.flops(case.fewest)
        assert (row["samples"], row["flops_attention"], row["flops"]) == (case.fewest, flops.attention, sum(flops))
    attention, _, kept = report.granularity(rows).values()
    powers = [report.exponent(rows, MAGT_L, measure) for measure in ("attention FLOPs", "training, bytes kept")]
    assert [*attention, *kept, *powers] == pytest.approx([1, 1, 1, 1, 2, 1])
    assert report.costs_less_from(rows, MAGT_L, "attention FLOPs") == "8"  # L^2 = U
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    again = report.save(environment, rows)
    for suffix in (".json", ".md"):
        assert again.with_suffix(suffix).read_text() == path.with_suffix(suffix).read_text()
    assert again.with_suffix(".png").stat().st_size > 10_000


def quotes() -> list[str]:
    """Every passage of docs/benchmark.md with a measured number, made from results/cpu.json."""
    environment, rows = report.load(STORED)
    magt = report.find(rows, "count", REFERENCE)
    _, (low, high), _ = report.granularity(rows).values()
    encoders = sum(row["flops"] / 3 / row["samples"] for row in rows if row["case"] in ENCODERS)
    kept, dry = (
        [report.ratio(rows, Case(MATCHED, L), measure)[0] / L for L in FRAMES]
        for measure in ("training, bytes kept", "kept without dropout")
    )
    from_L = {m: report.costs_less_from(rows, PUBLISHED, m) for m in report.MEASURES}
    power = {m: report.exponent(rows, MAGT_L, m) for m in report.MEASURES}
    published = [report.find(rows, "inference", Case(PUBLISHED, L)) for L in FRAMES]
    shares = [report.share(environment, row) for row in published]
    return [
        f"attention is {magt['flops_attention'] / magt['flops']:.1%} of MAGT's FLOPs",
        f"{low:.2f}/L to {high:.2f}/L",
        f"{encoders / 1e9:,.0f} GFLOP an utterance, {encoders * magt['samples'] / magt['flops']:,.0f} times MAGT",
        *(f"{L} in {measure.replace(',', '')}" for measure, L in list(from_L.items())[1:6]),
        f"L^{power['inference, time']:.2f} in inference and L^{power['training, time']:.2f} in training",
        f"{min(kept):.2f} L to {max(kept):.2f} L times the bytes",
        f"{min(dry):.2f} L to {max(dry):.2f} L without dropout",
        f"MulT as published reaches {min(shares):.0%} to {max(shares):.0%} of it",
        report.crossing_table(rows),
        report.ratio_table(rows, [case for case in CASES if case.length in LENGTHS]),
        report.where(environment),
    ]


def test_the_page_quotes_the_stored_results():
    for page, quoted in (("docs/benchmark.md", quotes()), ("README.md", quotes()[:5])):
        text = (report.RESULTS.parent.parent / page).read_text()
        stale = [quote for quote in quoted if quote not in text]
        assert not stale, f"rewrite these sentences in {page} after reading results/cpu.md"
