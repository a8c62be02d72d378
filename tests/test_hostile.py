"""Nothing lost, nothing misleading: what is wrong in a folder, a run, a file or an option, by kinds.

Every case ends as a user's error must: exit code 2, one line, no traceback, and no file changed that is not the run's.
`python -m tests.hostile` goes on from here with random damage.
"""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_features import example

import magtkd
from data import InputError, load_state, replace_file, save_state, write_features
from encoders import MediaStore
from extras import demo, runs

PROJECT = Path(__file__).parent.parent
SHORT = ["--encoders", "tiny", "--stage1-epochs", "1", "--stage2-epochs", "1", "--seeds", "1", "--workers", "2"]


def snapshot(folder):
    """Path -> content of every file, link and folder below, but for the lock."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name != ".lock":
            found[path] = os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A corpus of seconds, in IEMOCAP's layout."""
    root = tmp_path_factory.mktemp("small") / "iemocap"
    demo.write_iemocap(root, seed=2, conversations=1, utterances=(4, 4))
    (root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def finished_once(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert magtkd.main(["iemocap", "--root", str(small), "--out", str(out), *SHORT]) == 0
    return out


@pytest.fixture
def finished(finished_once, small, tmp_path):
    """A copy of a finished run and of its corpus: (options, corpus, folder)."""
    out, root = tmp_path / "run", tmp_path / "corpus"
    shutil.copytree(finished_once, out)
    shutil.copytree(small, root)  # with its files' times
    marker = json.loads((out / runs.MARKER).read_text())
    marker["options"]["root"] = str(root)
    (out / runs.MARKER).write_text(json.dumps(marker))
    (out / "config.json").write_text(json.dumps(marker["options"], indent=2))
    return ["iemocap", "--root", root, "--out", out, *SHORT], root, out


@pytest.fixture
def features(tmp_path):
    (tmp_path / "mine").mkdir()
    write_features(tmp_path / "mine" / "f.safetensors", example())
    return tmp_path / "mine" / "f.safetensors"


# 1. What belongs to the user


def make_link(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    return tmp_path / "link"


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize(
    "out",
    [
        lambda root, tmp: root,
        lambda root, tmp: root / "new",
        lambda root, tmp: root / "Session1" / "dialog",
        lambda root, tmp: root.parent,
        lambda root, tmp: make_link(tmp, root),
        lambda root, tmp: make_link(tmp, root) / "new",
        lambda root, tmp: root / "new" / ".." / "..",
    ],
)
def test_out_and_root_do_not_meet(refused, small, tmp_path, out, fresh):
    root = shutil.copytree(small, tmp_path / "data" / "iemocap")
    before = snapshot(root.parent)
    out = out(root, tmp_path)
    line = refused("iemocap", "--root", root, "--out", out, *SHORT, *fresh)
    assert "--root" in line and "--out" in line
    assert snapshot(root.parent) == before


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize("marked", [False, True])
def test_out_does_not_hold_the_features(refused, features, fresh, marked):
    if marked:  # as `--features runs/demo/features.safetensors --out runs/demo`
        (features.parent / runs.MARKER).write_text('{"program": "magtkd", "options": {}}')
    before = snapshot(features.parent)
    for out in (features, features.parent, features.parent.parent, features.parent / "..", features.parent / "." / ""):
        assert "--out" in refused("iemocap", "--features", features, "--out", out, *SHORT, *fresh)
    assert snapshot(features.parent) == before


def test_out_is_no_model(refused, tiny, small, tmp_path):
    model = shutil.copytree(tiny["text"], tmp_path / "model")
    for out in (model, model / "run", tmp_path):
        assert "--text-model" in refused("iemocap", "--root", small, "--out", out, "--text-model", model, "--fresh")
    assert snapshot(model).keys() == {model / p.name for p in Path(tiny["text"]).iterdir()}


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.json", "thesis.txt", ".hidden", "fusion/", "media/audio/x.npy"]
)
def test_a_folder_of_foreign_files_is_no_run(refused, features, tmp_path, name, fresh):
    """config.json: every model of the Hugging Face hub has one."""
    path = tmp_path / "home" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if name.endswith("/") else path.write_text("{}")
    before = snapshot(tmp_path / "home")
    assert runs.MARKER in refused("iemocap", "--features", features, "--out", tmp_path / "home", *SHORT, *fresh)
    assert snapshot(tmp_path / "home") == before


def test_fresh_removes_what_a_run_made_and_nothing_else(finished, refused):
    options, _, out = finished
    made = {path: x for path, x in snapshot(out).items() if path.is_file()}
    names = ["notes.txt", "media/audio/mine.npy", "fusion/plan.json", "figures/mine.png", "paper/config.json"]
    far = out.parent / "far"
    for path in [*(out / name for name in names), far / "metrics.json"]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (out / "link.txt").symlink_to(far / "metrics.json")
    (out / "presets").symlink_to(far)
    mine = {path: x for path, x in snapshot(out).items() if path.is_file() and path not in made}
    assert "presets: a link" in refused(*options, "--fresh")
    assert {path: x for path, x in snapshot(out).items() if path.is_file()} == made | mine  # before anything was gone
    (out / "presets").unlink()
    runs.remove(out, runs.OWN)
    assert {path: x for path, x in snapshot(out).items() if path.is_file()} == mine
    assert not (out / "tiny").exists() and (far / "metrics.json").read_text() == "mine"


def test_fresh_leaves_a_linked_store_and_trusts_nothing_old_in_it(finished, monkeypatch, capsys):
    options, root, out = finished
    far = out.parent / "far"
    shutil.move(out / "media", far)
    (out / "media").symlink_to(far)
    before = snapshot(far)
    wav = next(root.rglob("Ses05F_impro01_F000.wav"))
    shutil.copy(next(root.rglob("Ses05F_impro01_M000.wav")), wav)  # other sound under the old name
    assert magtkd.main([str(x) for x in [*options, "--fresh"]]) == 0
    after = snapshot(far)
    assert before.keys() == after.keys() and (out / "media").is_symlink()
    assert [p.name for p in before if before[p] != after[p]] == ["Ses05F_impro01_F000.npy"]


def test_all_files_of_a_run_are_known(finished):
    _, _, out = finished
    unknown = [p for p in out.rglob("*") if p.is_file() and not runs.OWN.fullmatch(p.relative_to(out).as_posix())]
    assert [p.name for p in unknown] == [".lock"]


@pytest.mark.parametrize("option", ["--features", "--root", "--out"])
def test_a_link_to_itself(refused, features, tmp_path, option):
    (tmp_path / "loop").symlink_to("loop")
    options = {"--features": features, "--out": tmp_path / "run"} | {option: tmp_path / "loop"}
    if option == "--root":
        del options["--features"]
    assert "loop" in refused("iemocap", *(x for pair in options.items() for x in pair), *SHORT)


# 2. A second start


def edit(path, change):
    path.write_text(change(path.read_text()))


LABELS, WORDS = (
    "Session5/dialog/EmoEvaluation/Ses05F_impro01.txt",
    "Session5/dialog/transcriptions/Ses05F_impro01.txt",
)


def without_a_turn(text):
    return "\n".join(line for line in text.splitlines() if "Ses05F_impro01_F001\t" not in line)


def relabel(text):
    start = text.index("Ses05F_impro01_F001\t") + len("Ses05F_impro01_F001\t")
    return text[:start] + ("sad" if text[start : start + 3] != "sad" else "ang") + text[start + 3 :]


@pytest.mark.parametrize(
    "path, change, words",
    [
        (LABELS, without_a_turn, "1 utterance removed (Ses05F_impro01_F001)"),
        (LABELS, relabel, "1 utterance relabelled (Ses05F_impro01_F001)"),
        (WORDS, lambda t: t.replace("]: ", "]: no, "), "4 utterances reworded (Ses05F_impro01_F000"),
        (LABELS, lambda t: t.replace("[0.6000 -", "[0.5000 -"), "1 utterance cut anew (Ses05F_impro01_F000)"),
        (WORDS, lambda t: t.replace("F001 ", "F777 "), "1 utterance removed (Ses05F_impro01_F001)"),
    ],
)
def test_a_changed_corpus_is_named(finished, refused, path, change, words):
    options, root, out = finished
    before = snapshot(out)
    original = (root / path).read_text()
    edit(root / path, change)
    line = refused(*options)
    assert words in line and "--fresh" in line
    assert snapshot(out) == before
    (root / path).write_text(original)
    assert magtkd.main([str(x) for x in options]) == 0


def test_added_and_moved_utterances_are_named():
    def one(split, conversation):
        return [split, conversation, "first", "sad", 0, "(0, 1)"]

    before = {"a": one("train", "c0"), "b": one("train", "c0")}
    assert runs.compare(before, before) == []
    assert runs.compare(before, before | {"c": one("train", "c0")}) == ["1 utterance added (c)"]
    assert runs.compare(before, before | {"b": one("dev", "c1")}) == [
        "1 utterance in another split (b)",
        "1 utterance in another conversation (b)",
    ]
    assert runs.compare(before, dict(reversed(before.items()))) == ["2 utterances in another order (a, b)"]


def times(out, *names):
    return [(out / name).stat().st_mtime_ns for name in names]


def test_a_repaired_file_is_decoded_again_and_what_depends_on_it(finished, monkeypatch, capsys):
    options, root, out = finished
    options = [str(x) for x in options]
    whole = ["text.features.safetensors", "video.features.safetensors", "text.safetensors"]
    depends = ["audio_kd.features.safetensors", "audio_kd.safetensors", "fusion/MAGT-T+A_KD+V-seed0.json"]
    before, old = times(out, *whole), times(out, *depends)
    broken = root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    for path in root.rglob("*.wav"):
        os.utime(path)  # copied, touched: the same sound
    assert magtkd.main(options) == 0
    assert times(out, *whole, *depends) == before + old
    assert "decoded again" in capsys.readouterr().out
    assert "Ses01F_impro01_F000: audio empty file" in (out / "report.md").read_text()

    shutil.copy(broken.with_name("Ses01F_impro01_M000.wav"), broken)
    assert magtkd.main(options) == 0
    said = capsys.readouterr().out
    assert "1 audio files changed" in said and "audio_kd and the fusions are trained again" in said
    assert times(out, *whole) == before and all(a > b for a, b in zip(times(out, *depends), old))
    assert "Ses01F_impro01_F000" not in (out / "report.md").read_text()
    assert not (out / "media" / "new").exists() and not list(out.rglob("*.part"))
    assert magtkd.main(options) == 0
    assert "decoded again" not in capsys.readouterr().out


def test_a_kill_while_a_repaired_file_is_decoded_loses_nothing(finished, monkeypatch, capsys):
    """Stopped at each step of the renewal, it is continued, and the old sound is mixed with nothing."""
    options, root, out = finished
    options = [str(x) for x in options]
    source = root / "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_M000.wav"
    shutil.copy(source, source.with_name("Ses01F_impro01_F000.wav"))

    def stop(*_):
        raise KeyboardInterrupt

    for place, name in ((MediaStore, "fill"), (runs.Run, "remove_fusions"), (runs.os, "replace")):
        with monkeypatch.context() as m:
            m.setattr(place, name, stop)
            assert magtkd.main(options) == 130
    assert magtkd.main(options) == 0
    assert "audio_kd" in capsys.readouterr().out
    assert (out / "media/audio/Ses01F_impro01_F000.npy").exists()
    assert not (out / "media/audio/Ses01F_impro01_F000.txt").exists()
    answers = load_file(out / "audio_kd.features.safetensors")["features"]
    assert answers.isfinite().all()


def test_the_broken_files_stay_in_the_report_without_the_store(finished):
    options, _, out = finished
    shutil.rmtree(out / "media")
    (out / "metrics.json").unlink()
    assert magtkd.main([str(x) for x in options]) == 0
    assert json.loads((out / "metrics.json").read_text())["problems"] == ["Ses01F_impro01_F000: audio empty file"]


def test_features_that_were_deleted_take_their_fusions_with_them(finished):
    options, _, out = finished
    (out / "video.features.safetensors").unlink()
    before = times(out, "fusion/MAGT-T+A_KD+V-seed0.json", "audio_kd.features.safetensors")
    assert magtkd.main([str(x) for x in options]) == 0
    after = times(out, "fusion/MAGT-T+A_KD+V-seed0.json", "audio_kd.features.safetensors")
    assert after[0] > before[0] and after[1] == before[1]


def test_options_that_change_no_result_may_change(finished, capsys):
    options, _, out = finished
    marker = json.loads((out / runs.MARKER).read_text())
    (out / runs.MARKER).write_text(json.dumps(marker | {"device": "cuda"}))
    more = ["--gradient-checkpointing", "--log-steps", "--workers", "1", "--device", "cpu"]
    assert magtkd.main([str(x) for x in [*options, *more]]) == 0
    assert "begun on cuda, continues on cpu" in capsys.readouterr().out


DAMAGE = {
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "one byte less": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "empty": lambda p: p.write_bytes(b""),
    "other JSON": lambda p: p.write_text('{"a": [1, {"b": null}]}'),
    "a JSON list": lambda p: p.write_text("[]"),
    "binary": lambda p: p.write_bytes(bytes(range(256)) * 9),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "another tensor file": lambda p: save_file({"features": torch.zeros(1, 2)}, p, {"utterances": "[]"}),
}
READ = [  # at the next start
    runs.MARKER,
    "metrics.json",
    "fusion/MAGT-T+A_KD+V-seed0.json",
    "fusion/MAGT-T+A_KD+V-seed0.safetensors",
    "audio_kd.features.safetensors",
]
WRITTEN = ["config.json", "features.safetensors", "fusion.safetensors", "report.md", "log.jsonl", "figures/losses.png"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(finished, refused, kind):
    """And what to do. metrics.json is JSON that is written anew: other JSON in it is noticed, not relied on."""
    options, _, out = finished
    unread = ["media/audio/Ses02F_impro01_F000.npy", "media/audio/Ses01F_impro01_F000.txt", "text.safetensors"]
    for name in READ if kind not in ("a folder", "a pipe") else [*READ, *WRITTEN, *unread]:
        path, kept = out / name, (out / name).read_bytes()
        DAMAGE[kind](path)
        line = refused(*options)
        assert path.name in line and ("delete" in line or "--fresh" in line), line
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(kept)


@pytest.mark.parametrize("kind", ["cut", "binary"])
def test_a_damaged_file_that_is_written_anew_costs_nothing(finished, kind):
    options, _, out = finished
    kept = {name: (out / name).read_bytes() for name in ("config.json", "fusion.safetensors", "report.md")}
    for name in WRITTEN:
        DAMAGE[kind](out / name)
    assert magtkd.main([str(x) for x in options]) == 0
    assert {name: (out / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize("kind", set(DAMAGE) - {"a pipe"})
def test_a_damaged_state_of_a_training_is_named(tmp_path, kind):
    model = torch.nn.Linear(2, 2)
    save_state(tmp_path / "m.resume.pt", {"model": model}, [{"dev_f1": 1.0}], {"dev_f1": 1.0})
    assert load_state(tmp_path / "m.resume.pt", {"model": model}) == ([{"dev_f1": 1.0}], {"dev_f1": 1.0})
    DAMAGE[kind](tmp_path / "m.resume.pt")
    with pytest.raises(InputError, match="m.resume.pt: not a checkpoint of this model; delete it"):
        load_state(tmp_path / "m.resume.pt", {"model": model})


WRITERS = {
    "torch": lambda part: torch.save({"a": torch.zeros(10_000)}, part),
    "safetensors": lambda part: save_file({"a": torch.zeros(10_000)}, part),
    "text": lambda part: part.write_text("a" * 40_000),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_while_a_file_is_written(tmp_path, writer):
    """The old file stays, and no half one. Files of this process may have 4 kB, which fails as a full disk does."""
    path, limits = tmp_path / "m", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises((InputError, OSError)) as e:
            replace_file(path, WRITERS[writer])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(e.value, OSError) or "is the disk full? What is whole stays" in str(e.value)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [path.name]
