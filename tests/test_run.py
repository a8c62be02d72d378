"""A run's folder: kills, second starts, what is made again after a change, and the user's own files in it."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import data
import encoders
import losses
import magtkd
from data import read_iemocap
from extras import report
from extras.demo import write_iemocap

PROJECT = Path(__file__).parent.parent
FUSIONS = ["Concat-T+A_KD+V-seed0", "MAGT-T+A_KD+V-seed0"]
code_digest = magtkd.code_digest


class Place(NamedTuple):
    """A corpus, and beside it a run on it."""

    corpus: Path
    out: Path
    models: Path

    def options(self, *more) -> list[str]:
        options = ["iemocap", "--root", self.corpus, "--out", self.out, "--seeds", 1, "--device", "cpu", "--width", 64]
        options += ["--stage1-epochs", 2, "--stage2-epochs", 3, "--stage1-batch", 8, "--stage1-lr", 1.5e-3]
        options += [x for m in data.MODALITIES for x in (f"--{m}-model", self.models / m)]
        return [str(x) for x in (*options, *more)]

    def start(self, *more) -> int:
        return magtkd.main(self.options(*more))


def digits(out: Path) -> dict:
    """Scores, and every loss of stage 2 in full: they depend on all features."""
    results = {p.name: json.loads(p.read_bytes()) for p in (out / "fusion").glob("*.json")}
    found = {name: [r["predictions"], r["history"]] for name, r in results.items()}
    return found | json.loads((out / "metrics.json").read_text())["rows"]


def contents(folder: Path, *without: str) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name not in (".lock", *without)}


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A finished run. Tests work on copies."""
    folder = tmp_path_factory.mktemp("base")
    write_iemocap(folder / "corpus", seed=2, conversations=2, utterances=(2, 2))
    shutil.copytree(Path(tiny["text"]).parent, folder / "models")
    place = Place(folder / "corpus", folder / "run", folder / "models")
    with pytest.MonkeyPatch.context() as m:
        for name in ("confusion_figure", "loss_figure"):  # a fifth of the time; test_cli.py has them drawn
            m.setattr(report, name, lambda *args: None)
        m.setattr(magtkd, "code_digest", lambda *functions: "today's")  # whoever edits code while the tests run
        assert place.start() == 0
        yield place


@pytest.fixture
def place(base, tmp_path):
    """A copy of corpus and run, in another folder."""
    corpus, out = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (base.corpus, base.out))
    return Place(corpus, out, base.models)


@pytest.fixture
def new(base, tmp_path):
    """The same corpus, and no run yet; only its media are decoded."""
    shutil.copytree(base.out / "media", tmp_path / "media")
    return lambda name="new": base._replace(out=tmp_path / name)


def spy(monkeypatch, module, name: str, note) -> None:
    """Before each call of a function: `note` with its arguments."""
    real = getattr(module, name)

    def call(*args, **options):
        note(*args, **options)
        return real(*args, **options)

    monkeypatch.setattr(module, name, call)


