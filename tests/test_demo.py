"""The synthetic corpus: IEMOCAP's layout, repeatable, each modality as informative as it should be; its two folders."""

import re
import wave
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data import read_iemocap
from extras import demo


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_layout_and_seed(tmp_path):
    for name, seed, conversations in (("one", 3, 1), ("other", 4, 1), ("longer", 3, 3)):
        demo.write_iemocap(tmp_path / name, seed, conversations, (1, 2))
    one, other, longer = (contents(tmp_path / name) for name in ("one", "other", "longer"))
    assert one.items() < longer.items() and not one.items() & other.items() and b"synthetic" in one["README.txt"]
    labels = longer["Session2/dialog/EmoEvaluation/Ses02F_script01_1.txt"].decode()
    assert re.search(r"\[0\.6000 - \d+\.\d{4}\]\tSes02F_script01_1_F000\t[a-z]{3}\t\[.*\]\nC-E2:\t[A-Z]", labels)
    for u in read_iemocap(tmp_path / "longer").utterances("train"):
        with wave.open(str(u.audio)) as file:
            assert abs(file.getnframes() / 16_000 - (u.end - u.start)) < 1e-3 and 0.79 < u.end - u.start < 2.01


def test_text_is_best_then_audio_then_video_and_all_together_better():
    turns, sessions = [], []
    for session in range(5):
        rng = np.random.default_rng([0, session])
        actors = [demo.make_actor(rng, "F", 200), demo.make_actor(rng, "M", 130)]
        for _ in range(8):
            turns += demo.make_conversation(rng, actors, (13, 17))
        sessions += [session] * (len(turns) - len(sessions))
    labels = np.unique([turn.emotion for turn in turns], return_inverse=True)[1]
    assert np.mean(labels[2:] == labels[:-2]) > 0.35  # mostly the same speaker: emotions last
    text = CountVectorizer().fit_transform([turn.text for turn in turns]).toarray()
    audio, bands = [], np.geomspace(80, 16_000, 24).astype(int)
    for x in (turn.audio / turn.audio.std() for turn in turns):  # energy in 24 bands, loudness at 1 to 10 Hz
        energy = [np.log(band.mean()) for band in np.split(np.abs(np.fft.rfft(x, 32_000)) ** 2, bands)]
        loudness = np.abs(x[: len(x) // 160 * 160]).reshape(-1, 160).mean(1)
        audio.append([*energy, *np.abs(np.fft.rfft(loudness - loudness.mean(), 400))[4:40:2]])
    faces = [demo.draw_faces(np.random.default_rng(0), turn.face, turn.actor, 48).mean(0) for turn in turns]
    video = np.stack(faces).reshape(-1, 12, 4, 12, 4, 3).mean((2, 4)).reshape(len(turns), -1)
    for pitch in {turn.actor.pitch for turn in turns}:  # without the actor's mean: what is left is the expression
        rows = np.array([turn.actor.pitch == pitch for turn in turns])
        video[rows] -= video[rows].mean(0)
    score, how = [], {"groups": sessions, "cv": LeaveOneGroupOut(), "method": "predict_log_proba"}
    for x, C in ((text, 0.03), (np.array(audio), 0.003), (video, 3e-4)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=300))
        score.append(cross_val_predict(model, x, labels, **how))
    text, audio, video, fused = (float((x.argmax(1) == labels).mean()) for x in (*score, sum(score)))
    assert fused > text + 0.02 > audio + 0.04 and audio > video + 0.05 > np.bincount(labels).max() / len(labels) + 0.13


@pytest.mark.parametrize("name, content", [("digest.txt", "[1, 2]"), ("README.txt", "synth"), ("added", "more")])
def test_a_changed_folder_is_kept_and_written_again(name, content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "write_iemocap", lambda root, conversations, w=demo.write_iemocap: w(root, 0, 1, (1, 2)))
    corpus, good = demo.read_demo(tmp_path), contents(tmp_path / "corpus")
    (tmp_path / "corpus" / name).write_text(content)
    assert demo.read_demo(tmp_path) == corpus and contents(tmp_path / "corpus") == good
    (old,) = tmp_path.glob("corpus.*")
    assert (old / name).read_text() == content and f"renamed to {old.name}" in capsys.readouterr().out
    assert demo.tiny_models(corpus, tmp_path) == demo.tiny_models(demo.read_demo(tmp_path), tmp_path)
    assert capsys.readouterr().out.count("writing") == 1


def test_an_interrupted_write_is_made_again(tmp_path):
    with pytest.raises(TypeError):
        demo.write_once(tmp_path / "x", lambda folder: folder.mkdir() + 1)
    demo.write_once(tmp_path / "x", Path.mkdir)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
