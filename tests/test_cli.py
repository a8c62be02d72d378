"""The command line: every option, whole runs on each kind of input, errors and exit codes, run.sh."""

import ast
import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from corpora import write_as_csv
from test_features import example

import magtkd
from data import InputError, read_features, read_iemocap, write_features
from extras.demo import write_iemocap
from magtkd import CONFIGS, Config, parse, run_command

PROJECT = Path(__file__).parent.parent
SHORT = ["--stage1-epochs", "1", "--stage2-epochs", "2", "--encoders", "tiny", "--workers", "2", "--device", "cpu"]


def start(*options) -> int:
    return magtkd.main([str(x) for x in (*options, *SHORT)])


# Options


def values(f: dataclasses.Field) -> list[tuple[str, object]]:
    """What is written after the option, and what the field of Config then is."""
    low, high, choices = (f.metadata[k] for k in ("low", "high", "choices"))
    if f.name == "modalities":
        return [("text,video", ("text", "video"))]
    if low is None:
        return [(x, x) for x in choices or ["some/model"]]
    if isinstance(getattr(Config(), f.name), dict):
        one = getattr(CONFIGS["demo"], f.name) | {"text": low, "audio": high}
        return [(f"text={low},audio={high}", one), (str(high), magtkd.each(high))]
    return [(str(x), f.type(x)) for x in (low, high)]


@pytest.mark.parametrize("f", dataclasses.fields(Config), ids=lambda f: f.name)
def test_each_option_sets_its_field(f):
    def field(*written) -> object:
        config = parse(["demo", *written])[1]
        assert config == dataclasses.replace(CONFIGS["demo"], **{f.name: getattr(config, f.name)})  # no other
        return getattr(config, f.name)

    name = f.name.replace("_", "-")
    if f.type is bool:
        assert (field(f"--{name}"), field(f"--no-{name}")) == (True, False)
        return
    for written, expected in values(f):
        assert field(f"--{name}", written) == expected
    if f.metadata["low"] is not None:
        for wrong in (f.metadata["low"] - 1, f.metadata["high"] * 2, "nan", "", "x", "9" * 5000):
            with pytest.raises(SystemExit, match="2"):
                field(f"--{name}", str(wrong))


WRONG = """corpus:
invalid choice: nothing
--root belongs to: demo --root x
csv needs --root FILE.csv: csv
--check reads a corpus: demo --check
wants a whole number from 1 to 100: demo --seeds 0
wants a whole number: demo --stage1-epochs text=1.5
multiple of 8: demo --width 100
invalid choice: demo --precision half
text=X,audio=X,video=X: demo --stage1-lr text=1,words=2
wants text, or text with: demo --modalities audio
wants text, or text with: demo --modalities text,words
use cpu: demo --device gpu
none.safetensors: iemocap --features none.safetensors
Session1: iemocap --root nowhere
train_sent_emo.csv: meld --root nowhere
nowhere.csv: csv --root nowhere.csv
/proc: csv --root /proc"""


