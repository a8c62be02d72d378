"""The command line, whole: a run from raw files to a report, a second start, and what a user may do wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_features import example

import magtkd
import stage1
import stage2
from data import read_iemocap
from features import read_features, write_features
from media import MediaStore

PROJECT = Path(__file__).parent.parent
SHORT = ["--stage1-epochs", "1", "--stage2-epochs", "2", "--encoders", "tiny", "--workers", "2"]


def run(*arguments, **changes):
    """magtkd.py in a process of its own: (exit code, stdout, stderr)."""
    command = [sys.executable, str(PROJECT / "magtkd.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **changes)
    return done.returncode, done.stdout, done.stderr


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
    for name in stage2.ROWS:
        assert (out / f"{name}.safetensors").exists() and (out / f"{name}.vectors.safetensors").exists()
    assert {p.name for p in (out / "figures").iterdir()} == {"confusion.png", "losses.png", "gates.png", "tsne.png"}
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.resume.pt"))

    metrics = json.loads((out / "metrics.json").read_text())
    encoders = list(stage2.ROWS.values())
    sets = ["T+A+V", "T+A+V_KD", "T+A_KD+V", "T+A_KD+V_KD"]
    assert list(metrics["rows"]) == [*encoders, *(f"{f} {s}" for f in stage2.FUSIONS for s in sets)]
    for name, row in metrics["rows"].items():
        assert len(row["seeds"]) == (1 if name in encoders else 2)
        assert 0 <= row["weighted_f1"]["mean"] <= 100
    assert not metrics["made_up"]  # it was read as the real one


def test_broken_media_are_listed_and_their_vectors_missing(meld_run, meld):
    _, out = meld_run
    problems = json.loads((out / "metrics.json").read_text())["problems"]
    assert "dev_dia0_utt1: sound missing" in problems and "dev_dia0_utt1: picture missing" in problems
    assert any(p.startswith("train_dia0_utt1: picture broken") for p in problems)
    features = read_features(out / "features.safetensors")
    row = features.utterance_names.index("train_dia0_utt1")
    assert not features.present["video"][row] and not features.vectors["video"][row].any()
    assert features.present["text"].all()
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
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.vectors.safetensors")}
    metrics = (out / "metrics.json").read_bytes()
    for module, name in ((stage1, "train_encoder"), (stage2, "fusion_losses"), (MediaStore, "_decode")):
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


def test_a_second_run_in_the_same_folder_is_refused(meld_run):
    import checkpoint

    options, out = meld_run
    lock = checkpoint.open_run(out, json.loads((out / "config.json").read_text()), fresh=False)
    code, _, error = run(*options)
    lock.close()
    assert code == 2 and "another run is at work in this folder" in error


def test_same_seed_same_metrics_and_fresh_starts_anew(iemocap, tmp_path):
    """Twice on IEMOCAP's layout, once over what was there: the metrics agree to the last digit."""
    options = ["iemocap", "--root", iemocap, "--out", tmp_path / "run", "--seeds", "1", *SHORT]
    code, printed, error = run(*options)
    assert code == 0, error
    assert "5 turns labelled xxx, sur, fea, dis or oth, dropped" in printed
    first = (tmp_path / "run" / "metrics.json").read_bytes()
    (tmp_path / "run" / "old").touch()
    code, _, error = run(*options, "--fresh")
    assert code == 0, error
    assert (tmp_path / "run" / "metrics.json").read_bytes() == first
    assert not (tmp_path / "run" / "old").exists()
    problems = json.loads(first)["problems"]
    assert {p.split(": ")[1].split()[0] for p in problems} == {"sound"} and len(problems) == 3


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


def test_a_speaker_never_seen_in_training():
    data = stage2.Conversations(example(), ("text", "audio_kd"), torch.device("cpu"))
    batch = data.batch([1, 3])
    _, speakers, mask, present, places = batch.inputs
    assert speakers.tolist() == [[0, -1], [0, -1]]  # padding; and Eve, who speaks in test alone
    assert mask.tolist() == [[True, False], [True, True]]
    assert present["audio"].tolist() == [[False, False], [True, True]]
    assert batch.labels[mask].tolist() == [2, 2, 0]
    assert places.tolist() == [0, 2, 3] and batch.places["audio"].tolist() == [2, 3]


