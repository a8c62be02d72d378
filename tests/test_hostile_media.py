"""One media file never stops a run: sounds, films and things that are neither, by kinds, through the store and a run.

What each kind must decode to, or be listed as, is in test_media.py. Here: nothing of them reaches the run, memory is
bounded, and whatever is broken is named in the report.
"""

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import spoil_bytes, write_odd_sound
from test_media import tone, utterance, write_changing_film, write_film, write_float_wav, write_wav

import magtkd
from data import MediaError, Utterance, read_iemocap
from encoders import MediaStore, decode
from extras import demo
from extras.predict import Answer, table
from extras.predict import decode as decode_for_predict

SHORT = ["--encoders", "tiny", "--stage1-epochs", "1", "--stage2-epochs", "1", "--seeds", "1", "--workers", "2"]


def many_channels(path):
    write_wav(path, np.stack([tone(1, 440, 44_101)] * 16, axis=1), 44_101)


KINDS = {  # what: (how it is made, whether it can be used)
    "16 channels of 44,101 Hz": (many_channels, True),
    "an empty file": (lambda path: path.write_bytes(b""), False),
    "a header alone": (lambda path: path.write_bytes(b"RIFF\x24\0\0\0WAVEfmt "), False),
    "text": (lambda path: path.write_text("no sound"), False),
    "a folder": (lambda path: path.mkdir(), False),
    "a pipe": (os.mkfifo, False),
    "a device": (lambda path: path.symlink_to("/dev/zero"), False),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), False),
    "a link to itself": (lambda path: path.symlink_to(path.name), False),
    "samples of NaN": (lambda path: write_float_wav(path, np.full(9_000, np.nan)), False),
    "no samples": (lambda path: write_wav(path, np.zeros(0)), False),
    "a film": (lambda path: write_film(path.with_suffix(".avi"), 1).rename(path), False),
    "a rate of 2 GHz": (lambda path: write_wav(path, tone(0.1), 2_000_000_000), False),
    "a rate of 1 Hz": (lambda path: write_wav(path, tone(0.1), 1), True),
    "not readable": (lambda path: (write_wav(path, tone(1)), path.chmod(0)), os.geteuid() == 0),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a corpus of which half of the sounds are of these kinds: (corpus, folder, id of utterance by kind)."""
    root = tmp_path_factory.mktemp("media") / "iemocap"
    demo.write_iemocap(root, seed=2, conversations=1, utterances=(6, 6))
    paths = sorted(root.rglob("*.wav"))[::2]
    assert len(paths) >= len(KINDS)
    for path, (make, _) in zip(paths, KINDS.values()):
        path.unlink()
        make(path)
    films = sorted(root.rglob("*.avi"))
    write_changing_film(films[0].with_suffix(".ts"), frames=100).rename(films[0])  # its size changes in the middle
    films[1].write_bytes(films[1].read_bytes()[:3000])
    out = root.parent / "run"
    assert magtkd.main(["iemocap", "--root", str(root), "--out", str(out), *SHORT]) == 0
    return root, out, {kind: path.stem for kind, path in zip(KINDS, paths)}


def test_a_run_over_all_kinds_lists_each(finished):
    _, out, ids = finished
    problems = json.loads((out / "metrics.json").read_text())["problems"]
    listed = {line.split(":")[0] for line in problems if ": audio " in line}
    assert listed == {ids[kind] for kind, (_, usable) in KINDS.items() if not usable}
    films = {line.split("_F0")[0].split("_M0")[0] for line in problems if ": video " in line}
    assert films == {"Ses02F_impro01"}  # cut; the one that changes its size is read
    report = (out / "report.md").read_text()
    assert all(f"- {line}\n" in report for line in problems)


def test_an_utterance_of_each_kind_is_predicted(finished):
    """As in training: marked, and no error."""
    root, _, ids = finished
    for kind, (_, usable) in KINDS.items():
        path = next(p for p in root.rglob("*.wav") if p.stem == ids[kind])
        x = decode_for_predict(utterance(path), "audio", (8, 48))
        assert isinstance(x, MediaError) != usable, (kind, x)
        if not usable:
            answer = Answer(utterance(path), [1.0], [f"audio ({x})"])
            assert len(table([answer], ["sad"]).splitlines()) == 2, kind


@pytest.mark.parametrize("start, end", [(1e13, 1e14), (5, 1), (float("inf"), float("inf")), (-5, -1)])
def test_times_that_no_film_has(tmp_path, start, end):
    u = utterance(write_film(tmp_path / "a.avi", 1), start, end)
    store = MediaStore(tmp_path / "store", ("video",), 2, 16)
    store.fill([u, utterance(u.video, name="whole")], workers=2)
    assert store.length("whole", "video") == 2
    assert store.length("u", "video") == 0 and store.problems()[0].startswith("u: video ")


@pytest.mark.parametrize("digits", [1, 400])
def test_times_of_many_digits_in_a_label_file(tmp_path, digits):
    """The number is what float() makes of it, infinity if it must be: a problem of this utterance alone."""
    root = tmp_path / "iemocap"
    demo.write_iemocap(root, seed=2, conversations=1, utterances=(2, 2))
    path = root / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    text = path.read_text()
    first = next(line for line in text.splitlines() if line.startswith("["))
    path.write_text(text.replace(first, first.replace("[0.6000 -", f"[{'9' * digits}.6000 -")))
    u = next(u for u in read_iemocap(root).utterances() if u.id == first.split("\t")[1])
    with pytest.raises(MediaError, match="before the utterance"):
        decode(u, "video", 2, 16)


SCRIPT = """
import random, resource, sys
sys.path[:0] = [{project!r}, {tests!r}]
import torch
from damage import spoil_bytes, write_odd_sound
from pathlib import Path
from test_media import utterance
from data import MediaError
from encoders import decode
torch.set_num_threads(1)
folder, draw, answers, size = Path(sys.argv[1]), random.Random(0), 0, 0
size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range({count}):
    modality = draw.choice(["audio", "video"])
    path = folder / f"x{{('.wav' if modality == 'audio' else draw.choice(['.avi', '.mp4']))}}"
    if modality == "audio" and i % 2:
        write_odd_sound(draw, path)
    else:
        path.write_bytes(spoil_bytes(draw, (folder / f"whole{{path.suffix}}").read_bytes()))
    try:
        x = decode(utterance(path), modality, 4, 16)
        answers += 1
        assert x.shape == (4, 3, 16, 16) if modality == "video" else len(x) >= 400
    except MediaError as e:
        assert str(e)
