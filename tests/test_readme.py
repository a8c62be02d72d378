"""The README's tables are those of the stored results."""

import json
from pathlib import Path
from statistics import median

import pytest

from bench.tables import RESULTS, verdict_table
from experiments import comparison_table
from report import results_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def metrics(run="demo-metrics"):
    return json.loads((ROOT / "figures" / f"{run}.json").read_text())


def cells(run, row):
    """W-F1, M-F1 and the test-selected W-F1 of a row, as a table has them."""
    (line,) = [line for line in results_table(metrics(run)).splitlines() if line.startswith(f"| {row} |")]
    return line.strip("| ").split(" | ")[2:]


def preset_table():
    text = (ROOT / "figures" / "demo-presets.md").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if line.startswith("|"))


TABLES = {
    "demo": lambda: results_table(metrics()),
    "bootstrap": lambda: comparison_table(metrics()["comparisons"]),
    "presets": preset_table,
    "verdicts": lambda: verdict_table(json.loads((RESULTS / "cpu.json").read_text())["rows"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_each_line_of_a_stored_table_stands_in_the_readme(name):
    lines = TABLES[name]().splitlines()
    assert len(lines) > 5
    assert [line for line in lines if line not in README] == []


def test_the_tables_that_compare_runs():
    text = "\n".join(README)
    for run, what in (("demo-metrics", "whole conversation"), ("demo-causal", "causal")):
        assert f"| MAGT T+A_KD+V, {what} | {' | '.join(cells(run, 'MAGT T+A_KD+V'))} |" in text
    for row in ("T", "A_KD", "V", "Concat T+A_KD+V", "MAGT T+A_KD+V"):
        assert f"| {row} | {' | '.join(cells('demo-metrics', row)[:2] + cells('demo-weights', row)[:2])} |" in text


def test_what_the_text_says_was_measured():
    text = " ".join(" ".join(README).split())
    speed = json.loads((ROOT / "figures" / "speed.json").read_text())
    one, two = speed["stage1"], speed["stage2"]
    seconds = [f"{median(s):.2f}" for s in one["seconds"].values()]
    assert "{} s with neither, {} s decoded once, {} s taught once, {} s with both".format(*seconds) in text
    assert f"would add {one['seconds_of_large_teacher']:.0f} s to every epoch" in text
    rates = [f"{two['utterances'] / median(s):.0f}" for s in two["seconds"].values()]
    assert "{} at random and padded, {} of similar length, {} at random and packed, {} with both".format(*rates) in text
    own = two["useful_flops"] / median(two["seconds"]["similar lengths, packed"]) / two["gemm_flops_per_s"]["layers"]
    assert f"{100 * own:.0f} % of what this machine reaches on products of the model's own size" in text
    rows = json.loads((RESULTS / "cpu.json").read_text())["rows"]
    steps = {r["mode"]: r for r in rows if r["kind"] == "stage2" and r["corpus"].startswith("IEMOCAP")}
    before, after = (f"{steps[m]['utterances'] / steps[m]['seconds']:.0f}" for m in ("at random, padded", "eager"))
    assert f"from {before} to {after} utterances per second" in text
    shares = [f"{100 * x:.1f} %" for what in speed["padding"].values() for x in what.values()]
    assert all(f"{a} and {b}" in text for a, b in zip(shares[::2], shares[1::2]))
    for row in ("MAGT", "Concat"):
        mosi = metrics("mosi-metrics")["rows"][f"{row} T+A"]["weighted_f1"]
        assert f"{row} {mosi['mean']:.2f} ± {mosi['std']:.2f}" in text


def test_every_figure_and_file_that_is_named_is_there():
    words = " ".join(README).replace("(", " ").replace(")", " ").replace("`", " ").replace(",", " ").split()
    named = {w.rstrip(".:;") for w in words if w.startswith(("figures/", "bench/results/")) and "*" not in w}
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
