"""Decoding, on files of known content: tones of known pitch, pictures of known colour, and broken ones."""

import os
import random
import resource
import struct
import threading
import wave
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import encoders
from data import InputError, MediaError, Utterance
from encoders import MediaStore, decode, load_audio, load_frames


def write_wav(path, sound, rate=16_000):
    """sound: float [T] or [T, channels], -1 to 1."""
    sound = np.atleast_2d(np.asarray(sound).T).T
    with wave.open(str(path), "wb") as f:
        f.setnchannels(sound.shape[1])
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((sound * 32767).astype("<i2").tobytes())
    return path


def write_float_wav(path, sound, rate=16_000):
    """sound: any floats [T], written as they are."""
    data = np.asarray(sound, "<f4").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32)  # 3: IEEE floats
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    path.write_bytes(struct.pack("<4sI", b"RIFF", len(body)) + body)
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


def write_changing_film(path, sizes=((48, 64), (96, 32)), frames=20, rate=10):
    """A film whose pictures change their size in the middle, as broadcasts do: (height, width), red, then blue."""
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *sizes[0], "yuv420p"
        for part, (height, width) in enumerate(sizes):
            coder = av.CodecContext.create("libx264", "w")
            coder.height, coder.width, coder.pix_fmt = height, width, "yuv420p"
            coder.time_base, coder.framerate = Fraction(1, rate), rate
            coder.options = {"tune": "zerolatency"}
            picture = np.zeros((height, width, 3), np.uint8)
            picture[..., 2 * part] = 200
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = part * frames + i, coder.time_base
                for packet in coder.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
    return path


def pitch(sound, rate=16_000):
    spectrum = np.abs(np.fft.rfft(sound.numpy()))
    return spectrum.argmax() * rate / len(sound)


def utterance(path=None, start=None, end=None, name="u"):
    """One whose sound and picture are both in the file `path`."""
    return Utterance(name, "s", "words", 0, path, path, start, end)


# Sound


@pytest.mark.parametrize(
    "rate, channels",
    [(16_000, 1), (44_100, 2), (48_000, 6), (8_000, 1), (48_000, 8), (16_000, 16), (44_101, 1), (11_127, 2)],
)
def test_sound_becomes_16_khz_mono(tmp_path, rate, channels):
    path = write_wav(tmp_path / "a.wav", np.stack([tone(1.5, 440, rate)] * channels, axis=1), rate)
    sound = load_audio(path)
    assert sound.dtype == torch.float32 and sound.dim() == 1
    assert abs(len(sound) - 24_000) <= 25 and pitch(sound) == pytest.approx(440, abs=2)
    assert sound[2000:-2000].abs().max() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("channels", [2, 6, 8, 63])
def test_mono_is_the_mean_of_the_channels(tmp_path, channels):
    sound = np.random.default_rng(0).uniform(-1, 1, (8_000, channels))
    mono = load_audio(write_wav(tmp_path / "a.wav", sound))
    torch.testing.assert_close(mono, torch.from_numpy(sound).mean(1).float(), atol=1e-3, rtol=0)
    loud = load_audio(write_wav(tmp_path / "a.wav", np.stack([2 * tone(1)] * channels, axis=1)))
    assert np.abs(loud.numpy() - 2 * tone(1)).max() < 1e-3  # all alike, as loud as can be: nothing is clipped