@pytest.mark.parametrize("line", WRONG.splitlines())
def test_what_cannot_be_done_is_one_line(line, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, _, options = line.partition(":")
    assert words in refused(*options.split()) and not list(tmp_path.iterdir())


def test_a_corpus_without_media(meld, tmp_path, capsys):
    shutil.copytree(meld, tmp_path / "meld", ignore=shutil.ignore_patterns("*.mp4"))
    assert start("meld", "--root", tmp_path / "meld", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "no audio file for any utterance of train" in error and "--modalities text" in error
    assert start("meld", "--root", tmp_path / "meld", "--out", tmp_path / "run", "--modalities", "text") == 0
    assert list(json.loads((tmp_path / "run/metrics.json").read_text())["rows"]) == ["T", "Concat T", "MAGT T"]


# Whole runs


def test_meld(meld, tmp_path, capsys):
    """With an ablation, two seeds, weights of 0, a corrupt and a missing file."""
    out = tmp_path / "run"
    more = ["--seeds", "2", "--ablation", "--alpha", "0", "--dropout", "0", "--class-weights"]
    assert start("meld", "--root", meld, "--out", out, *more) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["alpha"], config["dropout"], config["class_weights"], config["beta"]) == (0, 0, True, 0.09)
    metrics, report = json.loads((out / "metrics.json").read_text()), (out / "report.md").read_text()
    sets = ["T", "T+A+V", "T+A+V_KD", "T+A_KD+V", "T+A_KD+V_KD"]
    fused = [f"{fusion} {s}" for fusion in ("Concat", "Context", "MAGT") for s in sets]
    assert list(metrics["rows"]) == ["T", "A", "V", "A_KD", "V_KD", *fused]
    assert [len(row["seeds"]) for row in metrics["rows"].values()] == [1] * 5 + [2] * 15
    history = json.loads((out / "fusion/MAGT-T+A_KD+V-seed1.json").read_text())["history"][-1]["train"]
    assert history["kd_audio"] > 0 and history["loss"] == pytest.approx(history["l_ce"] + 0.09 * history["kd_video"])
    row = next(x for x in report.splitlines() if x.startswith("| MAGT T+A_KD+V |"))
    assert row.endswith("| 66.36 | 65.32 |") and " ± " in row  # the paper's
    assert row in capsys.readouterr().out and "synthetic" not in report and not metrics["synthetic"]
    problems = metrics["problems"]
    assert "dev_dia0_utt1: audio missing" in problems and "dev_dia0_utt1: video missing" in problems
    assert any(p.startswith("train_dia0_utt1: video broken") for p in problems)
    assert all(f"- {p}\n" in report for p in problems)
    file = read_features(out / "features.safetensors")
    at = file.utterance_names.index("train_dia0_utt1")
    assert file.present["text"].all() and not file.present["video"][at] and not file.features["video"][at].any()
    figures = {p.name: p.stat().st_size for p in (out / "figures").iterdir()}
    assert figures.keys() == {"confusion.png", "losses.png", "gates.png", "tsne.png"} and min(figures.values()) > 5000
    assert (out / metrics["weights"]).is_file() and not list(out.rglob("*.resume.pt"))


def test_a_csv_gives_the_digits_of_the_corpus(tmp_path):
    write_iemocap(tmp_path / "iemocap", seed=3, conversations=2, utterances=(4, 5))
    corpus = read_iemocap(tmp_path / "iemocap")
    write_as_csv(tmp_path / "mine.csv", corpus)
    assert {u.label for u in corpus.utterances()} == set(range(6))
    results = []
    for name, root in (("iemocap", "iemocap"), ("csv", "mine.csv")):
        out = tmp_path / f"run-{name}"
        assert start(name, "--root", tmp_path / root, "--out", out, "--seeds", 1) == 0
        rows = json.loads((out / "metrics.json").read_text())["rows"]
        results.append([rows, json.loads((out / "fusion/MAGT-T+A_KD+V-seed0.json").read_text())["history"]])
    assert results[0] == results[1]


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_your_own_features(preset, tmp_path):
    write_features(tmp_path / "f.safetensors", example())
    out = tmp_path / "run"
    more = ["--features", tmp_path / "f.safetensors", "--out", out, "--seeds", 2, "--preset", preset, "--causal"]
    assert start("iemocap", *more) == 0
    assert list(json.loads((out / "metrics.json").read_text())["rows"]) == ["Concat T+A_KD", "MAGT T+A_KD"]
    assert "paper:" not in (out / "report.md").read_text()
    result = json.loads((out / "fusion/MAGT-T+A_KD-seed0.json").read_text())
    assert result["made_from"]["model"][0] == ("MAGT" if preset == "paper" else "ReleasedMAGT")
    assert "causal=True" in result["made_from"]["model"][1]
    assert result["made_from"]["recipe"]["weight_decay"] == (0.01 if preset == "paper" else 1e-6)


def test_feature_sets():
    for kinds, one, table3 in (
        ("text", "T", "T"),
        ("text audio audio_kd", "T+A_KD", "T T+A T+A_KD"),
        ("text video", "T+V", "T T+V"),
        ("text audio video audio_kd video_kd", "T+A_KD+V", "T T+A+V T+A+V_KD T+A_KD+V T+A_KD+V_KD"),
    ):
        for all_of_table3, expected in ((False, one), (True, table3)):
            sets = magtkd.feature_sets(kinds.split(), all_of_table3)
            assert {magtkd.row_name("X", x) for x in sets} == {f"X {names}" for names in expected.split()}


# Errors and exit codes


def test_no_code_depends_on_docstrings_or_assertions():
    """They are gone under python -OO."""
    for path in [*PROJECT.glob("*.py"), *PROJECT.glob("extras/*.py")]:
        for x in ast.walk(ast.parse(path.read_text())):
            name = getattr(x, "id", getattr(x, "attr", ""))
            assert not isinstance(x, ast.Assert) and name != "__doc__", path


def test_an_error_is_one_line(capsys):
    for error, code, words in (
        (InputError("x.csv: bad\x1b[31m"), 2, "p: x.csv: bad\\x1b[31m\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "--gradient-checkpointing"),
        (FileExistsError(errno.EEXIST, "File exists", "figures"), 2, "p: figures: File exists"),
    ):
        assert run_command("p", Mock(side_effect=error)) == code
        assert words in capsys.readouterr().err


SCRIPT = """
import json, os, sys, signal
sys.path.insert(0, {project!r})
from magtkd import run_command
found = {{}}

def try_it(name, target, work, **options):
    r, w = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(w, 2)
        if target == "closed pipe":
            a, b = os.pipe()
            os.close(a)
        else:
            b = os.open(target, os.O_WRONLY)
        os.dup2(b, 1)
        sys.stdout, sys.stderr = open(1, "w", **options), open(2, "w")
        sys.exit(run_command("p", work))
    os.close(w)
    text = os.fdopen(r).read()
    found[name] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text]

def many():
    print("\\u4e2d \\ud800", "x" * 100_000)

for name, work in (("many", many), ("few", lambda: print("a")), ("at once", lambda: print("a", flush=True))):
    try_it("pipe " + name, "closed pipe", work)
    try_it("full " + name, "/dev/full", work)
try_it("ascii", os.devnull, many, encoding="ascii")
try_it("interrupt", os.devnull, lambda: os.kill(os.getpid(), signal.SIGINT))
try_it("bug", os.devnull, lambda: 1 / 0)
sys.__stdout__.write(json.dumps(found))
"""


def test_exit_codes_and_outputs_of_processes():
    command = [sys.executable, "-c", SCRIPT.format(project=str(PROJECT))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    code, text = found.pop("bug")
    assert code == 1 and "Traceback" in text and "ZeroDivisionError" in text
    full = "p: output: No space left on device. What is complete is kept\n"
    stopped = "\nstopped; the same command resumes\n"
    for name, result in found.items():
        expected = {"pipe": [141, ""], "full": [2, full], "inte": [130, stopped], "asci": [0, ""]}[name[:4]]
        assert result == expected, name


# run.sh


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The project in a path with ":" and a blank, a link to run.sh, and a folder with hostile files to work in."""
    folder = tmp_path_factory.mktemp("a: b")
    (folder / "code/extras").mkdir(parents=True)
    (folder / "work/extras").mkdir(parents=True)
    for path in [*PROJECT.glob("*.py"), *PROJECT.glob("extras/*.py"), PROJECT / "run.sh", PROJECT / "requirements.txt"]:
        shutil.copy(path, folder / "code" / path.relative_to(PROJECT))
    for name in ("data", "random", "re", "losses", "extras/__init__", "extras/predict"):
        (folder / f"work/{name}.py").write_text("raise SystemExit('hostile')")
    (folder / "link.sh").symlink_to("code/run.sh")
    return folder


COMMANDS = {
    "demo --help": (0, "--stage1-lr"),
    "predict --help": (0, "--stream"),
    "sweep --help": (0, "--grid"),
    "meld --root nowhere": (2, "no complete MELD at nowhere"),
    "": (2, "bash run.sh tour"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_run_sh(command, installed):
    code, words = COMMANDS[command]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHON": "", "CDPATH": str(installed), "PIP_NO_INDEX": "1"}
    how = {"cwd": installed / "work", "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "../link.sh", *command.split()], **how)
    assert done.returncode == code and words in done.stdout + done.stderr, done.stderr
    assert not (installed / "code/.venv").exists()  # this Python has the packages
