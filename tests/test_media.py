"""Decoding, on files of known content: tones of known pitch, pictures of known colour, and broken ones."""

import json
import wave
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import media
from data import InputError, Utterance
from media import MediaError, MediaStore, load_audio, load_frames


def write_wav(path, sound, rate=16_000):
    """sound: float [T] or [T, channels], -1 to 1."""
    sound = np.atleast_2d(np.asarray(sound).T).T
    with wave.open(str(path), "wb") as f:
        f.setnchannels(sound.shape[1])
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((sound * 32767).astype("<i2").tobytes())
    return path


def tone(seconds, hertz=440, rate=16_000):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write_film(path, seconds, codec="mpeg4", rate=10):
    """A film whose green channel grows by 4 a frame, from 0."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(int(seconds * rate)):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[..., 1] = 4 * i
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def pitch(sound, rate=16_000):
    spectrum = np.abs(np.fft.rfft(sound.numpy()))
    return spectrum.argmax() * rate / len(sound)


@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2), (48_000, 6), (8_000, 1)])
def test_sound_becomes_16_khz_mono(tmp_path, rate, channels):
    path = write_wav(tmp_path / "a.wav", np.stack([tone(1.5, 440, rate)] * channels, axis=1), rate)
    sound = load_audio(path)
    assert sound.dtype == torch.float32 and sound.dim() == 1
    assert abs(len(sound) - 24_000) <= 2 and pitch(sound) == pytest.approx(440, abs=2)
    assert sound[2000:-2000].abs().max() == pytest.approx(0.5, abs=0.02)


def test_a_part_of_the_sound(tmp_path):
    path = write_wav(tmp_path / "a.wav", np.concatenate([tone(1, 300), tone(1, 600), tone(1, 900)]))
    middle = load_audio(path, start=1.0, end=2.0)
    assert len(middle) == 16_000 and pitch(middle) == pytest.approx(600, abs=2)
    assert torch.equal(middle, load_audio(path)[16_000:32_000])
    with pytest.raises(MediaError, match="ends before 3.5 s|no sound"):
        load_audio(path, start=3.5, end=4.0)


def test_long_and_short_and_silent_clips(tmp_path):
    assert len(load_audio(write_wav(tmp_path / "long.wav", np.zeros(300 * 16_000)))) == 35 * 16_000
    assert len(load_audio(write_wav(tmp_path / "short.wav", tone(0.03)))) == 480
    assert not load_audio(write_wav(tmp_path / "silent.wav", np.zeros(8000))).any()
    with pytest.raises(MediaError, match="only 20 ms of sound"):
        load_audio(write_wav(tmp_path / "shorter.wav", tone(0.02)))


@pytest.mark.parametrize("load", [load_audio, load_frames])
@pytest.mark.parametrize(
    "content, words",
    [(None, "missing"), (b"", "empty file"), (b"\0" * 212, "broken, 212 bytes"), (b"RIFF\x24\0\0\0WAVE", "broken|no ")],
)
def test_broken_files(tmp_path, load, content, words):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=words):
        load(path)


def test_a_truncated_film(tmp_path):
    whole = write_film(tmp_path / "whole.mp4", 5, "libx264").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its index, at the end, is gone
    with pytest.raises(MediaError, match="broken"):
        load_frames(tmp_path / "cut.mp4")


def test_sound_without_picture_and_picture_without_sound(tmp_path):
    with pytest.raises(MediaError, match="no picture"):
        load_frames(write_wav(tmp_path / "a.wav", tone(1)))
    with pytest.raises(MediaError, match="no sound"):
        load_audio(write_film(tmp_path / "a.avi", 1))


@pytest.mark.parametrize("name, codec", [("a.avi", "mpeg4"), ("a.mp4", "libx264")])
def test_frames_come_from_their_window(tmp_path, name, codec):
    path = write_film(tmp_path / name, 6, codec)
    frames = load_frames(path, size=32)
    assert frames.shape == (8, 3, 32, 32) and frames.dtype == torch.uint8
    # eight middles of 6 s, at 10 frames a second: frames 4, 12, 19, ... each 4 greener
    expected = [4 * np.ceil(10 * 6 * (2 * k + 1) / 16) for k in range(8)]
    assert frames[:, 1].float().mean((1, 2)).tolist() == pytest.approx(expected, abs=8)
    assert frames[:, 0].float().mean() < 20 and frames[:, 2].float().mean() < 20  # RGB, not BGR
    window = load_frames(path, start=3.0, end=4.0, size=32)[:, 1].float().mean((1, 2))  # and a second on both sides
    expected = [4 * np.ceil(10 * (2 + 3 * (2 * k + 1) / 16)) for k in range(8)]
    assert window.tolist() == pytest.approx(expected, abs=8)


def test_a_window_behind_the_end(tmp_path):
    path = write_film(tmp_path / "a.avi", 3)
    frames = load_frames(path, start=1.9, end=2.5, size=32)  # its margin reaches over the end: cut there
    assert frames.shape == (8, 3, 32, 32)
    with pytest.raises(MediaError, match="ends at 3.0 s, before the utterance"):
        load_frames(path, start=9, end=10)


# The store


def corpus_of(folder, n=5):
    utterances = []
    for i in range(n):
        sound = write_wav(folder / f"{i}.wav", tone(0.5 + 0.1 * i, 300 + 50 * i))
        film = write_film(folder / f"{i}.avi", 1 + 0.2 * i)
        utterances.append(Utterance(f"u{i}", "s", "words", 0, sound, film))
    (folder / "1.wav").unlink()
    (folder / "2.avi").write_bytes(b"")
    return [*utterances, Utterance("nothing", "s", "words", 0, None, None)]


def check(store, utterances):
    for u in utterances:
        for kind, path, load in (("audio", u.audio, load_audio), ("video", u.video, lambda p: load_frames(p, size=16))):
            if path is None or not path.exists() or not path.stat().st_size:
                assert store.length(u.id, kind) == 0
            else:
                stored = getattr(store, kind)(u.id)
                assert len(stored) == store.length(u.id, kind)
                torch.testing.assert_close(stored, load(path), atol=1e-4, rtol=0)


def test_store_keeps_what_it_decoded_once(tmp_path, monkeypatch):
    utterances = corpus_of(tmp_path)
    store = MediaStore(tmp_path / "store", size=16)
    store.fill(utterances, workers=2)
    check(store, utterances)
    assert sorted(store.problems) == [
        "nothing: picture missing",
        "nothing: sound missing",
        "u1: sound missing",
        "u2: picture empty file",
    ]
    monkeypatch.setattr(media, "load_audio", None)  # a second decoding would fail
    monkeypatch.setattr(media, "load_frames", None)
    again = MediaStore(tmp_path / "store", size=16)
    again.fill(utterances, workers=2)
    monkeypatch.undo()
    check(again, utterances)
    assert again.problems == store.problems


@pytest.mark.parametrize("lines", [0, 2, 4])
def test_store_goes_on_after_a_kill(tmp_path, lines):
    """Killed between the data of an utterance and its line, or within the line."""
    utterances = corpus_of(tmp_path)
    MediaStore(tmp_path / "store", size=16).fill(utterances, workers=1)
    index = tmp_path / "store" / "index.jsonl"
    whole = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(whole[:lines]) + whole[lines][:-5])
    store = MediaStore(tmp_path / "store", size=16)
    assert len(store.index) == lines
    store.fill(utterances, workers=1)
    check(store, utterances)
    assert [json.loads(line)["id"] for line in index.read_text().splitlines()] == [u.id for u in utterances]


def test_store_that_lost_data(tmp_path):
    utterances = corpus_of(tmp_path, 2)
    MediaStore(tmp_path / "store", size=16).fill(utterances, workers=1)
    (tmp_path / "store" / "frames.u8").write_bytes(b"")
    with pytest.raises(InputError, match="frames.u8 is shorter than its index says; delete"):
        MediaStore(tmp_path / "store", size=16)


def test_a_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(media.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    store = MediaStore(tmp_path / "store", size=224)
    with pytest.raises(InputError, match=r"1 utterances need 0.0 GB, 0.0 GB are free; .* --out"):
        store.fill([Utterance("u", "s", "words", 0, None, None)], workers=1)