@pytest.mark.parametrize("rate", [44_101, 47_999, 99_991, 383_981])
def test_an_odd_rate_takes_no_gigabytes(tmp_path, rate):
    path = write_wav(tmp_path / "a.wav", tone(0.5, 440, rate), rate)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KB, the largest so far
    sound = load_audio(path)
    assert abs(len(sound) - 8_000) <= 9 and pitch(sound) == pytest.approx(440, abs=3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


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


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers(tmp_path, wrong):
    sound = tone(1)
    sound[5_000] = wrong
    with pytest.raises(MediaError, match="samples that are not numbers"):
        decode(utterance(write_float_wav(tmp_path / "a.wav", sound)), "audio")
    loud = load_audio(write_float_wav(tmp_path / "loud.wav", 1e30 * tone(1)))
    assert loud.min() == -1 and loud.max() == 1


# Pictures


@pytest.mark.parametrize("name, codec", [("a.avi", "mpeg4"), ("a.mp4", "libx264")])
def test_frames_come_from_their_window(tmp_path, name, codec):
    path = write_film(tmp_path / name, 6, codec)
    frames = load_frames(path, None, None, size=32)
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


def test_a_film_whose_pictures_change_their_size(tmp_path):
    frames = load_frames(write_changing_film(tmp_path / "a.ts"), None, None, count=8, size=32).float()
    red, blue = frames[:, 0].mean((1, 2)), frames[:, 2].mean((1, 2))
    assert frames.shape == (8, 3, 32, 32)
    assert red[:4].min() > 150 > 50 > red[4:].max() and blue[4:].min() > 150 > 50 > blue[:4].max()


@pytest.mark.parametrize("count, size", [(1, 8), (8, 32), (16, 24)])
def test_as_many_frames_as_the_checkpoint_takes(tmp_path, count, size):
    path = write_film(tmp_path / "a.avi", 3)
    assert decode(utterance(path, 1.0, 2.0), "video", count, size).shape == (count, 3, size, size)
    one = load_frames(write_film(tmp_path / "one.avi", 0.1), None, None, count, size)  # a single picture
    assert one.shape == (count, 3, size, size) and (one == one[0]).all()


# What cannot be decoded costs one utterance, and never more


@pytest.mark.parametrize("modality", ["audio", "video"])
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "missing"),
        (lambda path: path.symlink_to("nowhere"), "missing"),
        (lambda path: path.symlink_to(path), "missing"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(bytes(212)), "broken, 212 bytes"),
        (lambda path: path.write_bytes(b"RIFF\x24\0\0\0WAVE"), "broken, 12 bytes"),
        (lambda path: path.write_text("words " * 100), "broken, 600 bytes"),
        (lambda path: path.mkdir(), "not a file"),
        (os.mkfifo, "not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a file"),
    ],
)
def test_broken_files(tmp_path, modality, make, words):
    """In a thread: nobody writes into the pipe, and whoever opened it would wait for ever."""
    make(tmp_path / "clip.mp4")
    answer = []

    def work():
        try:
            answer.append(decode(utterance(tmp_path / "clip.mp4"), modality))
        except MediaError as e:
            answer.append(str(e))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert answer and isinstance(answer[0], str) and words in answer[0]


@pytest.mark.parametrize("modality", ["audio", "video"])
@pytest.mark.parametrize(
    "path, words",
    [
        (None, "missing"),
        (Path("x" * 300), "missing"),
        (Path("x/" * 3000), "missing"),
        (Path("nul\0.wav"), "missing"),
        (Path("lone surrogate \ud800.wav"), "missing"),
    ],
    ids=["None", "a long name", "a long path", "NUL", "a surrogate"],
)
def test_impossible_names(modality, path, words):
    with pytest.raises(MediaError, match=words):
        decode(utterance(path), modality)


@pytest.mark.parametrize("error", [RuntimeError("?"), MemoryError(), OverflowError(), KeyError("k"), OSError(5, "I/O")])
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, error):
    def open_it(*_):
        raise error

    monkeypatch.setattr(encoders.av, "open", open_it)
    path = write_wav(tmp_path / "a.wav", tone(1))
    for modality in ("audio", "video"):
        with pytest.raises(MediaError, match=rf"broken, 32044 bytes \({type(error).__name__}\)"):
            decode(utterance(path), modality)


def test_a_truncated_film(tmp_path):
    whole = write_film(tmp_path / "whole.mp4", 5, "libx264").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its index, at the end, is gone
    with pytest.raises(MediaError, match="broken"):
        decode(utterance(tmp_path / "cut.mp4"), "video")


def test_a_sound_file_without_samples(tmp_path):
    with pytest.raises(MediaError, match="no sound in it"):
        decode(utterance(write_wav(tmp_path / "a.wav", np.zeros(0))), "audio")


def test_sound_without_picture_and_picture_without_sound(tmp_path):
    with pytest.raises(MediaError, match="no picture"):
        decode(utterance(write_wav(tmp_path / "a.wav", tone(1))), "video")
    with pytest.raises(MediaError, match="no sound"):
        decode(utterance(write_film(tmp_path / "a.avi", 1)), "audio")


