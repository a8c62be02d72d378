"""A GPU that cannot be used, and encoders too large for a CPU: said before the run. And run.sh with a Python of one's
own."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from extras import machine

PROJECT = Path(__file__).parent.parent
VERSION_FILES = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 2021\nGCC version: 9": "470.82.01",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)": "580.65.06",
}


@pytest.mark.parametrize("text", VERSION_FILES)
def test_the_drivers_version_is_read_from_its_file(text, tmp_path):
    (tmp_path / "version").write_text(text)
    assert machine.driver_version(tmp_path / "version") == VERSION_FILES[text]


@pytest.mark.parametrize("said, number", [("535.183.01\n535.183.01\n", "535.183.01"), ("NVIDIA-SMI has failed", None)])
def test_or_from_nvidia_smi(said, number, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.driver_version(tmp_path / "missing") == number


def test_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver_version(tmp_path / "missing") is None


@pytest.fixture
def gpu_here(monkeypatch):
    """A machine with a driver, on which torch finds no CUDA."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def make(driver: str | None, cuda: str | None) -> None:
        monkeypatch.setattr(machine, "driver_version", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return make


@pytest.mark.parametrize(
    "driver, cuda, words",
    [
        ("470.82.01", "13.0", ["driver 470.82.01", "CUDA 13.0", "driver 580 or newer", "PYTHON=/path/to/python"]),
        ("580.65.06", None, ["driver 580.65.06", "build without CUDA", "PYTHON=/path/to/python"]),
        ("580.65.06", "13.0", ["should run", "nvidia-smi", "/dev/nvidia0"]),
    ],
)
def test_a_useless_gpu_is_said_in_one_line(driver, cuda, words, gpu_here, capsys):
    gpu_here(driver, cuda)
    assert machine.choose(None) == "cpu"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in [*words, "--device cpu"]), said


def test_nothing_is_said_where_nothing_is_wrong(gpu_here, capsys, monkeypatch):
    gpu_here(None, "13.0")
    assert machine.choose(None) == "cpu"  # no GPU at all
    gpu_here("470.82.01", "13.0")
    assert machine.choose("cpu") == "cpu"  # meant
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.choose(None) == "cpu"  # hidden by the user
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.choose(None) == "cuda" and machine.choose("cuda:1") == "cuda:1"
    assert capsys.readouterr().err == ""


def test_days_are_said_first_and_estimated_from_the_first_steps(monkeypatch):
    lines, clock = [], iter(range(0, 1000, 60))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    machine.warn_of_days(["text", "audio_kd"], 12_910, lines.append)
    assert len(lines) == 1 and "2 x 12,910" in lines[0] and "--device cpu" in lines[0]
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    for step in range(1, 9):
        weight.grad = torch.ones(1)
        optimizer.step()
        assert len(lines) == (1 if step < 1 + machine.WATCHED else 2)
    # 12,910 steps of 60 s: 215.2 hours
    assert lines[1].startswith("text: 60.0 s a step, 12,910 steps: about 9.0 days") and "1 more follow" in lines[1]


def test_nothing_to_train_is_no_warning():
    lines = []
    machine.warn_of_days([], 10, lines.append)
    assert lines == []


# run.sh


@pytest.fixture
def script(tmp_path):
    """run.sh in a folder of its own, with a requirement that nobody has."""
    shutil.copy(PROJECT / "run.sh", tmp_path)
    pins = f"torch=={version('torch').split('+')[0]}\nno-such-package==1.0\npytest==0.1\n"
    (tmp_path / "requirements.txt").write_text(pins)
    (tmp_path / "magtkd.py").write_text("import sys; print('ran', sys.executable, sys.argv[1:])")
    (tmp_path / "extras").mkdir()
    for name in ("predict", "tour"):
        (tmp_path / "extras" / f"{name}.py").write_text(f"import sys; print({name!r}, sys.argv[1:])")
    return tmp_path


def start(script, *arguments, **environment):
    command = ["bash", str(script / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=script)


def test_a_python_of_ones_own_is_taken_as_it_is(script):
    done = start(script, "demo", "--seeds", "1", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"ran {sys.executable} ['demo', '--seeds', '1']"
    assert f"torch {version('torch')}," in done.stderr and "Python 3." in done.stderr
    assert "missing: no-such-package" in done.stderr
    assert f"pytest {pytest.__version__} (pinned: 0.1)" in done.stderr
    assert not (script / ".venv").exists()


def test_by_a_relative_path(script):
    (script / "python").symlink_to(sys.executable)
    (script / "tests").mkdir()
    (script / "bench").mkdir()
    done = start(script, "test", "--version", PYTHON="./python")  # it changes the folder first
    assert done.stdout.startswith("pytest") or "pytest" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("name", ["predict", "tour"])
def test_the_other_programs(script, name):
    done = start(script, name, "--run", "x", PYTHON=sys.executable)
    assert done.stdout.strip() == f"{name} ['--run', 'x']", done.stderr


def test_a_python_that_is_none(script):
    done = start(script, "demo", PYTHON=str(script / "python"))
    assert done.returncode == 2 and "PYTHON" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not (script / ".venv").exists()
