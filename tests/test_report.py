"""Scores over seeds, the bootstrap against a plain loop, tables and figures for names of any kind."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from data import FeatureFile
from extras import report
from fusion import MAGT, FusionConfig

NAMES = ["a|b $x_1$", "\\frac{ $", "a very long name of an emotion, as annotators may have written it", "<b>&_"]


def example() -> FeatureFile:
    """24 utterances; two of the six conversations are train, one is dev, three are test."""
    generator, row = torch.Generator().manual_seed(0), torch.arange(24)
    return FeatureFile(
        features={k: torch.randn(24, 6, generator=generator) for k in ("text", "audio_kd")},
        present={"text": row >= 0, "audio_kd": row != 23},
        label=row % 4, speaker=row % 2, conversation=row // 4, split=torch.tensor([0, 0, 1, 2, 2, 2])[row // 4],
        label_names=NAMES, speaker_names=["A", "B"],
        conversation_names=[f"c{i}" for i in range(6)], utterance_names=[f"u{i}" for i in range(24)],
    )  # fmt: skip


def random_runs(seed: int, seeds: int = 2, n: int = 12) -> list[dict]:
    rng = np.random.default_rng(seed)
    epoch = {k: 1.0 for k in ("loss", "kd_audio", "kd_video")}
    return [
        {"seed": s, "labels": [i % 4 for i in range(n)], "predictions": rng.integers(0, 4, n).tolist(), "epoch": 1}
        | {"dev_f1": 50.0 + s, "history": [{"train": epoch, "dev": epoch, "test": epoch}] * 3}
        | {"test_selected": {s: 60.0 for s in report.SCORES}}
        for s in range(seeds)
    ]


def test_the_bootstrap_equals_a_plain_loop():
    a, b, number = random_runs(0), random_runs(1), torch.tensor([7] * 5 + [3] * 4 + [9] * 3)
    counts = [report.confusions(runs, number, 5) for runs in (a, b)]  # the fifth class does not occur
    assert counts[0].shape == (2, 3, 5, 5) and counts[0].sum() == 24
    rows = [np.flatnonzero(number.numpy() == n) for n in (3, 7, 9)]

    def f1(run, at):
        labels, predictions = (np.array(run[k])[at] for k in ("labels", "predictions"))
        return 100 * f1_score(labels, predictions, average="weighted", zero_division=0)

    def difference(at):
        return np.mean([f1(x, at) - f1(y, at) for x, y in zip(a, b)])

    draws = np.random.default_rng(4).multinomial(3, [1 / 3] * 3, size=300)
    drawn = [difference(np.concatenate([np.tile(rows[c], n) for c, n in enumerate(draw)])) for draw in draws]
    expected = difference(np.arange(12)), *np.percentile(drawn, [2.5, 97.5])
    assert report.paired_bootstrap(*counts, samples=300, seed=4) == pytest.approx(expected)
    assert report.paired_bootstrap(counts[0], counts[0]) == (0, 0, 0)
    whole = [report.confusions(runs, torch.zeros(12, dtype=torch.long), 4) for runs in (a, b)]
    assert report.paired_bootstrap(*whole) == pytest.approx([expected[0]] * 3)  # one conversation: nothing to draw


def test_tables():
    assert report.table(["a|b"], [["x\ny"], [1]]) == "| a\\|b |\n| --- |\n| x y |\n| 1 |"
    assert report.mean_std([1.0, 2.0, 6.0]) == pytest.approx((3, 7**0.5)) and report.mean_std([5.0]) == (5, 0)
    row = report.summary([{"seed": s, "labels": [0, 0, 1, 1], "predictions": p, "epoch": None}
                          for s, p in enumerate(([0, 0, 1, 1], [0, 1, 1, 1]))])  # fmt: skip
    assert row["accuracy"] == pytest.approx({"mean": 87.5, "std": 25 / 2**0.5})
    assert row["weighted_f1"]["mean"] == pytest.approx((100 + 50 * (2 / 3 + 4 / 5)) / 2) and "dev_f1" not in row
    metrics = {"synthetic": False, "corpus": "MELD", "rows": {"T": row, "mine": row}}
    lines = report.results_table(metrics).splitlines()
    assert lines[2].startswith("| T | 87.50 ± 17.68 |") and lines[2].endswith("|  | 62.79 | 62.99 |")
    assert lines[3].endswith("|  |  |  |")
    assert "paper" not in report.results_table(metrics | {"synthetic": True})


def test_which_rows_are_compared():
    rows = dict.fromkeys(["T", "A", "Concat T+A", "Context T+A", "MAGT T+A", "MAGT T"], [])
    assert [name for name, *_ in report.pairs_of(rows)] == [
        "Concat T+A - T", "Context T+A - Concat T+A", "Context T+A - T",
        "MAGT T+A - Concat T+A", "MAGT T+A - Context T+A", "MAGT T+A - T", "MAGT T - T",
    ]  # fmt: skip
    assert "Context" not in report.legend(["T", "MAGT T+A"]) and "Context" in report.legend(rows)
    assert report.main_row(["T", "MAGT T+A_KD+V", "MAGT T"]) == "MAGT T+A_KD+V" and report.main_row(["T", "X"]) == "X"


def test_mean_gates_equal_the_formula():
    model = MAGT(FusionConfig(dict.fromkeys(("text", "audio"), 6), 4, 2, width=8)).eval()
    with torch.no_grad():
        for source, bias in (("text", 2.0), ("audio", -3.0)):  # W = 0: the gate is sigmoid(b)
            model.anchor["audio"].gate[source].weight.zero_()
            model.anchor["audio"].gate[source].bias.fill_(bias)
    gates = report.mean_gates(model, ("text", "audio_kd"), example())
    assert gates[1] == pytest.approx([1 / (1 + np.exp(-2)), 1 / (1 + np.exp(3))], abs=1e-6) and gates.shape == (2, 2)


def test_a_report_with_names_of_any_kind(tmp_path):
    assert report.matplotlib.get_backend().lower() == "agg"
    file, rows = example(), {"T": random_runs(0, seeds=1), "MAGT T+A_KD": random_runs(1)}
    model = MAGT(FusionConfig(dict.fromkeys(("text", "audio"), 6), 4, 2, width=8)).eval()
    section = report.ablation(file, rows, lambda row, seed: (model, ("text", "audio_kd")), tmp_path)
    result = {
        "title": "MAGTKD on $a_b",
        "synthetic": True,
        "corpus": "$a_b",
        "machine": "m",
        "weights": "w",
        "file": file,
    }
    table = report.write_report(
        tmp_path, result | {"notes": ["n"], "problems": ["u1: audio missing"], "rows": rows, "section": section}
    )
    text, metrics = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "metrics.json").read_text())
    assert table in text and "synthetic" in text and "| a\\|b $x_1$ |" in text and "- u1: audio missing" in text
    assert sum(map(sum, metrics["confusion"])) == 24 and list(metrics["per_class"]) == NAMES
    per_class = metrics["per_class"][NAMES[1]]
    hits = sum(p == 1 for r in rows["MAGT T+A_KD"] for p, y in zip(r["predictions"], r["labels"]) if y == 1)
    assert per_class["support"] == 3 and per_class["recall"] == pytest.approx(100 * hits / 6)
    for name in ("confusion", "losses", "gates", "tsne"):
        assert f"](figures/{name}.png)" in text and (tmp_path / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG"