def test_a_class_absent_from_dev_and_conversations_of_one(tmp_path):
    features = example()
    features.label[3:5] = 0
    features.conversation = torch.arange(7)
    features.conversation_names = [f"c{i}" for i in range(7)]
    write_features(tmp_path / "f.safetensors", features)
    options = ["meld", "--features", str(tmp_path / "f.safetensors"), "--out", str(tmp_path / "run"), *SHORT]
    assert magtkd.main(options) == 0


# What a user may do wrong


@pytest.mark.parametrize("corpus, what", [("iemocap", "Session1"), ("meld", "train_sent_emo.csv")])
def test_no_corpus(corpus, what, tmp_path):
    code, _, error = run(corpus, cwd=tmp_path)
    assert code == 2 and "Traceback" not in error and error.count("\n") == 1
    assert all(words in error for words in (what, "--root", "bash run.sh demo", "data/"))
    assert not (tmp_path / "runs").exists()


def test_a_corpus_without_clips(meld, tmp_path, capsys):
    for table in meld.rglob("*_sent_emo.csv"):
        (tmp_path / table.name).write_bytes(table.read_bytes())
    assert magtkd.main(["meld", "--root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "no audio file for any utterance of train" in capsys.readouterr().err


def test_a_feature_file_that_is_not_there(tmp_path, capsys):
    assert magtkd.main(["iemocap", "--features", str(tmp_path / "none"), "--out", str(tmp_path / "run")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there(iemocap, tmp_path):
    code, _, error = run("iemocap", "--root", iemocap, "--out", tmp_path / "run", "--video-model", "no-such/model")
    assert code == 2 and "Traceback" not in error
    assert "no-such/model" in error and "--video-model DIR" in error


def test_fresh_empties_runs_alone(feature_file, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    options = ["iemocap", "--features", str(feature_file), "--out", str(tmp_path / "home"), "--fresh", *SHORT]
    assert magtkd.main(options) == 2
    assert "not the folder of a run" in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_a_checkpoint_of_another_program(iemocap, tmp_path, capsys):
    options = ["iemocap", "--root", str(iemocap), "--out", str(tmp_path / "run"), *SHORT]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "text.resume.pt").write_bytes(b"nonsense")
    assert magtkd.main(options) == 2
    error = capsys.readouterr().err
    assert "text.resume.pt: not a checkpoint of this program" in error and "--fresh" in error


def test_a_full_disk(feature_file, tmp_path):
    """/dev/full answers every write with "no space left on device"."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json.part").symlink_to("/dev/full")
    code, _, error = run("iemocap", "--features", feature_file, "--out", out, *SHORT)
    assert code == 2 and "No space left on device" in error and "--out" in error and "Traceback" not in error


def test_a_folder_that_cannot_be_written(feature_file, capsys):
    for out in ("/proc/run", "/dev/null/run"):
        assert magtkd.main(["iemocap", "--features", str(feature_file), "--out", out, *SHORT]) == 2
        assert "--out" in capsys.readouterr().err


def test_ctrl_c_loses_nothing(iemocap, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, str(PROJECT / "magtkd.py"), "iemocap", "--root", str(iemocap), "--out", str(out)]
    command += [*SHORT, "--stage1-epochs", "1000"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while not (out / "text.resume.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error and "stopped" in error
    assert (out / "text.resume.pt").exists() and (out / "media" / "index.jsonl").exists()


def test_a_loss_that_is_no_number(iemocap, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage1, "stage1_loss", lambda logits, *_, **__: logits.sum() * torch.nan)
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

    monkeypatch.setattr(magtkd, "run_stage2", full)
    assert magtkd.main(["iemocap", "--features", str(feature_file), "--out", str(tmp_path / "run")]) == 2
    assert "--gradient-checkpointing" in capsys.readouterr().err