def interrupt(monkeypatch, at: int, *names: tuple) -> None:
    """Ctrl-C at the n-th call of any of these functions, given as (module, name)."""
    calls = iter(range(1, at))

    def note(*args, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt

    for module, name in names:
        spy(monkeypatch, module, name, note)


@pytest.fixture
def trained(monkeypatch):
    """The names of all models that are trained, and of all utterances that are decoded."""
    names: list[str] = []
    spy(monkeypatch, magtkd, "train", lambda *args: names.append(args[5].name))
    spy(monkeypatch, encoders, "decode", lambda u, *args: names.append(u.id))
    return names


# Kills


def test_ten_interruptions_leave_the_digits_of_an_undisturbed_run(base, new, monkeypatch):
    rng, kills, run = random.Random(0), 0, new()
    while kills < 10:
        with monkeypatch.context() as m:
            interrupt(m, rng.randint(1, 24), (os, "replace"), (magtkd, "optimizer_step"), (magtkd, "append_line"))
            code = run.start("--media", base.out / "media")
        kills += code == 130
        if code == 0:
            assert digits(run.out) == digits(base.out)
            run = new(f"new{kills}")
    assert run.start("--media", base.out / "media") == 0
    assert digits(run.out) == digits(base.out)
    assert (run.out / "metrics.json").read_bytes() == (base.out / "metrics.json").read_bytes()


def test_a_killed_process(base, new, tmp_path):
    run = new()
    with open(tmp_path / "output.txt", "w") as f:
        command = [sys.executable, PROJECT / "magtkd.py", *run.options("--media", base.out / "media")]
        process = subprocess.Popen(command, stdout=f, stderr=f)
    while not list(run.out.glob("text.resume.pt")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (run.out / "log.jsonl").exists(), (tmp_path / "output.txt").read_text()
    assert not (run.out / "metrics.json").exists()
    (run.out / ".magtkd-0123-text.safetensors").write_bytes(b"half")  # as a kill during a write leaves it
    assert run.start("--media", base.out / "media") == 0 and digits(run.out) == digits(base.out)
    assert not list(run.out.rglob("*.resume.pt")) and not list(run.out.rglob(".magtkd-*"))


@pytest.mark.parametrize(
    "state, why", [(None, "damaged"), ([1], "damaged"), ({"key": "x"}, "of a training with other")]
)
def test_a_resume_file_that_does_not_fit_is_kept(state, why, base, place, capsys):
    path = place.out / "fusion" / f"{FUSIONS[1]}.resume.pt"
    path.with_name(f"{FUSIONS[1]}.json").unlink()
    torch.save(state, path) if state else path.write_bytes(b"nonsense")
    content = path.read_bytes()
    assert place.start() == 0 and digits(place.out) == digits(base.out)
    line = next(x for x in capsys.readouterr().out.splitlines() if f".resume.pt is {why}" in x)
    assert path.with_name(line.split()[-1]).read_bytes() == content


def test_a_stopped_fresh_start_resumes(base, place, trained, monkeypatch):
    with monkeypatch.context() as m:
        interrupt(m, 15, (magtkd, "optimizer_step"))
        assert place.start("--fresh") == 130
    assert trained == ["text", "audio"]
    assert place.start() == 0
    assert trained[2:] == ["audio", "video", "audio_kd", *FUSIONS] and digits(place.out) == digits(base.out)
    assert (place.out / "text.safetensors").read_bytes() != (base.out / "text.safetensors").read_bytes()  # its key


# Second starts


@pytest.mark.parametrize("what", ["unchanged", "copied elsewhere", "touched"])
def test_a_second_start_makes_nothing(what, base, place, trained):
    run = base if what == "unchanged" else place
    before = contents(run.out, "config.json", "media/index.jsonl")
    for path in [p for p in place.corpus.rglob("*") if what == "touched" and p.is_file()]:
        os.utime(path, ns=(1, 1))
    assert run.start() == 0 and not trained
    assert contents(run.out, "config.json", "media/index.jsonl") == before


def test_nothing_is_trained_twice(place, trained):
    for more in (["--modalities", "text"], [], ["--ablation"], [], ["--seeds", "2"], ["--seeds", "2", "--ablation"]):
        count = len(trained)
        assert place.start(*more) == 0
        assert more or len(trained) == count
    assert len(set(trained)) == len(trained) == 1 + 15 * 2 - 2  # V_KD; five sets, three models, two seeds, FUSIONS
    assert "video_kd" in trained and not set(FUSIONS) & set(trained)


def test_weights_that_were_removed_are_not_missed(base, place, trained):
    for name in ("text", "audio", "video"):
        (place.out / f"{name}.safetensors").unlink()
    assert place.start() == 0 and not trained and "older code" not in (place.out / "report.md").read_text()
    for path in place.out.glob("audio_kd.*"):  # it starts from the weights of audio
        path.unlink()
    assert place.start() == 0 and trained == ["audio", "audio_kd"] and digits(place.out) == digits(base.out)


def test_a_checkpoint_that_is_first_downloaded_then_cached(new, monkeypatch, trained):
    """Its hash is known only after the download: a second start must not take it for another checkpoint."""
    known: set[str] = set()
    spy(monkeypatch, encoders, "load_backbone", lambda name, option: known.add(name))
    monkeypatch.setattr(magtkd, "checkpoint_digest", lambda name: f"{name}@1" if name in known else None)
    for _ in range(2):
        assert new().start("--modalities", "text") == 0 and trained == ["text", "Concat-T-seed0", "MAGT-T-seed0"]
    known.clear()  # without a network: what was made before can still be used
    monkeypatch.setattr(encoders, "load_backbone", None)
    assert new().start("--modalities", "text") == 0 and len(trained) == 3


# Something changed


def relabel(place: Place, split: str) -> None:
    u = read_iemocap(place.corpus).utterances(split)[0]
    (path,) = place.corpus.glob(f"Session*/dialog/EmoEvaluation/{u.id.rpartition('_')[0]}.txt")
    old = list(data.IEMOCAP_LABELS)[u.label]
    path.write_text(path.read_text().replace(f"{u.id}\t{old}", f"{u.id}\t{'ang' if old == 'sad' else 'sad'}"))


def change_wav(place: Place) -> None:
    one, other = (u.audio for u in read_iemocap(place.corpus).utterances("train")[:2])
    shutil.copy(one, other)


def change_encoder(place: Place) -> None:
    path = place.models / "text" / "model.safetensors"
    save_file({name: x + 0.01 for name, x in load_file(path).items()}, path, {"format": "pt"})


CHANGES = {  # what to do, and which encoders are trained again
    "a label of train": (lambda place: relabel(place, "train"), ["text", "audio", "video", "audio_kd"]),
    "a label of test": (lambda place: relabel(place, "test"), []),
    "a wav of train": (change_wav, ["audio", "audio_kd"]),
    "the text encoder's folder": (change_encoder, ["text", "audio_kd"]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_after_a_change_the_digits_of_a_new_folder(what, base, place, trained, capsys, request):
    kept = contents(base.models)  # one for all: their path is an option
    request.addfinalizer(lambda: [(base.models / name).write_bytes(x) for name, x in kept.items()])
    change, again = CHANGES[what]
    change(place)
    assert place.start() == 0
    assert [name for name in trained if not name.startswith("Ses")] == [*again, *FUSIONS]  # Ses..: decoded
    text = capsys.readouterr().out
    for name in ["text", "audio", "video", "audio_kd"]:
        old, now = (p.joinpath(f"{name}.safetensors").read_bytes() for p in (base.out, place.out))
        second = [p.read_bytes() for p in place.out.glob(f"{name}.safetensors.*")]
        assert (second == [old] and now != old) if name in again else (now == old and not second)
        assert (f"{name}.safetensors: made from other" in text) == (name in again)
    for name in FUSIONS:
        assert f"{name}.json: made from other features; it is made again" in text
        (second,) = (place.out / "fusion").glob(f"{name}.json.*")
        assert second.read_bytes() == (base.out / "fusion" / f"{name}.json").read_bytes()
    fresh = place._replace(out=place.out.with_name("new"))
    assert fresh.start("--media", place.out / "media") == 0
    assert digits(fresh.out) == digits(place.out) != digits(base.out)


def test_after_the_code_was_edited_stage_2_only(base, place, trained, monkeypatch):
    monkeypatch.setattr(magtkd, "code_digest", lambda *functions: "other")
    assert place.start() == 0 and trained == FUSIONS and digits(place.out) == digits(base.out)
    assert "- audio_kd: its encoder was trained by older code than today's" in (place.out / "report.md").read_text()


def test_code_is_the_five_modules_and_what_else_is_trained(tmp_path, monkeypatch):
    (tmp_path / "extras").mkdir()
    for name in ("data", "encoders", "fusion", "losses", "magtkd", "extras/variants", "extras/report"):
        shutil.copy(PROJECT / f"{name}.py", tmp_path / f"{name}.py")
    (tmp_path / "mine.py").write_text("def model(config): return 1\n")
    monkeypatch.setattr(magtkd, "__file__", str(tmp_path / "magtkd.py"))
    monkeypatch.syspath_prepend(tmp_path)
    from mine import model

    before = code_digest(losses.stage2_loss), code_digest(model)
    for name, changes in (("extras/report", "00"), ("mine", "01"), ("fusion", "11"), ("extras/variants", "11")):
        (tmp_path / f"{name}.py").write_text((tmp_path / f"{name}.py").read_text() + "# edited\n")
        after = code_digest(losses.stage2_loss), code_digest(model)
        assert "".join(str(int(a != b)) for a, b in zip(after, before)) == changes, name
        before = after


# What is missing, damaged, or in the way


def test_what_is_missing_is_named_and_nothing_is_made(place, trained, capsys):
    before = contents(place.out, "config.json")
    for gone, words in (
        ("Session1/sentences/wav", "audio files are missing"),
        ("Session5/dialog/avi", "no video file for any utterance of test"),
        ("Session3/dialog/*/Ses03F_impro01.txt", "utterances are missing"),
        ("Session2", "Session2 missing"),
    ):
        for path in list(place.corpus.glob(gone)):
            path.rename(path.with_name("gone"))
        assert place.start() == 2 and words in capsys.readouterr().err and not trained
        for path in list(place.corpus.rglob("gone")):
            path.rename(path.with_name(gone.rpartition("/")[2]))
        assert contents(place.out, "config.json") == before


def test_a_file_that_cannot_be_read_is_not_made_again(place, trained, monkeypatch, capsys):
    def refuse(path, framework):
        raise PermissionError(13, "Permission denied", str(path))

    before = contents(place.out, "config.json")
    monkeypatch.setattr(magtkd, "safe_open", refuse)
    assert place.start() == 2 and not trained and contents(place.out, "config.json") == before
    assert "features.safetensors: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--fresh"]])
def test_the_users_files_survive(more, base, place):
    names = "notes.txt thesis/chapter1.txt fusion/x fusion/MAGT-T+A_KD+V-seed0.json media/audio/x.npy text.safetensors "
    names += "audio.features.safetensors features.safetensors figures/mine.png report.md"
    for name in names.split():
        (place.out / name).parent.mkdir(exist_ok=True)
        (place.out / name).write_text(f"mine: {name}")
    assert place.start(*more) == 0 and digits(place.out) == digits(base.out)
    for name in names.split():
        found = [p.read_bytes() for p in (place.out / name).parent.glob(f"{Path(name).name}*") if p.is_file()]
        assert f"mine: {name}".encode() in found, name


def test_a_folder_that_is_not_this_runs(base, place, tmp_path, trained, refused):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for more in ([], ["--fresh"]):
        assert "not of a run (thesis.txt)" in refused(*base._replace(out=tmp_path / "home").options(*more))
    assert contents(tmp_path / "home") == {"thesis.txt": b"years of work"}
    for out in ("/proc/run", "/dev/null/run", tmp_path / "home/thesis.txt", tmp_path / ("x" * 300)):
        assert str(out) in refused(*base._replace(out=out).options())
    for out in (base.corpus, base.corpus / "run", base.corpus.parent):
        assert "lie in each other" in refused(*base._replace(out=out).options())
    line = refused(*place.options("--alpha", "0"))
    assert "alpha: 0.7 there, 0.0 now" in line and "--fresh" in line and "--out" in line
    with FileLock(place.out / ".lock"):
        assert "another run is using this folder" in refused(*place.options())
    for content in ("", "{", "[]", "null", '{"program": "other"}', '{"program": "magtkd"}', "[" * 10**5):
        (place.out / magtkd.MARKER).write_text(content)
        assert magtkd.MARKER in refused(*place.options()) and magtkd.MARKER in refused(*place.options("--fresh"))
    assert not trained


def test_files_copied_over_others(base, place, trained):
    assert place.start("--seeds", 2) == 0
    expected, result = digits(place.out), "fusion/MAGT-T+A_KD+V-seed0"
    for source, name, again in (
        (f"{result}.json", "fusion/MAGT-T+A_KD+V-seed1.json", ["MAGT-T+A_KD+V-seed1"]),
        (f"{result}.safetensors", "fusion/MAGT-T+A_KD+V-seed1.safetensors", ["MAGT-T+A_KD+V-seed1"]),
        ("config.json", f"{result}.json", ["MAGT-T+A_KD+V-seed0"]),
        ("text.safetensors", "text.features.safetensors", []),
        ("audio.safetensors", "text.safetensors", ["text"]),
        ("audio.features.safetensors", "features.safetensors", []),
        ("config.json", "metrics.json", []),
    ):
        trained.clear()
        shutil.copy(place.out / source, place.out / name)
        assert place.start("--seeds", 2) == 0 and trained == again and digits(place.out) == expected


@pytest.mark.parametrize("what", ["a link", "a link to nothing", "a folder"])
@pytest.mark.parametrize("name", ["text.safetensors", f"fusion/{FUSIONS[1]}.json", "report.md", "fusion"])
def test_in_the_place_of_a_file(name, what, place, tmp_path, trained, capsys):
    path, other = place.out / name, tmp_path / "mine"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if what == "a folder":
        path.mkdir() if name != "fusion" else path.write_text("a file where a folder belongs")
    else:
        path.symlink_to(other)
        other.write_text("mine") if what == "a link" else None
    (place.out / "text.features.safetensors").unlink()  # so that there is something to do
    assert place.start() == 2 and name in capsys.readouterr().err and not {"text", FUSIONS[1]} & set(trained)
    assert other.exists() == (what == "a link") and (what != "a link" or other.read_text() == "mine")
