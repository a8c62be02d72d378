"""Decoding, on files of known content, and the cache.

Frame i of a test video has a green of 5 i, at 10 frames a second; test audio is a tone that begins at ONSET.
"""

import os
import random
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from av.stream import Disposition
from safetensors.torch import save_file
from scipy.io import wavfile

import encoders
from data import InputError, MediaError, Utterance
from encoders import MediaStore, UnreadableError, decode, load_audio, load_frames

ONSET = 2.3  # seconds


def tone(seconds, rate=16_000, onset=0.0, hertz=1000):
    time = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * hertz * time) * (time >= onset)


def write_wav(path, samples, rate=16_000):
    """samples: float [T] or [T, channels], -1 to 1."""
    wavfile.write(path, rate, (samples * 32767).astype(np.int16))
    return path


def write_media(path, video=5.0, audio=None, codecs=("mpeg4", "aac"), begin=0.0, rotation=0, **options):
    """video: seconds; 0 for none. audio: [T] or [6, T] at 48 kHz. begin: the first time stamp, in seconds."""
    with av.open(str(path), "w", **options) as f:
        if video:
            track = f.add_stream(codecs[0], rate=10, options={"g": "12"})
            track.height, track.width = 48, 64
            track.pix_fmt = "yuv420p"
            track.set_display_rotation(rotation)
        if audio is not None:
            audio = np.atleast_2d(np.float32(audio))
            layout = "mono" if len(audio) == 1 else "5.1"
            heard = f.add_stream(codecs[1], rate=48_000, layout=layout)
            heard.bit_rate = 64_000
            frame = av.AudioFrame.from_ndarray(audio, "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = 48_000, round(begin * 48_000), Fraction(1, 48_000)
            f.mux([*heard.encode(frame), *heard.encode()])
        for i in range(round(video * 10)):
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[..., 1] = 5 * i
            picture[:8, :, 0] = 255 * (rotation != 0)  # a red bar at the top
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i + round(begin * 10), Fraction(1, 10)
            f.mux(track.encode(frame))
        if video:
            f.mux(track.encode())
    return path


def numbers(path, start, end):
    return (load_frames(path, start, end, size=16)[:, 1].float().mean((1, 2)) / 5).tolist()


def middles(low, high, shift=0.0):
    """The first frames at or after the middles of 8 equal parts. shift: the time of frame 0."""
    return [np.ceil(10 * (low + (high - low) * (2 * k + 1) / 16 - shift) - 1e-6) for k in range(8)]


def utterance(path, start=None, end=None, **fields):
    fields = {"id": "u", "audio": path, "video": path, "start": start, "end": end} | fields
    return Utterance(speaker="s", text="text", label=0, **fields)


# The right moment of the right stream

H264, LIVE = ("libx264", "aac"), {"options": {"live": "1"}}  # no length in the container, as browsers record


@pytest.mark.parametrize(
    "name, codecs, options, begin",
    [
        ("a.mkv", H264, {}, 1.4),
        ("a.mp4", H264, {}, 100.0),
        ("a.ts", H264, {"format": "mpegts"}, 10.0),
        ("a.webm", ("libvpx", "libopus"), {}, 10.0),
        ("live.webm", ("libvpx", "libopus"), LIVE, 0.0),
        ("a.avi", ("mpeg4", "pcm_s16le"), {}, 0.0),
        ("a.mp3", (None, "libmp3lame"), {}, 0.0),
        ("a.m4a", (None, "aac"), {"format": "ipod"}, 0.0),
        ("a.ogg", (None, "libopus"), {}, 0.0),
        ("a.flac", (None, "flac"), {}, 0.0),
        ("a.mpg", (None, "mp2"), {"format": "mpeg"}, 0.0),
        ("10:00:05.wav", (None, "pcm_s16le"), {}, 0.0),  # FFmpeg would look for a protocol of this name
    ],
)
def test_times_are_relative_to_the_containers_start(tmp_path, monkeypatch, name, codecs, options, begin):
    monkeypatch.chdir(tmp_path)
    path, seconds = Path(name), 5.0 if codecs[0] else 3.0
    write_media(tmp_path / name, 5 * bool(codecs[0]), tone(seconds, 48_000, ONSET), codecs, begin, **options)
    shift = 0.01 if codecs[1] == "mp2" else 0.0  # an encoder's delay that the container does not tell
    if codecs[0]:
        with av.open(str(path)) as f:
            shift = float(f.streams.video[0].start_time * f.streams.video[0].time_base) - f.start_time / 1e6
        assert numbers(path, None, None) == pytest.approx(middles(0, 5 + shift, shift), abs=1.5)
        assert numbers(path, 2.5, 3.0) == pytest.approx(middles(1.5, 4, shift), abs=1.5)
    monkeypatch.setattr(encoders, "SEARCH", 0.0)  # in short files, too, a seek may then end too late
    for start, end in [(0.0, None), (2.0, 2.9), (2.2, None)]:
        audio = load_audio(path, start, end)
        onset = float((audio.abs() > 0.1).float().argmax()) / 16_000
        assert onset + start == pytest.approx(ONSET + shift, abs=0.01)
        assert len(audio) / 16_000 == pytest.approx((end or seconds) - start, abs=0.06)


def test_wav_and_avi_give_their_plain_content(tmp_path):
    """The formats of IEMOCAP and of the demo: every sample, and every frame by its number."""
    samples = np.random.default_rng(0).integers(-32767, 32767, (20_000, 2)) / 32767
    audio = load_audio(write_wav(tmp_path / "a.wav", samples))
    torch.testing.assert_close(audio, torch.from_numpy(samples.mean(1)).float(), atol=2**-14, rtol=0)
    path = write_media(tmp_path / "a.avi")
    with av.open(str(path)) as f:
        plain = [torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) for frame in f.decode(video=0)]
    for start, end, low, high in [(None, None, 0, 5), (2.0, 3.1, 1, 4.1), (3.6, 4.8, 2.6, 5)]:
        for frame, number in zip(load_frames(path, start, end, size=32), middles(low, high)):
            assert torch.equal(frame, V.resize(plain[int(number)], [32, 32], antialias=True))