@pytest.mark.parametrize("start, end", [(9, 10), (1e13, 1e13 + 1), (float("inf"), float("inf")), (2.5, 0.1)])
def test_times_that_are_not_in_the_film(tmp_path, start, end):
    path = write_film(tmp_path / "a.avi", 1)
    with pytest.raises(MediaError, match="before the utterance"):
        decode(utterance(path, start, end), "video")


@pytest.mark.parametrize("rate", [400_001, 2_000_000_000])
def test_no_recorder_has_such_a_rate(tmp_path, rate):
    path = write_wav(tmp_path / "a.wav", tone(0.1), rate)
    with pytest.raises(MediaError, match=f"{rate} samples per second"):
        decode(utterance(path), "audio")


def test_random_damage(tmp_path):
    """Bytes changed, cut out and doubled, in sound and in films: an answer of the right kind, or a MediaError."""
    sources = {"audio": write_wav(tmp_path / "a.wav", tone(0.2)), "video": write_film(tmp_path / "a.mp4", 1, "libx264")}
    for modality, source in sources.items():
        whole, draw, answers = source.read_bytes(), random.Random(0), 0
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(draw.randint(1, 20)):
                damaged[draw.randrange(draw.choice([60, len(whole)]))] = draw.randrange(256)
            if draw.random() < 0.3:
                at, length = draw.randrange(len(whole)), draw.randrange(500)
                damaged[at : at + length] = damaged[:length] if draw.random() < 0.5 else b""
            source.write_bytes(damaged)
            try:
                x = decode(utterance(source), modality, 4, 16)
            except MediaError as e:
                assert str(e)
                continue
            answers += 1
            assert x.shape == (4, 3, 16, 16) if modality == "video" else x.dtype == np.int16 and len(x) >= 400
        assert 0 < answers < 60, modality


# The store


def corpus_of(folder, n=5):
    """Utterances of which one has no sound, one an empty film, and one neither."""
    utterances = []
    for i in range(n):
        sound = write_wav(folder / f"{i}.wav", tone(0.5 + 0.1 * i, 300 + 50 * i))
        film = write_film(folder / f"{i}.avi", 1 + 0.2 * i)
        utterances.append(Utterance(f"u{i}", "s", "words", 0, sound, film))
    (folder / "1.wav").unlink()
    (folder / "2.avi").write_bytes(b"")
    return [*utterances, Utterance("nothing", "s", "words", 0, None, None)]


PROBLEMS = ["nothing: audio missing", "nothing: video missing", "u1: audio missing", "u2: video empty file"]


def open_store(folder, modalities=("audio", "video")):
    return MediaStore(folder / "store", modalities, frames=4, size=16)


def files_of(store):
    return {path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file()}


def check(store, utterances):
    """The store has what a direct decoding gives: a file for each utterance and modality, and no other file."""
    expected = set()
    for u in utterances:
        for modality in store.modalities:
            path = getattr(u, modality)
            if path is None or not path.exists() or not path.stat().st_size:
                assert store.length(u.id, modality) == 0
                expected.add(f"{modality}/{u.id}.txt")
                continue
            expected.add(f"{modality}/{u.id}.npy")
            direct = load_audio(path) if modality == "audio" else load_frames(path, None, None, 4, 16)
            stored = store.get(u.id, modality)
            assert len(stored) == store.length(u.id, modality) and stored.dtype == direct.dtype
            torch.testing.assert_close(stored, direct, atol=1e-4, rtol=0)
    assert files_of(store) == expected


def count_decoding(monkeypatch, stop_after=None):
    """What is decoded from now on, up to the interruption after `stop_after` of them."""
    decoded = []

    def decode_and_count(u, modality, *shape):
        if len(decoded) == stop_after:
            raise KeyboardInterrupt
        decoded.append((u.id, modality))
        return decode(u, modality, *shape)

    monkeypatch.setattr(encoders, "decode", decode_and_count)
    return decoded


@pytest.mark.parametrize("workers", [1, 2])
def test_store_keeps_what_it_decoded_once(tmp_path, monkeypatch, workers):
    utterances = corpus_of(tmp_path)
    decoded = count_decoding(monkeypatch)
    for _ in range(2):
        store = open_store(tmp_path)
        store.fill(utterances, workers)
        assert len(decoded) == len(set(decoded)) == 12
        check(store, utterances)
        assert store.problems() == PROBLEMS


