"""What docs/ shows is taken over whole, and the exercises of the course are what the page says."""

import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import magtkd
from data import Conversations, FeatureFile, InputError, write_features
from extras import docs, docs_runs, docs_stored, gather
from extras.features import read_features

ROOT = Path(__file__).parent.parent
SHORT = ["--stage1-epochs", "1", "--stage2-epochs", "2", "--seeds", "2", "--encoders", "tiny", "--workers", "1"]
TOY = dataclasses.replace(magtkd.CONFIGS["demo"], width=16, stage2_epochs=2, stage2_batch=2, heads=2)


@pytest.fixture(scope="module")
def run(meld, tmp_path_factory):
    """MELD's words alone, as docs/experiments.md has them."""
    out = tmp_path_factory.mktemp("runs") / "meld"
    more = ["--modalities", "text", "--ablation"]
    assert magtkd.main(["meld", "--root", str(meld), "--out", str(out), *SHORT, *more]) == 0
    return out


@pytest.fixture(scope="module")
def figures(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    gather.take("meld", run, folder)
    return folder


def test_a_run_is_taken_over(run, figures):
    assert (figures / "meld-metrics.json").read_text() == (run / "metrics.json").read_text()
    assert {path.name for path in run.glob("figures/*.png")} == {
        path.name.removeprefix("meld-") for path in figures.glob("*.png")
    }
    said = (figures / "meld-predict.txt").read_text()
    assert said.count("\n") == 1 + gather.CONVERSATIONS["meld"].strip().count("\n") and "who called me" in said
    assert "conversation" not in said and str(run) not in said


def test_each_fusion_is_compared_with_the_words_alone(run, figures):
    compared = json.loads((figures / "meld-words.json").read_text())["comparisons"]
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert [c["pair"] for c in compared] == ["Concat T - T", "Context T - T", "MAGT T - T"]
    for c in compared:
        gap = rows[c["pair"].removesuffix(" - T")]["weighted_f1"]["mean"] - rows["T"]["weighted_f1"]["mean"]
        assert c["difference"] == pytest.approx(gap, abs=1e-6) and c["low"] <= c["high"]


def test_the_pieces_say_what_was_taken(run, figures, monkeypatch):
    for module in (docs_stored, docs_runs, docs):
        monkeypatch.setattr(module, "FIGURES", figures)
    gather.take("meld-causal", run, figures)
    assert docs.block("meld").count("\n") == 5 and docs.block("meld-predict").startswith("```\n")
    assert docs.block("meld-words").count("\n") == 4
    answer = docs.block("meld-verdict")
    for c in json.loads((figures / "meld-words.json").read_text())["comparisons"][1:]:
        assert f"{c['difference']:+.2f}, 95 % interval {c['low']:+.2f} to {c['high']:+.2f}" in answer
    table = docs.block("meld-options")
    assert table.count("| causal |") == 3 and table.count("| class weights | not measured |") == 3
    assert docs.block("meld-options-verdict") == "Not measured."
    assert (
        docs.block("meld-confusion") == "![Confusion matrix of MAGT on MELD, words alone](figures/meld-confusion.png)"
    )
    assert docs.block("demo") == "Not measured."


def test_the_answer_follows_the_interval(figures, monkeypatch):
    compared = [
        {"pair": "MAGT T - T", "difference": 1.5, "low": 0.5, "high": 2.5, "std": 0.1},
        {"pair": "Context T - T", "difference": 0.2, "low": -0.5, "high": 0.9, "std": 0.1},
    ]
    words = {"comparisons": compared}
    rest = json.loads((figures / "meld-metrics.json").read_text())
    monkeypatch.setattr(docs_runs, "stored", lambda name: words if name == "meld-words" else rest)
    assert "MAGT against the words alone: yes (+1.50" in docs.block("meld-verdict")
    assert "Context against the words alone: no clear answer (+0.20" in docs.block("meld-verdict")
    compared[0] |= {"low": -2.5, "high": -0.5}
    assert "MAGT against the words alone: no, it takes away" in docs.block("meld-verdict")


def test_what_is_no_finished_run_is_said(tmp_path, capsys):
    with pytest.raises(InputError, match="no finished run"):
        gather.take("demo", tmp_path, tmp_path)
    assert gather.main([f"mosi={tmp_path}"]) == 2 and "no finished run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gather.main(["iemocapp=runs/demo"])


# The exercises


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Random features of 12 conversations, in a run's folder."""
    torch.manual_seed(0)
    conversation = torch.arange(12).repeat_interleave(5)
    N, kinds = len(conversation), ("text", "audio_kd", "video")
    file = FeatureFile(
        {k: torch.randn(N, 16) for k in kinds},
        {k: torch.ones(N, dtype=torch.bool) for k in kinds},
        torch.arange(N) % 3,
        torch.arange(N) % 2,
        conversation,
        torch.tensor([0] * 8 + [1, 1] + [2, 2])[conversation],
        ["a", "b", "c"],
        ["first", "second"],
        [f"c{i}" for i in range(12)],
        [f"u{i}" for i in range(N)],
    )
    folder = tmp_path_factory.mktemp("runs") / "toy"
    folder.mkdir()
    write_features(folder / "features.safetensors", file)
    return folder


@pytest.fixture(scope="module")
def rows(features):
    return gather.exercises(features, range(1), TOY)["rows"]


def changes():
    """{exercise's number: (file, what goes, what comes)} of docs/course.md."""
    page = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
    found = re.findall(r"^### (\d).*?^In `(\w+)\.py`.*?^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = {n: (file, diff.splitlines()) for n, file, diff in found}
    return {
        n: (file, *("\n".join(x[1:] for x in diff if x[0] == sign) for sign in "-+"))
        for n, (file, diff) in lines.items()
    }


def changed(file, old, new, monkeypatch):
    """magtkd with a line changed in one of the five files: fresh modules, beside those that the tests use."""
    for name in ("extras.context", "magtkd", "fusion", "losses"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("losses", "fusion", "magtkd"):
        code = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        if name == file:
            assert code.count(f"{old}\n") == 1
            code = code.replace(f"{old}\n", f"{new}\n")
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, f"{name}.py", "exec"), vars(module))
    return sys.modules["magtkd"]


@pytest.mark.parametrize("exercise", [name for name in gather.EXERCISES if name != "3. gates open"])
def test_the_change_on_the_page_is_what_is_measured(exercise, features, rows, tmp_path, monkeypatch):
    number = exercise.split(".")[0] if "." in exercise else None
    change = changes()[number] if number else ("losses", "", "")
    program = changed(*change, monkeypatch) if number else magtkd
    file = read_features(features / "features.safetensors")
    data = Conversations(file, ("text", "audio_kd", "video"), torch.device("cpu"))
    name = list(program.PAPER.models)[-1]
    result = program.train_fusion(name, data, 3, TOY, tmp_path / "model", 0, program.PAPER)
    assert result["history"][-1]["train"] == pytest.approx(rows[exercise]["terms"], rel=1e-4, abs=1e-6)
    if number:
        plain = rows["the paper"]["terms"]
        assert any(abs(plain[k] - x) > 1e-6 for k, x in rows[exercise]["terms"].items())


def test_all_four_exercises_are_on_the_page_and_measured(rows):
    assert {name.split(".")[0] for name in gather.EXERCISES if name != "the paper"} == set(changes()) == set("1234")
    assert rows["3. gates closed"]["answers"] == 1  # a model without input


def test_gathering_leaves_the_modules_as_they_were(rows):
    import fusion
    import losses

    assert losses.feature_loss.__name__ == "feature_loss" and fusion.Anchor.alpha.__qualname__ == "Anchor.alpha"
