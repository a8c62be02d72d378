"""The command line: every option, whole runs on each kind of input, errors and exit codes, run.sh."""

import dataclasses
import errno
import json
import os
import re
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


@pytest.mark.parametrize("f", dataclasses.fields(Config), ids=lambda f: f.name)
def test_each_option_sets_its_field(f):
    name, low, high = f"--{f.name.replace('_', '-')}", f.metadata["low"], f.metadata["high"]
    if f.type is bool:
        cases = {name: True, f"--no-{name[2:]}": False}
    elif f.name == "modalities":
        cases = {f"{name}=text,video": ("text", "video")}
    elif low is None:
        cases = {f"{name}={x}": x for x in f.metadata["choices"] or ["some/model"]}
    elif isinstance(default := getattr(CONFIGS["meld"], f.name), dict):
        cases = {f"{name}=text={low},audio={high}": default | {"text": low, "audio": high}}
        cases[f"{name}={high}"] = magtkd.each(high)
    else:
        cases = {f"{name}={x}": x for x in (low, high)}
    for written, expected in cases.items():
        assert parse(["meld", written])[1] == dataclasses.replace(CONFIGS["meld"], **{f.name: expected})
    for wrong in (low - 1, high * 2, "nan", "", "9" * 5000) if low is not None else ():
        with pytest.raises(SystemExit, match="2"):
            parse(["meld", f"{name}={wrong}"])


WRONG = """invalid choice: nothing
--root belongs to: demo --root x
--check reads a corpus: demo --check
wants a whole number: demo --stage1-epochs text=1.5
multiple of 8: demo --width 100
text=X,audio=X,video=X: demo --stage1-lr text=1,words=2
wants text, or text with: demo --modalities audio
use cpu: demo --device gpu
add --encoders full: demo --text-model some/model
none.safetensors: iemocap --features none.safetensors
Session1: iemocap --root nowhere"""


def test_what_cannot_be_done_is_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in WRONG.splitlines():
        words, _, options = line.partition(":")
        assert words in refused(*options.split()) and not list(tmp_path.iterdir()), line


def test_meld(meld, tmp_path, capsys):
    """With an ablation, two seeds, weights of 0, a corrupt and a missing file."""
    out = tmp_path / "run"
    assert start("meld", "--root", meld, "--out", out, "--seeds", 2, "--ablation", "--alpha", 0) == 0
    metrics, report = json.loads((out / "metrics.json").read_text()), (out / "report.md").read_text()
    sets = ["T", "T+A+V", "T+A+V_KD", "T+A_KD+V", "T+A_KD+V_KD"]
    fused = [f"{fusion} {s}" for fusion in ("Concat", "Context", "MAGT") for s in sets]
    assert list(metrics["rows"]) == ["T", "A", "V", "A_KD", "V_KD", *fused]
    assert [len(row["seeds"]) for row in metrics["rows"].values()] == [1] * 5 + [2] * 15
    history = json.loads((out / "fusion/MAGT-T+A_KD+V-seed1.json").read_text())["history"][-1]["train"]
    assert history["kd_audio"] > 0 and history["loss"] == pytest.approx(history["l_ce"] + 0.09 * history["kd_video"])
    row = next(x for x in report.splitlines() if x.startswith("| MAGT T+A_KD+V |"))
    assert row.endswith("| 66.36 | 65.32 |") and " ± " in row  # the paper's
    assert row in capsys.readouterr().out and not metrics["synthetic"] and ", alpha 0.0, corpus meld" in report
    problems = metrics["problems"]
    assert "dev_dia0_utt1: audio missing" in problems and "dev_dia0_utt1: video missing" in problems
    assert any(p.startswith("train_dia0_utt1: video broken") for p in problems)
    assert all(f"- {p}\n" in report for p in problems)
    file = read_features(out / "features.safetensors")
    at = file.utterance_names.index("train_dia0_utt1")
    assert file.present["text"].all() and not file.present["video"][at] and not file.features["video"][at].any()
    figures = {p.name for p in (out / "figures").iterdir()}
    assert figures == {"confusion.png", "losses.png", "gates.png", "tsne.png"}
    assert (out / metrics["weights"]).stat().st_mode & 0o777 == out.stat().st_mode & 0o666