def test_the_last_time_stamp_of_the_video_is_its_end(tmp_path):
    path = write_media(tmp_path / "a.mp4", 5, tone(8, 48_000))
    assert numbers(path, None, None) == pytest.approx(middles(0, 5), abs=1)
    assert decode(utterance(path, 3.5, 4.9), "video")[1] == ""
    assert decode(utterance(path, 4.5, 7.0), "video")[1].startswith("80% of the wanted 2.5 s missing")
    with pytest.raises(MediaError, match="ends at 5.0 s, before the utterance"):
        load_frames(path, 5.5, 7.0)


NOISE, MISSING = random.Random(0).randbytes(12_000), r"\d\d% of the wanted 4.0 s missing"


@pytest.mark.parametrize(
    "name, spoil, seconds, note",
    [
        ("a.mp3", lambda x: x + b"some text behind it. " * 50, 4, "$"),
        ("a.mp3", lambda x: x + x, 8, "$"),
        ("a.aac", lambda x: x[:-40], 4, "$"),
        ("a.mp4", lambda x: x[: len(x) // 2] + NOISE[:64] + x[len(x) // 2 + 64 :], 4, "$"),
        ("a.m4a", lambda x: x[: len(x) // 3] + NOISE + x[len(x) // 3 + len(NOISE) :], 4, MISSING),
        ("a.mp4", lambda x: x[: len(x) * 6 // 10], 2.2, MISSING),  # a download that stopped
    ],
)
def test_a_bad_packet_costs_itself(tmp_path, name, spoil, seconds, note):
    codecs = ("libx264", "libmp3lame" if name == "a.mp3" else "aac")
    options = {"options": {"movflags": "faststart"}} if name == "a.mp4" else {}  # its index in front
    path = write_media(tmp_path / name, 4 * (name == "a.mp4"), tone(4, 48_000), codecs, **options)
    path.write_bytes(spoil(path.read_bytes()))
    x, found = decode(utterance(path), "audio")
    assert len(x) == pytest.approx(16_000 * seconds, abs=3_000) and re.match(note, found)
    loud = np.abs(x[: len(x) // 160 * 160].reshape(-1, 160)).max(1) > 10_000  # per 10 ms
    assert (~loud).sum() <= 25 or note != "$"
    assert name != "a.mp4" or re.match(note, decode(utterance(path), "video")[1])


def test_a_rotated_video_is_turned_upright(tmp_path):
    frame = load_frames(write_media(tmp_path / "a.mp4", 0.5, rotation=90), None, None, 1, 32)[0, 0].float()
    sides = {"left": frame[:, :3], "right": frame[:, -3:], "top": frame[:3], "bottom": frame[-3:]}
    assert max(sides, key=lambda name: sides[name].mean()) == "left"


def test_the_default_stream_and_no_cover_picture(tmp_path):
    pictures = [av.VideoFrame.from_ndarray(np.full((48, 64, 3), x, np.uint8), format="rgb24") for x in (255, 128)]
    with av.open(str(tmp_path / "a.mkv"), "w") as f:
        streams = [f.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p") for _ in pictures]
        streams[1].disposition = int(Disposition.default)
        for stream, picture in zip(streams, pictures):
            f.mux([*stream.encode(picture), *stream.encode()])
    assert load_frames(tmp_path / "a.mkv", None, None).float().mean() == pytest.approx(128, abs=5)
    with av.open(str(tmp_path / "a.mp3"), "w") as f:
        audio = f.add_stream("libmp3lame", rate=48_000)
        cover = f.add_stream("png", rate=10, width=64, height=48, pix_fmt="rgb24")
        cover.disposition = int(Disposition.attached_pic)
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 48_000), np.float32), "fltp", "stereo")
        silence.sample_rate = 48_000
        for stream, frame in ((audio, silence), (cover, pictures[0])):
            f.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(MediaError, match="no video in it"):
        load_frames(tmp_path / "a.mp3", None, None)


def test_5_1_becomes_16_khz_mono(tmp_path):
    """ITU-R BS.775: left and right 0.7, centre 1, surround 0.5 (scaled to a sum of 1), no low frequency effects."""
    weights = np.array([0.7071, 0.7071, 1, 0, 0.5, 0.5])  # in the order of the channels
    for channel, weight in enumerate(weights / weights.sum()):
        samples = np.zeros((6, 24_000))
        samples[channel] = 2 * tone(0.5, 48_000)
        audio = load_audio(write_media(tmp_path / f"{channel}.mkv", 0, samples, (None, "flac")))
        assert audio.dtype == torch.float32 and audio.shape == (8_000,)
        assert audio[800:-800].abs().max() == pytest.approx(weight, abs=2e-3)
        assert not weight or np.abs(np.fft.rfft(audio.numpy())).argmax() == 500  # of 1,000 Hz, in half a second


@pytest.mark.parametrize(
    "start, end, fields, seconds",
    [
        (None, None, {}, 3.0),  # all of the file
        (1.0, 2.5, {}, 1.5),
        (1.0, 2.5, {"audio_is_cut": True}, 3.0),  # the reader knows that the file is cut
        (50.0, 53.2, {"video": Path("b.avi")}, 3.0),  # about as long as the utterance, and ends before it
        (50.0, 53.2, {}, None),  # but it is the video's own audio
        (50.0, 55.0, {"video": Path("b.avi")}, None),  # not as long
        (2.5, 1.0, {}, None),
    ],
)
def test_which_part_of_the_audio_is_the_utterance(tmp_path, start, end, fields, seconds):
    u = utterance(write_wav(tmp_path / "a.wav", tone(3)), start, end, **fields)
    if seconds:
        assert len(decode(u, "audio")[0]) == seconds * 16_000
    else:
        with pytest.raises(MediaError, match="the utterance"):
            decode(u, "audio")


# What cannot be decoded affects one utterance only


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "^missing"),
        (os.mkfifo, "^not a file"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_text("words " * 100), "broken, 600 bytes"),
        (lambda path: write_wav(path, np.zeros(0)), "no (audio|video) in it"),
        (lambda path: write_wav(path, tone(0.02)), "ends at 0.0 s, 20 ms of|no video"),
        (lambda path: write_wav(path, tone(0.1), 2_000_000_000), "samples per second|no video"),
    ],
)
def test_broken_files(tmp_path, make, message):
    make(tmp_path / "clip.mp4")
    for modality in ("audio", "video"):
        with pytest.raises(MediaError, match=message) as caught:
            decode(utterance(tmp_path / "clip.mp4"), modality)
        assert isinstance(caught.value, UnreadableError) == (message[0] == "^")


# The cache

PROBLEMS = ["nothing: audio missing", "nothing: video missing", "shared: audio missing", "u1: audio missing"]
PROBLEMS += ["u2: audio silent throughout", "u2: video empty file"]


def corpus_of(folder):
    """One utterance has no audio file, one silence and an empty video, one neither; two share a video."""
    folder.mkdir()
    utterances = []
    for i in range(3):
        write_media(folder / f"{i}.avi", 3 + 0.2 * i)
        audio = write_wav(folder / f"{i}.wav", tone(0.5 + 0.1 * i) * (i != 2))
        utterances.append(Utterance(f"u{i}", "s", "text", 0, audio, folder / f"{i}.avi"))
    (folder / "1.wav").unlink()
    (folder / "2.avi").write_bytes(b"")
    shared = Utterance("shared", "s", "text", 0, None, folder / "0.avi", 1.1, 1.5)
    return [*utterances, shared, Utterance("nothing", "s", "text", 0, None, None)]


@pytest.fixture
def decoded(monkeypatch):
    """What is decoded, in a list that a test may clear."""
    names = []
    monkeypatch.setattr(encoders, "decode", lambda u, m, *shape: names.append(f"{u.id} {m}") or decode(u, m, *shape))
    return names


def filled(folder, utterances, modalities=("audio", "video")):
    store = MediaStore(folder, modalities, frames=4, size=16)
    store.fill(utterances, workers=2)
    return store


def test_the_store_returns_what_was_decoded(tmp_path, decoded):
    utterances = corpus_of(tmp_path / "corpus")
    for _ in range(2):  # the second one from disk
        store = filled(tmp_path / "store", utterances)
        assert len(decoded) == len(set(decoded)) == 6 and store.problems() == PROBLEMS
    having = [(u, m) for u in utterances for m in ("audio", "video") if store.length(u.id, m)]
    assert len(having) == 5 == len({store.digest(u.id, m) for u, m in having}) and not store.digest("u1", "audio")
    assert (tmp_path / "store/index.jsonl").read_text().count("\n") == 5  # each file is hashed once
    for u, m in having:
        plain = load_audio(u.audio) if m == "audio" else load_frames(u.video, u.start, u.end, 4, 16)
        assert store.length(u.id, m) == len(plain) and store.get(u.id, m).dtype == plain.dtype
        torch.testing.assert_close(store.get(u.id, m), plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "damage, again, said",
    [
        (lambda array, index: array.write_bytes(array.read_bytes()[:-1]), 1, "damaged, decoded again"),
        (lambda array, index: save_file({"array": torch.zeros(3)}, array), 1, "damaged, decoded again"),
        (lambda array, index: index.write_text('3\n{"a": "12'), 0, "a line that is torn or not of"),
    ],
)
def test_a_damaged_store_is_repaired(tmp_path, decoded, capsys, damage, again, said):
    u = corpus_of(tmp_path / "corpus")[0]
    before = filled(tmp_path / "store", [u])
    decoded.clear()
    damage(before.entries["u0", "audio"].path, tmp_path / "store/index.jsonl")
    for _ in range(2):
        after = filled(tmp_path / "store", [u])
        assert decoded == ["u0 audio"] * again and after.entries == before.entries
    assert said in capsys.readouterr().out


def test_one_file_as_audio_and_as_video(tmp_path):
    """A clip that is as long as the utterance is its audio if it is not the video, which other times belong to."""
    path = write_wav(tmp_path / "a.wav", tone(3))
    own, other = utterance(path, 50.0, 53.0), utterance(path, 50.0, 53.0, id="v", video=Path("b.avi"))
    for utterances in ([own, other], [other, own]):
        store = filled(tmp_path / "store", utterances, ("audio",))
        assert (store.length("u", "audio"), store.length("v", "audio")) == (0, 48_000)


def test_what_may_come_back_is_not_cached(tmp_path, monkeypatch):
    """A disk that is not mounted, and one that fails while a file is read."""
    utterances = corpus_of(tmp_path / "corpus")
    audio = utterances[0].audio.rename(tmp_path / "away")
    assert "u0: audio missing" in filled(tmp_path / "store", utterances, ("audio",)).problems()
    audio.rename(utterances[0].audio)
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "hash_file", os.listdir)
        assert "u0: audio cannot be read (Not a directory)" in filled(tmp_path / "store", utterances).problems()
    assert filled(tmp_path / "store", utterances).problems() == PROBLEMS


def test_a_disk_too_small(tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(encoders.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"6 decoded clips need 0.0 GB, and 0.0 are free; .* --media"):
        filled(tmp_path / "store", corpus_of(tmp_path / "corpus"))
    assert not decoded