print(answers, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size)
"""


def test_random_damage_neither_crashes_nor_fills_the_memory(tmp_path):
    """In a process of its own: a crash in a C library ends it with a signal."""
    write_wav(tmp_path / "whole.wav", np.stack([tone(0.3)] * 2, axis=1))
    write_film(tmp_path / "whole.avi", 1)
    write_film(tmp_path / "whole.mp4", 1, "libx264")
    tests = Path(__file__).parent
    script = SCRIPT.format(project=str(tests.parent), tests=str(tests), count=150)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answers, kilobytes = map(int, done.stdout.split())
    assert 10 < answers < 140 and kilobytes < 500_000


def test_the_damage_is_a_function_of_the_seed(tmp_path):
    content = bytes(range(256))
    draws = [random.Random(seed) for seed in (0, 0, 1)]
    a, b, c = ([spoil_bytes(draw, content) for _ in range(5)] for draw in draws)
    assert a == b != c
    for name, seed in (("a", 3), ("b", 3)):
        write_odd_sound(random.Random(seed), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "hostile", ["x" * 300, "x/" * 3000, "nul\0", "\ud800", "-rf", "a b.wav", "https://x.y/z.wav", "concat:a|b"]
)
def test_names_of_any_kind(tmp_path, hostile):
    """FFmpeg takes some names for protocols: only what lies on the disk is opened."""
    u = Utterance("u", "s", "words", 0, Path(hostile), Path(hostile))
    for modality in ("audio", "video"):
        with pytest.raises(MediaError):
            decode(u, modality)
        assert isinstance(decode_for_predict(u, modality, (8, 48)), MediaError)


def test_memory_of_a_rate_without_common_divisor(tmp_path):
    path = write_wav(tmp_path / "a.wav", np.stack([tone(20, 440, 383_981)] * 2, axis=1), 383_981)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert abs(len(decode(utterance(path), "audio")) - 320_000) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000
