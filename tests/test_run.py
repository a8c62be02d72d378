"""A run's folder: kills, second starts, what is made again after a change, and the user's own files in it."""

import json
import os
import random
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import data
import encoders
import magtkd
from extras import report
from extras.demo import write_iemocap

FUSIONS = ["Concat-T+A_KD+V-seed0", "MAGT-T+A_KD+V-seed0"]
OPTIONS = "iemocap --root corpus --out run --seeds 1 --device cpu --width 64 --stage1-epochs 2 --stage2-epochs 3 "
OPTIONS += "--stage1-batch 8 --stage1-lr 1.5e-3 --text-model models/text --audio-model models/audio "
OPTIONS += "--video-model models/video"
code_digest = magtkd.code_digest


def start(*more) -> int:
    return magtkd.main([*OPTIONS.split(), *map(str, more)])


def digits(run: Path) -> dict:
    """Scores, and every loss of stage 2 in full: they depend on all features."""
    results = {p.name: json.loads(p.read_bytes()) for p in (run / "fusion").glob("*.json")}
    found = {name: [r["predictions"], r["history"]] for name, r in results.items()}
    return found | json.loads((run / "metrics.json").read_text())["rows"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, apart from those that each start writes."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if p.name not in (".lock", "config.json", "index.jsonl")}


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    """A finished run, a corpus and encoders in the working folder. Tests that change them work on a copy."""
    folder = tmp_path_factory.mktemp("base")
    write_iemocap(folder / "corpus", seed=2, conversations=2, utterances=(2, 2))
    shutil.copytree(Path(tiny["text"]).parent, folder / "models")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        for name in ("confusion_figure", "loss_figure"):  # a fifth of the time; test_cli.py has them drawn
            m.setattr(report, name, lambda *args: None)
        m.setattr(magtkd, "code_digest", lambda *functions: "today's")  # whoever edits code while the tests run
        assert start() == 0
        yield folder / "run"


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """A copy, which becomes the working folder."""
    monkeypatch.chdir(shutil.copytree(base.parent, tmp_path / "copy"))
    return Path("run")


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


def test_ten_interruptions(base, tmp_path, monkeypatch):
    rng, kills, out, media = random.Random(0), 0, tmp_path / "new", ["--media", "run/media"]
    while kills < 10:
        with monkeypatch.context() as m:
            interrupt(m, rng.randint(1, 24), (os, "replace"), (magtkd, "optimizer_step"), (magtkd, "append_line"))
            code = start(*media, "--out", out)
        kills += code == 130
        if code == 0:
            assert digits(out) == digits(base)
            out = tmp_path / f"new{kills}"
    (out / ".magtkd-0123-text.safetensors").write_bytes(b"half")  # as a kill during a write leaves it
    assert start(*media, "--out", out) == 0 and digits(out) == digits(base)
    assert (out / "metrics.json").read_bytes() == (base / "metrics.json").read_bytes()
    assert not list(out.rglob("*.resume.pt")) and not list(out.rglob(".magtkd-*"))


def test_a_second_start_makes_nothing(base, run, trained):
    """The copy lies elsewhere; its files are touched; then weights that need space are removed."""
    for path in Path("corpus").rglob("*.*"):
        os.utime(path, ns=(1, 1))
    assert start() == 0 and not trained and contents(run) == contents(base)
    for name in ("text", "audio", "video"):
        (run / f"{name}.safetensors").unlink()
    assert start("--causal") == 0 and trained == FUSIONS  # stage 1 does not know this option


def test_nothing_is_trained_twice(base, tmp_path, monkeypatch, trained):
    """With checkpoints of a hub, whose hash is known only after the download."""
    known, text, new = set(), ["--modalities", "text"], ["--media", "run/media", "--out", tmp_path / "new"]
    spy(monkeypatch, encoders, "load_backbone", lambda name, option: known.add(name))
    monkeypatch.setattr(magtkd, "checkpoint_digest", lambda name: f"{name}@1" if name in known else None)
    for more in (text, text, [], ["--ablation"], [], ["--seeds", 2], ["--seeds", 2, "--ablation"]):
        assert start(*new, *more) == 0
    assert len(set(trained)) == len(trained) == 5 + 15 * 2  # encoders; five sets by three models by two seeds


@pytest.mark.parametrize(
    "what, again",
    [
        ("a label of train", ["text", "audio", "video", "audio_kd"]),
        ("a label of test", []),
        ("a wav of train", ["audio", "audio_kd"]),
        ("the text encoder", ["text", "audio_kd"]),
    ],
)
def test_after_a_change_the_digits_of_a_new_folder(what, again, base, run, trained, capsys):
    one, other = data.read_iemocap(Path("corpus")).utterances("test" if "test" in what else "train")[:2]
    if "label" in what:
        (path,) = Path("corpus").glob(f"Session*/dialog/EmoEvaluation/{one.id.rpartition('_')[0]}.txt")
        old = list(data.IEMOCAP_LABELS)[one.label]
        path.write_text(path.read_text().replace(f"{one.id}\t{old}", f"{one.id}\t{'ang' if old == 'sad' else 'sad'}"))
    elif "wav" in what:
        shutil.copy(one.audio, other.audio)
    else:
        path = Path("models/text/model.safetensors")
        save_file({name: x + 0.01 for name, x in load_file(path).items()}, path, {"format": "pt"})
    assert start() == 0
    assert [name for name in trained if not name.startswith("Ses")] == [*again, *FUSIONS]  # Ses..: decoded
    text = capsys.readouterr().out
    for name in [*(f"{name}.safetensors" for name in again), *(f"fusion/{name}.json" for name in FUSIONS)]:
        (second,) = run.glob(f"{name}.*")
        assert second.read_bytes() == (base / name).read_bytes() and f"{Path(name).name}: made from other" in text
    assert start("--media", "run/media", "--out", "new") == 0
    assert digits(Path("new")) == digits(run) != digits(base)


def test_after_the_code_was_edited_stage_2_only(base, run, trained, monkeypatch, tmp_path):
    monkeypatch.setattr(magtkd, "__file__", str(tmp_path / "magtkd.py"))
    before = code_digest()
    (tmp_path / "fusion.py").write_text("edited")
    assert len({before, code_digest(), code_digest(start)}) == 3  # the file of a model of your own counts, too
    monkeypatch.setattr(magtkd, "code_digest", code_digest)
    assert start() == 0 and trained == FUSIONS and digits(run) == digits(base)
    assert "- audio_kd: its encoder was trained by older code than today's" in (run / "report.md").read_text()


def test_what_is_missing_or_unreadable_is_named_and_nothing_is_made(run, trained, monkeypatch, capsys):
    before = contents(run)
    for gone, words in (
        ("Session1/sentences/wav", "4 utterances are missing, or their files, that run/audio.features"),
        ("Session3/dialog/*/Ses03F_impro01.txt", "2 utterances are missing, or their files, that run/text.features"),
    ):
        paths = {path: path.with_name("gone") for path in Path("corpus").glob(gone)}
        for path, hidden in paths.items():
            path.rename(hidden)
        assert start() == 2 and words in capsys.readouterr().err and not trained and contents(run) == before
        for path, hidden in paths.items():
            hidden.rename(path)
    refuse = Mock(side_effect=PermissionError(13, "Permission denied", "x.safetensors"))
    monkeypatch.setattr(magtkd, "safe_open", refuse)
    assert start() == 2 and not trained and contents(run) == before
    assert "x.safetensors: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, steps, again",
    [([], 5, ["text", "text", FUSIONS[1]]), (["--fresh"], 15, "text audio audio video audio_kd".split() + FUSIONS)],
)
def test_the_users_files_survive(more, steps, again, base, run, trained, monkeypatch, capsys):
    names = f"notes.txt thesis/chapter1.txt fusion/x fusion/{FUSIONS[1]}.json fusion/{FUSIONS[1]}.resume.pt report.md "
    names += "text.safetensors audio.features.safetensors features.safetensors figures/mine.png media/audio/x.npy"
    for name in names.split():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(f"mine: {name}")
    torch.save({"key": "x"}, run / "text.resume.pt")
    with monkeypatch.context() as m:
        interrupt(m, steps, (magtkd, "optimizer_step"))
        assert start(*more) == 130
    assert start() == 0 and digits(run) == digits(base) and trained == again
    assert ".resume.pt is of a training with other" in capsys.readouterr().out and list(run.glob("text.resume.pt.*"))
    for name in names.split():
        found = [p.read_bytes() for p in (run / name).parent.glob(f"{Path(name).name}*") if p.is_file()]
        assert f"mine: {name}".encode() in found, name