def test_a_csv_gives_the_digits_of_the_corpus(tmp_path, capsys):
    root, results = tmp_path / "corpus", []
    write_iemocap(root, seed=3, conversations=2, utterances=(4, 5))
    write_as_csv(tmp_path / "mine.csv", read_iemocap(root))
    for name, path in (("iemocap", root), ("csv", tmp_path / "mine.csv")):
        assert start(name, "--root", path, "--out", tmp_path / name, "--seeds", 1) == 0
        rows = json.loads((tmp_path / name / "metrics.json").read_text())["rows"]
        fused = json.loads((tmp_path / name / "fusion/MAGT-T+A_KD+V-seed0.json").read_text())
        results.append([rows, fused["history"], fused["predictions"]])
    assert results[0] == results[1]
    header, _, rest = (tmp_path / "mine.csv").read_text().split("\n", 2)
    (tmp_path / "mine.csv").write_text(f"{header}\n{rest}")  # refused, and the tiny encoders are kept
    assert start("csv", "--root", tmp_path / "mine.csv", "--out", tmp_path / "csv", "--seeds", 1) == 2
    assert [path.name for path in (tmp_path / "csv").glob("tiny*")] == ["tiny"]
    for path in root.rglob("*.wav"):
        path.unlink()
    more = ["iemocap", "--root", root, "--out", tmp_path / "text", "--seeds", 1]
    assert start(*more) == 2 and "no audio file for any utterance of train" in capsys.readouterr().err
    assert start(*more, "--modalities", "text") == 0
    assert list(json.loads((tmp_path / "text/metrics.json").read_text())["rows"]) == ["T", "Concat T", "MAGT T"]


def test_your_own_features(tmp_path, refused):
    write_features(tmp_path / "f.safetensors", example())
    out, more = tmp_path / "run", ["--features", tmp_path / "f.safetensors", "--preset", "released", "--causal"]
    assert start("iemocap", "--out", out, *more) == 0
    assert list(json.loads((out / "metrics.json").read_text())["rows"]) == ["Concat T+A_KD", "MAGT T+A_KD"]
    assert "paper:" not in (out / "report.md").read_text()
    parts = json.loads((out / "fusion/MAGT-T+A_KD-seed0.json").read_text())["made_from"]
    assert parts["model"][0] == "ReleasedMAGT" and "causal=True" in parts["model"][1]
    assert "has no video" in refused("iemocap", "--out", tmp_path / "x", *more, "--modalities", "text,video")


def test_an_error_is_one_line(capsys):
    for error, code, words in (
        (InputError("x.csv: bad\x1b[31m"), 2, "p: x.csv: bad\\x1b[31m\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "--gradient-checkpointing"),
        (FileExistsError(errno.EEXIST, "File exists", "figures"), 2, "p: figures: File exists"),
        (KeyboardInterrupt(), 130, "\nstopped"),
    ):
        assert run_command("p", Mock(side_effect=error)) == code
        assert words in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a bug: Python prints its traceback, and exits with 1
        run_command("p", lambda: 1 / 0)
    for path in [*PROJECT.glob("*.py"), *PROJECT.glob("extras/*.py")]:  # for python -OO
        assert not re.search(r"^ *assert |__doc__", path.read_text(), re.MULTILINE), path


SCRIPT = """
import os, sys
from magtkd import run_command
closed, pipe = os.pipe()
os.close(closed)
for target in (pipe, os.open("/dev/full", os.O_WRONLY)):
    for flush in (False, True):
        if (pid := os.fork()) == 0:
            os.dup2(target, 1)
            sys.exit(run_command("p", lambda: print("a \\ud800", flush=flush)))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_closed_pipe_and_a_full_disk():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.split() == ["141", "141", "2", "2"] and "Traceback" not in done.stderr
    assert done.stderr.count("p: output: No space left on device. What is complete is kept\n") == 2


@pytest.mark.parametrize(
    "command, code, words",
    [("meld --root nowhere", 2, "MELD at nowhere"), ("predict --help", 0, "--stream"), ("x", 2, "no command 'x'")],
)
def test_run_sh(command, code, words, tmp_path):
    """Through a link, in a path with ":" and a blank, with CDPATH set, from a folder with hostile files."""
    project, work = tmp_path / "a: b" / "code", tmp_path / "work"
    (work / "extras").mkdir(parents=True)
    shutil.copytree(PROJECT / "extras", project / "extras")
    for path in [*PROJECT.glob("*.py"), PROJECT / "run.sh", PROJECT / "requirements.txt"]:
        shutil.copy(path, project)
    for name in ("data", "random", "re", "losses", "extras/__init__", "extras/predict"):
        (work / f"{name}.py").write_text("raise SystemExit('hostile')")
    (tmp_path / "link.sh").symlink_to("a: b/code/run.sh")
    python = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHON": ""}
    how = {"cwd": work, "env": os.environ | python | {"CDPATH": str(project.parent), "PIP_NO_INDEX": "1"}}
    done = subprocess.run(["bash", "../link.sh", *command.split()], capture_output=True, text=True, **how)
    assert done.returncode == code and words in done.stdout + done.stderr, done.stderr
    assert not (project / ".venv").exists()  # this Python has the packages