@pytest.mark.parametrize("stop_after", [0, 3, 8])
def test_store_continues_after_a_kill(tmp_path, monkeypatch, stop_after):
    """Killed within a file: its beginning lies there, under another name."""
    utterances = corpus_of(tmp_path)
    before, store = count_decoding(monkeypatch, stop_after), open_store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.fill(utterances, workers=1)
    assert len(before) == len(files_of(store)) == stop_after
    (tmp_path / "store/video/u4.npy.part").write_bytes(b"\x93NUMPY")
    (tmp_path / "store/video/nothing.txt.part").write_bytes(b"mis")
    assert store.length("u4", "video") == 0 and "nothing: video mis" not in store.problems()

    after, store = count_decoding(monkeypatch), open_store(tmp_path)
    store.fill(utterances, workers=2)
    assert not set(before) & set(after) and len(after) == 12 - stop_after
    check(store, utterances)
    assert store.problems() == PROBLEMS


def test_half_a_file_is_none(tmp_path, monkeypatch):
    """Killed while the decoded sound or the reason for its absence is written."""
    utterances, store = corpus_of(tmp_path, 3), open_store(tmp_path)

    def save_half(file, x):
        file.write(b"\x93NUMPY")
        raise KeyboardInterrupt

    def write_half(path, text, **_):
        path.write_bytes(text.encode()[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(encoders.np, "save", save_half)
    monkeypatch.setattr(Path, "write_text", write_half)
    for u in utterances:
        with pytest.raises(KeyboardInterrupt):
            store.fill([u], workers=1)
        assert store.length(u.id, "audio") == store.length(u.id, "video") == 0 and not store.problems()
    monkeypatch.undo()
    store.fill(utterances, workers=1)
    check(store, utterances)


def test_store_of_one_modality(tmp_path):
    utterances = corpus_of(tmp_path, 3)
    store = open_store(tmp_path, ("audio",))
    store.fill(utterances, workers=1)
    check(store, utterances)
    assert store.problems() == ["nothing: audio missing", "u1: audio missing"]
    both = open_store(tmp_path)  # the other one comes later
    both.fill(utterances, workers=1)
    check(both, utterances)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:4],
        lambda whole: whole[:100],
        lambda whole: whole[:-1],
        lambda whole: b"words",
        lambda whole: b"PK\3\4" + whole[4:],
        lambda whole: whole.replace(b"{", b"(", 1),
    ],
    ids=["empty", "cut name", "cut header", "cut data", "text", "zip", "header"],
)
@pytest.mark.parametrize("modality", ["audio", "video"])
def test_a_damaged_file_of_the_store_is_named(tmp_path, modality, damage):
    utterances = corpus_of(tmp_path, 3)
    store = open_store(tmp_path)
    store.fill(utterances, workers=1)
    path = tmp_path / "store" / modality / "u0.npy"
    path.write_bytes(damage(path.read_bytes()))
    for ask in (store.get, store.length):
        with pytest.raises(InputError, match=f"{modality}/u0.npy: damaged .*; delete it, and it is decoded again"):
            ask("u0", modality)
    path.unlink()  # as the message says
    store.fill(utterances, workers=1)
    check(store, utterances)


def test_times_of_any_size_in_the_store(tmp_path):
    path = write_film(tmp_path / "a.avi", 1)
    times = [(0.1, 0.4), (5, 1), (1e13, 1e14), (float("inf"), float("inf")), (float("-inf"), float("inf"))]
    utterances = [utterance(path, start, end, f"u{i}") for i, (start, end) in enumerate(times)]
    store = open_store(tmp_path, ("video",))
    store.fill(utterances, workers=1)
    assert [store.length(u.id, "video") for u in utterances] == [4, 0, 0, 0, 4]
    assert all(0 <= store.bytes_for(u, m) < 1e7 for u in utterances for m in ("audio", "video"))


def test_a_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    store = MediaStore(tmp_path / "store", ("audio", "video"))
    with pytest.raises(InputError, match=r"1 utterances need 0.0 GB more, 0.0 GB are free; .* --out"):
        store.fill([utterance()], workers=1)
    assert not files_of(store)
