"""The README's tables are those of the stored results."""

import json
from pathlib import Path

import pytest

from bench.tables import RESULTS, verdict_table
from experiments import comparison_table
from report import results_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def metrics(run="metrics"):
    return json.loads((ROOT / "figures" / f"demo-{run}.json").read_text())


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
    for run, what in (("metrics", "whole conversation"), ("causal", "causal")):
        assert f"| MAGT T+A_KD+V, {what} | {' | '.join(cells(run, 'MAGT T+A_KD+V'))} |" in text
    for row in ("T", "A_KD", "V", "Concat T+A_KD+V", "MAGT T+A_KD+V"):
        assert f"| {row} | {' | '.join(cells('metrics', row)[:2] + cells('weights', row)[:2])} |" in text


def test_every_figure_and_file_that_is_named_is_there():
    words = " ".join(README).replace("(", " ").replace(")", " ").replace("`", " ").replace(",", " ").split()
    named = {w.rstrip(".:;") for w in words if w.startswith(("figures/", "bench/results/"))}
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []
