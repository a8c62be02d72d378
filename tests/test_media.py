"""Decoding, on files of known content, and the cache.

Frame i of a test video has a green of 5 i, at 10 frames a second; test audio is a tone that begins at ONSET.
"""

import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V
from av.stream import Disposition
from corpora import write_media
from scipy.io import wavfile

import encoders
from data import MediaError, Utterance
from encoders import MediaStore, decode, load_audio, load_frames

ONSET = 2.3  # seconds


def tone(seconds, rate=16_000, onset=0.0):
    time = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2000 * np.pi * time) * (time >= onset)  # 1000 Hz


def write_wav(path, samples):
    wavfile.write(path, 16_000, (samples * 32767).astype(np.int16))
    return path


def numbers(path, start, end):
    return (load_frames(path, start, end, size=16)[:, 1].float().mean((1, 2)) / 5).tolist()


def middles(low, high, shift=0.0):
    """The first frames at or after the middles of 8 equal parts. shift: the time of frame 0."""
    return [np.ceil(10 * (low + (high - low) * (2 * k + 1) / 16 - shift) - 1e-6) for k in range(8)]


def utterance(path, start=None, end=None, **fields):
    fields = {"id": "u", "audio": path, "video": path, "start": start, "end": end} | fields
    return Utterance(speaker="s", text="text", label=0, **fields)


H264 = ("libx264", "aac")
AUDIO = {"a.mp3": "libmp3lame", "a.m4a": "aac", "a.ogg": "libopus", "a.flac": "flac", "a.mpg": "mp2"}
AUDIO |= {"10:00:05.wav": "pcm_s16le"}  # FFmpeg would look for a protocol of this name


@pytest.mark.parametrize(
    "name, codecs, options",
    [
        ("a.mkv", H264, {"output_ts_offset": "1.4"}),
        ("a.mp4", H264, {"output_ts_offset": "100"}),
        ("a.ts", H264, {"output_ts_offset": "10"}),
        ("live.webm", ("libvpx", "libopus"), {"live": "1"}),  # no length in the container, as browsers record
        ("a.avi", ("mpeg4", "pcm_s16le"), {}),
        *[(name, (None, codec), {}) for name, codec in AUDIO.items()],
    ],
)
def test_times_are_relative_to_the_containers_start(tmp_path, monkeypatch, name, codecs, options):
    monkeypatch.chdir(tmp_path)
    path, seconds = Path(name), 5.0 if codecs[0] else 3.0
    write_media(tmp_path / name, 5 * bool(codecs[0]), tone(seconds, 48_000, ONSET), codecs, **options)
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
    with pytest.raises(MediaError, match="ends at 1.2 s, 20 ms of the utterance"):
        load_audio(tmp_path / "a.wav", 1.23)
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


@pytest.mark.parametrize(
    "name, spoil, seconds, note",
    [
        ("a.mp3", lambda x: x + b"some text behind it. " * 50, 4, "$"),
        ("a.mp3", lambda x: x + x, 8, "$"),
        ("a.aac", lambda x: x[:-40], 4, "$"),
        ("a.mp4", lambda x: x[: len(x) // 2] + bytes(64) + x[len(x) // 2 + 64 :], 4, "$"),
        ("a.mp4", lambda x: x[: len(x) * 6 // 10], 2.2, r"\d\d% of the wanted 4.0 s missing"),  # a stopped download
    ],
)
def test_a_bad_packet_costs_itself(tmp_path, name, spoil, seconds, note):
    codecs = ("libx264", "libmp3lame" if name == "a.mp3" else "aac")
    options = {"movflags": "faststart"} if name == "a.mp4" else {}  # its index in front
    path = write_media(tmp_path / name, 4 * (name == "a.mp4"), tone(4, 48_000), codecs, **options)
    path.write_bytes(spoil(path.read_bytes()))
    x, found = decode(utterance(path), "audio")
    assert len(x) == pytest.approx(16_000 * seconds, abs=3_000) and re.match(note, found)
    loud = np.abs(x[: len(x) // 160 * 160].reshape(-1, 160)).max(1) > 10_000  # per 10 ms
    assert (~loud).sum() <= 25
    assert name != "a.mp4" or re.match(note, decode(utterance(path), "video")[1])


def test_a_rotated_video_is_turned_upright(tmp_path):
    frame = load_frames(write_media(tmp_path / "a.mp4", 0.5, rotation=90), None, None, 1, 32)[0, 0].float()
    assert frame[:, :3].mean() > 100 > frame[:, -3:].mean()  # the bar at the top is at the left now


def test_the_default_stream_and_no_cover_picture(tmp_path):
    def write(*streams):
        with av.open(str(tmp_path / "a.mp4"), "w") as f:
            parts = []
            for codec, disposition, value in streams:
                stream = f.add_stream(codec, rate=10, width=64, height=48)
                stream.pix_fmt, stream.disposition = "yuv420p" if codec == "mpeg4" else "rgb24", int(disposition)
                picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), value, np.uint8), format="rgb24")
                parts.append((stream, picture))
            for stream, picture in parts:  # the header has all streams
                f.mux([*stream.encode(picture), *stream.encode()])
        return load_frames(tmp_path / "a.mp4", None, None)

    assert write(("mpeg4", 0, 255), ("mpeg4", Disposition.default, 128)).float().mean() == pytest.approx(128, abs=5)
    with pytest.raises(MediaError, match="no video in it"):
        write(("png", Disposition.attached_pic, 255))


def test_5_1_becomes_16_khz_mono(tmp_path):
    """ITU-R BS.775: left and right 0.7, centre 1, surround 0.5 (scaled to a sum of 1), no low frequency effects."""
    weights = np.array([0.7071, 0.7071, 1, 0, 0.5, 0.5])  # in the order of the channels: 1, 2, .. 6 kHz
    samples = np.stack([np.sin(2000 * np.pi * (k + 1) * np.arange(24_000) / 48_000) for k in range(6)])
    audio = load_audio(write_media(tmp_path / "a.mkv", 0, samples, (None, "flac")))
    assert audio.dtype == torch.float32 and audio.shape == (8_000,)
    amplitudes = np.abs(np.fft.rfft(audio.numpy()))[500:3001:500] / 4_000
    assert amplitudes == pytest.approx(weights / weights.sum(), abs=5e-3)


def test_which_part_of_the_audio_is_the_utterance(tmp_path):
    """All in one store: the file's content, start and end are not enough to name what was decoded."""
    path, other = write_wav(tmp_path / "a.wav", tone(36)), {"video": Path("b.avi")}
    parts = [
        (1.0, 2.5, {}, 1.5),
        (1.0, 2.5, {"audio_is_cut": True}, 35.0),  # the reader knows that the file is cut; of a longer one, 35 s
        (50.0, 86.2, other, 35.0),  # about as long as the utterance, and ends before it
        (50.0, 86.2, {}, 0),  # but it is the video's own audio
        (50.0, 55.0, other, 0),  # not as long
    ]
    each = [utterance(path, start, end, id=str(i), **fields) for i, (start, end, fields, _) in enumerate(parts)]
    store = MediaStore(tmp_path / "store", ("audio",))
    store.fill(each, workers=2)
    assert [store.length(u.id, "audio") for u in each] == [seconds * 16_000 for *_, seconds in parts]


PROBLEMS = ["nothing: audio missing", "nothing: video missing", "odd: audio not a file", "odd: video no video in it"]
PROBLEMS += ["shared: audio broken, 600 bytes (InvalidDataError)"]
PROBLEMS += ["silent: audio silent throughout", "silent: video empty file"]


def test_the_store_returns_what_was_decoded(tmp_path, capsys):
    """One utterance has good files, one shares its video, the others cannot be decoded, or not well."""
    write_media(tmp_path / "good.avi", 3)
    (tmp_path / "empty.avi").touch()
    (words := tmp_path / "words.avi").write_text("words " * 100)
    os.mkfifo(tmp_path / "pipe.wav")
    write_wav(tmp_path / "good.wav", tone(0.5))
    write_wav(tmp_path / "silent.wav", np.zeros(8_000))
    files = ("good", "good.wav", "good.avi"), ("silent", "silent.wav", "empty.avi"), ("odd", "pipe.wav", "silent.wav")
    each = [utterance(None, id=name, audio=tmp_path / audio, video=tmp_path / video) for name, audio, video in files]
    each += [utterance(each[0].video, 1.1, 1.5, id="shared", audio=words), utterance(None, id="nothing")]

    def fill(todo, said=""):
        store = MediaStore(tmp_path / "store", ("audio", "video"), frames=4, size=16)
        store.fill(each, workers=2)
        output = capsys.readouterr().out
        assert f"{todo} audio and video clips to decode" in output and said in output
        return store

    audio = each[0].audio.rename(tmp_path / "away")  # as on a disk that is not mounted: not cached
    assert "good: audio missing" in fill(6).problems()
    audio.rename(each[0].audio)
    fill(1)
    store = fill(0)
    assert store.problems() == PROBLEMS and store.index.read_text().count("\n") == 5  # each file is hashed once
    having = [(u, m) for u in each for m in ("audio", "video") if store.length(u.id, m)]
    assert len(having) == 4 == len({store.digest(u.id, m) for u, m in having}) and not store.digest("odd", "audio")
    for u, m in having:
        plain = load_audio(u.audio) if m == "audio" else load_frames(u.video, u.start, u.end, 4, 16)
        assert store.length(u.id, m) == len(plain) and store.get(u.id, m).dtype == plain.dtype
        torch.testing.assert_close(store.get(u.id, m), plain, atol=1e-4, rtol=0)

    array = store.entries["good", "audio"].path
    for damage, todo, said in [
        (lambda: array.write_bytes(array.read_bytes()[:-1]), 1, "damaged, decoded again"),
        (lambda: store.index.write_text('3\n{"a": "12'), 0, "a line that is torn or not of"),
    ]:
        damage()
        assert fill(todo, said).entries == store.entries
