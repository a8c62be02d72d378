"""The command line, whole: a run from raw files to a report, a second start, and what a user may do wrong."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_features import example

import encoders
import losses
import magtkd
from data import read_iemocap, write_features
from extras import cli, runs
from extras.features import read_features

PROJECT = Path(__file__).parent.parent
SHORT = ["--stage1-epochs", "1", "--stage2-epochs", "2", "--encoders", "tiny", "--workers", "2"]


def run_sh(*arguments, **changes):
    """bash run.sh, in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
    command = ["bash", PROJECT / "run.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **changes)


@pytest.fixture(scope="module")
def meld_run(meld, tmp_path_factory):
    """A whole run, ablation included, on MELD's layout with a corrupt and a missing clip in it."""
    out = tmp_path_factory.mktemp("runs") / "meld"
    options = ["meld", "--root", str(meld), "--out", str(out), "--seeds", "2", *SHORT]
    assert magtkd.main([*options, "--ablation"]) == 0
    return options, out


def test_a_whole_run_leaves_its_files(meld_run):
    _, out = meld_run
    for name in ("config.json", "features.safetensors", "fusion.safetensors", "metrics.json", "report.md", "log.jsonl"):
        assert (out / name).stat().st_size > 0, name
    for name in magtkd.TABLE_NAMES:
        assert (out / f"{name}.safetensors").exists() and (out / f"{name}.features.safetensors").exists()
    assert {p.name for p in (out / "figures").iterdir()} == {"confusion.png", "losses.png", "gates.png", "tsne.png"}
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.resume.pt"))

    metrics = json.loads((out / "metrics.json").read_text())
    alone = ["T", "A", "V", "A_KD", "V_KD"]
    sets = ["T+A+V", "T+A+V_KD", "T+A_KD+V", "T+A_KD+V_KD"]
    fused = [f"{fusion} {s}" for fusion in ("Concat", "Context", "MAGT") for s in sets]
    assert list(metrics["rows"]) == [*alone, *fused]
    for name, row in metrics["rows"].items():
        assert len(row["seeds"]) == (1 if name in alone else 2)
        assert 0 <= row["weighted_f1"]["mean"] <= 100
    assert not metrics["made_up"]  # it was read as the real one


def test_broken_media_are_listed_and_their_features_missing(meld_run, meld):
    _, out = meld_run
    problems = json.loads((out / "metrics.json").read_text())["problems"]
    assert "dev_dia0_utt1: audio missing" in problems and "dev_dia0_utt1: video missing" in problems
    assert any(p.startswith("train_dia0_utt1: video broken") for p in problems)
    file = read_features(out / "features.safetensors")
    row = file.utterance_names.index("train_dia0_utt1")
    assert not file.present["video"][row] and not file.features["video"][row].any()
    assert file.present["text"].all()
    report = (out / "report.md").read_text()
    assert all(f"- {p}\n" in report for p in problems)
    assert "1 utterances without a clip" in report


def test_the_report_shows_the_papers_figures(meld_run):
    _, out = meld_run
    report = (out / "report.md").read_text()
    assert "| model | accuracy | W-F1 | M-F1 | W-F1, test-selected | paper: accuracy | paper: W-F1 |" in report
    line = next(line for line in report.splitlines() if line.startswith("| MAGT T+A_KD+V |"))
    assert line.endswith("| 66.36 | 65.32 |") and " ± " in line
    assert "made up" not in report


def test_a_second_start_computes_nothing(meld_run, monkeypatch, capsys):
    options, out = meld_run
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.features.safetensors")}
    metrics = (out / "metrics.json").read_bytes()
    for module, name in ((magtkd, "train"), (magtkd, "encode"), (encoders, "decode")):
        monkeypatch.setattr(module, name, None)  # to call it would fail
    for more in (["--ablation"], []):  # what the report holds of an ablation stays there
        assert magtkd.main([*options, *more]) == 0
        assert {p: p.stat().st_mtime_ns for p in before} == before
        assert (out / "metrics.json").read_bytes() == metrics
    assert "| MAGT T+A_KD+V |" in capsys.readouterr().out


def test_another_configuration_is_refused(meld_run, capsys):
    options, out = meld_run
    assert magtkd.main([*options, "--alpha", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "alpha: 0.01 there, 0.5 now" in error and "--fresh" in error and "Traceback" not in error
    assert (out / "metrics.json").exists()


def test_a_second_run_in_the_same_folder_is_refused(meld_run, capsys):
    options, out = meld_run
    lock = runs.lock_folder(out)
    assert magtkd.main(options) == 2
    lock.close()
    assert "another run is at work in this folder" in capsys.readouterr().err


def test_same_seed_same_metrics_and_fresh_starts_anew(iemocap, tmp_path, capsys):
    """Twice on IEMOCAP's layout, the second time in another process and over what was there: not a digit differs."""
    options = ["iemocap", "--root", str(iemocap), "--out", str(tmp_path / "run"), "--seeds", "1", *SHORT]
    assert magtkd.main(options) == 0
    assert "5 turns labelled xxx, sur, fea, dis or oth, dropped" in capsys.readouterr().out
    first = (tmp_path / "run" / "metrics.json").read_bytes()
    for name in ("sweep.md", "notes.txt"):  # the one is a run's, the other the user's
        (tmp_path / "run" / name).touch()
    done = run_sh(*options, "--fresh")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.json").read_bytes() == first
    assert not (tmp_path / "run" / "sweep.md").exists() and (tmp_path / "run" / "notes.txt").exists()
    problems = json.loads(first)["problems"]
    assert {p.split(": ")[1].split()[0] for p in problems} == {"audio"} and len(problems) == 3


# Stage 2 on a feature file of one's own


@pytest.fixture
def feature_file(tmp_path):
    write_features(tmp_path / "mine.safetensors", example())
    return tmp_path / "mine.safetensors"


def test_features_of_ones_own(feature_file, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["iemocap", "--features", str(feature_file), "--out", str(out), "--seeds", "2", *SHORT]
    assert magtkd.main(options) == 0
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    assert list(rows) == ["Concat T+A_KD", "MAGT T+A_KD"]
    assert "paper" not in (out / "report.md").read_text().split("##")[1]
    for preset in ("paper", "released"):
        assert magtkd.main([*options, "--fresh", "--preset", preset, "--ablation"]) == 0
    weights = load_file(out / "fusion.safetensors")
    assert weights["classifier.text.weight"].shape == (3, 64)  # a checkpoint of the released preset


def test_a_class_absent_from_dev_and_conversations_of_one(tmp_path):
    file = example()
    file.label[3:5] = 0
    file.conversation = torch.arange(7)
    file.conversation_names = [f"c{i}" for i in range(7)]
    write_features(tmp_path / "f.safetensors", file)
    options = ["meld", "--features", str(tmp_path / "f.safetensors"), "--out", str(tmp_path / "run"), *SHORT]
    assert magtkd.main(options) == 0


# What a user may do wrong


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("corpus, what", [("iemocap", "Session1"), ("meld", "train_sent_emo.csv")])
def test_no_corpus(corpus, what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert magtkd.main([corpus]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("\n") == 1
    assert all(words in error for words in (what, "--root", "bash run.sh demo", "data/"))
    assert not (tmp_path / "runs").exists()


def test_a_corpus_without_clips(meld, tmp_path, capsys):
    (tmp_path / "meld").mkdir()
    for table in meld.rglob("*_sent_emo.csv"):
        (tmp_path / "meld" / table.name).write_bytes(table.read_bytes())
    assert magtkd.main(["meld", "--root", str(tmp_path / "meld"), "--out", str(tmp_path / "run")]) == 2
    assert "no audio file for any utterance of train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_feature_file_that_is_not_there(tmp_path, capsys):
    assert magtkd.main(["iemocap", "--features", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 2
    assert "no such file; --features wants a feature file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there(iemocap, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["iemocap", "--root", str(iemocap), "--out", str(tmp_path / "run"), "--video-model", "no-such/model"]
    assert magtkd.main(options) == 2
    error = capsys.readouterr().err
    assert "no-such/model" in error and "--video-model DIR" in error and "Traceback" not in error


def test_fresh_empties_runs_alone(feature_file, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    options = ["iemocap", "--features", str(feature_file), "--out", str(tmp_path / "home"), "--fresh", *SHORT]
    assert magtkd.main(options) == 2
    assert "holds files that are not of a run" in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_a_checkpoint_of_another_program(iemocap, tmp_path, monkeypatch, capsys):
    options = ["iemocap", "--root", str(iemocap), "--out", str(tmp_path / "run"), *SHORT]
    with monkeypatch.context() as m:
        m.setattr(magtkd, "train", stop)
        assert magtkd.main(options) == 130
    (tmp_path / "run" / "text.resume.pt").write_bytes(b"nonsense")
    assert magtkd.main(options) == 2
    error = capsys.readouterr().err
    assert "text.resume.pt: not a checkpoint of this model" in error and "--fresh" in error


def test_a_full_disk(feature_file, tmp_path, monkeypatch, capsys):
    """/dev/full answers every write with "no space left on device"."""
    monkeypatch.setattr(magtkd, "save_model", lambda *_: Path("/dev/full").write_text("weights"))
    out = tmp_path / "run"
    assert magtkd.main(["iemocap", "--features", str(feature_file), "--out", str(out), *SHORT]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "--out" in error and "What is whole stays" in error
    assert not list(out.rglob("*.part")) and not (out / "fusion.safetensors").exists()


@pytest.mark.parametrize(
    "size", [100, 10_000]
)  # bytes; the first file of a run is longer than 100, weights than 10,000
def test_files_may_not_grow(feature_file, tmp_path, capsys, size):
    """As on a full disk, by a limit of this process: one line says so, and half a file stays nowhere."""
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        code = magtkd.main(["iemocap", "--features", str(feature_file), "--out", str(out), *SHORT])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "What is whole stays" in error and str(out) in error, error
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written(feature_file, capsys):
    for out in ("/proc/run", "/dev/null/run"):
        assert magtkd.main(["iemocap", "--features", str(feature_file), "--out", out, *SHORT]) == 2
        assert "--out" in capsys.readouterr().err


def test_ctrl_c_loses_nothing(iemocap, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said"
    command = [sys.executable, str(PROJECT / "magtkd.py"), "iemocap", "--root", str(iemocap), "--out", str(out)]
    command += [*SHORT, "--stage1-epochs", "1000"]
    with open(said, "w") as f:  # a shell's background jobs ignore SIGINT
        as_usual = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, **as_usual)
    try:
        deadline = time.monotonic() + 300
        while not (out / "text.resume.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    assert "Traceback" not in said.read_text() and "stopped" in said.read_text()
    assert (out / "text.resume.pt").exists() and list((out / "media").rglob("*.npy"))


def test_a_loss_that_is_no_number(iemocap, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses, "cross_entropy", lambda logits, *_: logits.sum() * torch.nan)
    options = ["iemocap", "--root", str(iemocap), "--out", str(tmp_path / "run"), *SHORT]
    assert magtkd.main(options) == 2
    error = capsys.readouterr().err
    train = [u.id for u in read_iemocap(iemocap).utterances("train")]
    assert "no longer a number, first in step 0" in error and sum(i in error for i in train) >= 8


@pytest.mark.parametrize(
    "options",
    [
        ["demo", "--root", "x"],
        ["demo", "--seeds", "0"],
        ["demo", "--sweep", "-1"],
        ["demo", "--device", "cuda"],
        ["nothing"],
        [],
    ],
)
def test_options_that_do_not_fit(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as e:
        magtkd.main(options)
    assert e.value.code == 2


def test_out_of_memory_names_the_switch(feature_file, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cli, "run_stage2", full)
    assert magtkd.main(["iemocap", "--features", str(feature_file), "--out", str(tmp_path / "run")]) == 2
    assert "--gradient-checkpointing" in capsys.readouterr().err


# run.sh


def test_run_sh_names_its_commands():
    done = run_sh()
    assert done.returncode == 2
    commands = {line.split()[2] for line in done.stdout.splitlines() if line.startswith("bash run.sh")}
    assert commands == {"demo", "iemocap", "test", "predict", "tour", "gpu"} and "bench" in done.stdout


def test_run_sh_hands_over(tmp_path):
    """From any folder; options, exit code and words are those of magtkd.py."""
    done = run_sh("meld", "--root", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "no complete MELD at nowhere" in done.stderr
