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
    row, x = torch.arange(24), torch.randn(24, 6)
    return FeatureFile(
        features={"text": x, "audio_kd": x}, present={"text": row >= 0, "audio_kd": row != 23},
        label=row % 4, speaker=row % 2, conversation=row // 4, split=torch.tensor([0, 0, 1, 2, 2, 2])[row // 4],
        label_names=NAMES, speaker_names=["A", "B"],
        conversation_names=[f"c{i}" for i in range(6)], utterance_names=[f"u{i}" for i in range(24)],
    )  # fmt: skip


def random_runs(seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    epoch = {split: dict.fromkeys(("loss", "kd_audio", "kd_video"), 1.0) for split in ("train", "dev", "test")}
    result = {"labels": [i % 4 for i in range(12)], "epoch": 1, "dev_f1": 50.0, "history": [epoch]}
    result["test_selected"] = dict.fromkeys(report.SCORES, 60.0)
    return [result | {"seed": s, "predictions": rng.integers(0, 4, 12).tolist()} for s in (0, 1)]


def test_the_bootstrap_equals_a_plain_loop():
    a, b, number = random_runs(0), random_runs(1), torch.tensor([7] * 5 + [3] * 4 + [9] * 3)
    rows = [np.flatnonzero(number.numpy() == n) for n in (3, 7, 9)]

    def difference(at):
        f1 = [f1_score(*(np.array(r[k])[at] for k in ("labels", "predictions")), average="weighted") for r in (*a, *b)]
        return 100 * np.array([f1[0] - f1[2], f1[1] - f1[3]])

    whole, draws = difference(np.arange(12)), np.random.default_rng(4).multinomial(3, [1 / 3] * 3, size=300)
    drawn = [difference(np.concatenate([np.tile(rows[c], n) for c, n in enumerate(draw)])).mean() for draw in draws]
    counts = [report.confusions(runs, number, 5) for runs in (a, b)]  # the fifth class does not occur
    found = report.paired_bootstrap(*counts, samples=300, seed=4)
    assert list(found.values()) == pytest.approx([whole.mean(), whole.std(ddof=1), *np.percentile(drawn, [2.5, 97.5])])


def test_the_papers_rows_stand_beside_ours():
    row = report.summary([{"seed": s, "epoch": None, "labels": [0, 1], "predictions": [0, s]} for s in (0, 1)])
    metrics = {"synthetic": False, "corpus": "MELD", "rows": {"T": row, "mine": row}}
    lines = report.results_table(metrics).splitlines()
    assert lines[2].startswith("| T | 75.00 ± 35.36 |") and lines[2].endswith("|  | 62.79 | 62.99 |")
    assert lines[3].endswith("|  |  |  |") and "paper" not in report.results_table(metrics | {"synthetic": True})
    rows = dict.fromkeys(["T", "A", "Concat T+A", "MAGT T+A"], [])
    assert [name for name, *_ in report.pairs_of(rows)] == ["Concat T+A - T", "MAGT T+A - Concat T+A", "MAGT T+A - T"]


def test_a_report_with_names_of_any_kind(tmp_path):
    file, rows = example(), {"T": random_runs(0)[:1], "MAGT T+A_KD": random_runs(1)}
    model = MAGT(FusionConfig(dict.fromkeys(("text", "audio"), 6), 4, 2, width=8)).eval()
    gate = model.anchor["audio"].gate["text"]
    torch.nn.init.zeros_(gate.weight)
    torch.nn.init.constant_(gate.bias, -3.0)  # W = 0: the gate is sigmoid(b)
    assert report.mean_gates(model, ("text", "audio_kd"), file)[1, 0] == pytest.approx(1 / (1 + np.exp(3)), abs=1e-6)
    result = dict.fromkeys(("title", "corpus", "machine", "weights"), "$a_b") | {"synthetic": True, "notes": ["n"]}
    result["section"] = report.ablation(file, rows, lambda row, seed: (model, ("text", "audio_kd")), tmp_path)
    report.write_report(tmp_path, result | {"file": file, "rows": rows, "problems": ["u1: audio missing"]})
    text, metrics = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "metrics.json").read_text())
    assert "synthetic" in text and "| a\\|b $x_1$ |" in text and "- u1: audio missing" in text
    assert metrics["per_class"][NAMES[1]]["recall"] == pytest.approx(100 * metrics["confusion"][1][1] / 6)
    for name in ("confusion", "losses", "gates", "tsne"):
        assert f"](figures/{name}.png)" in text and (tmp_path / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG"