def test_a_folder_that_is_not_this_runs(run, trained, refused):
    Path("home").mkdir()
    Path("home/thesis.txt").write_text("years of work")
    for more, words in (
        ("--out home --fresh", "not of a run (thesis.txt)"),
        ("--out home/thesis.txt", "home/thesis.txt"),
        ("--alpha 0", "(alpha: 0.7 there, 0.0 now)"),
    ):
        assert words in refused(*OPTIONS.split(), *more.split())
    with FileLock(run / ".lock"):
        assert "another run is using this folder" in refused(*OPTIONS.split())
    for content in ("", "[]", '{"width": 64}', "[" * 10**5):
        (run / magtkd.CONFIG).write_text(content)
        assert magtkd.CONFIG in refused(*OPTIONS.split(), "--fresh")
    assert not trained and contents(Path("home")) == {"thesis.txt": b"years of work"}


def test_files_copied_over_others(base, run, trained):
    assert start("--seeds", 2) == 0
    expected, result = digits(run), "fusion/MAGT-T+A_KD+V-seed0"
    for source, name, again in (
        (f"{result}.json", "fusion/MAGT-T+A_KD+V-seed1.json", ["MAGT-T+A_KD+V-seed1"]),
        (f"{result}.safetensors", "fusion/MAGT-T+A_KD+V-seed1.safetensors", ["MAGT-T+A_KD+V-seed1"]),
        ("audio.safetensors", "text.safetensors", ["text"]),
    ):
        trained.clear()
        shutil.copy(run / source, run / name)
        assert start("--seeds", 2) == 0 and trained == again and digits(run) == expected


@pytest.mark.parametrize("what", ["a link", "a folder"])
@pytest.mark.parametrize("name", ["text.safetensors", f"fusion/{FUSIONS[1]}.json", "report.md"])
def test_in_the_place_of_a_file(name, what, run, trained, capsys):
    (run / name).unlink()
    Path("mine").write_text("mine")
    (run / name).symlink_to(Path("mine").absolute()) if what == "a link" else (run / name).mkdir()
    (run / "text.features.safetensors").unlink()  # so that there is something to do
    assert start() == 2 and name in capsys.readouterr().err and not {"text", FUSIONS[1]} & set(trained)
    assert Path("mine").read_text() == "mine"


def test_a_start_that_failed_does_not_hold_the_folder(tmp_path):
    for width, name in ((1, "note"), (2, "text.safetensors"), (2, "text.safetensors")):
        magtkd.open_run(tmp_path, {"width": width}).lock.release()
        assert magtkd.read_json(tmp_path / magtkd.CONFIG)["width"] == width
        (tmp_path / name).touch()
