"""Sound and pictures: decoding one utterance, and a store that decodes each file of a corpus once.

The encoders want 16 kHz mono sound and 8 small RGB frames per utterance; files come as WAV, AVI, MP4 or whatever PyAV
reads. Decoding costs far more than what follows it, so `MediaStore` does it once, keeps the result on disk (16-bit
sound, 8-bit frames) and hands out memory-mapped slices: RAM stays flat however large the corpus.

Not here: which files belong to an utterance (data.py), and what a checkpoint's processor wants (encoders.py).
"""

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
import torchaudio.functional as A
import torchvision.transforms.v2.functional as V
from torch import Tensor
from tqdm import tqdm

from data import InputError, Utterance

RATE = 16_000  # Hz, what every speech encoder of this family was trained on
FRAMES = 8  # TimeSformer's clip length
MAX_SECONDS = 35.0  # IEMOCAP's longest utterance has 34 s; some of MELD's clips are wrong cuts of 5 minutes
MIN_SAMPLES = 400  # 25 ms, one step of the encoder's convolutions
MARGIN = 1.0  # seconds of video before and after an utterance of a longer film

av.logging.set_level(
    av.logging.PANIC
)  # the report names broken files; FFmpeg's own lines would only drown the progress


class MediaError(Exception):
    """One file cannot be decoded; the message says why. The run goes on without it."""


def load_audio(path: Path, start: float = 0.0, end: float | None = None) -> Tensor:
    """The sound of a file from `start` to `end` (seconds), at most MAX_SECONDS of it. float32 [T], 16 kHz mono.

    Errors: MediaError for a file that is missing, broken or without sound, or shorter than 25 ms.
    """
    end = min(start + MAX_SECONDS, float("inf") if end is None else end)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise MediaError("no sound in it")
            stream = container.streams.audio[0]
            if start > 0:
                container.seek(int(start * av.time_base))
            planar, parts, offset = av.AudioResampler(format="fltp"), [], None
            for frame in container.decode(stream):
                time = 0.0 if frame.time is None else frame.time
                if time >= end:
                    break
                offset = time if offset is None else offset
                parts += [p.to_ndarray().mean(axis=0) for p in planar.resample(frame)]
    except (av.FFmpegError, OSError, ValueError) as e:
        raise MediaError(_reason(path, e)) from e
    if not parts:
        raise MediaError("no sound in it")
    sound = torch.from_numpy(np.concatenate(parts))
    first = max(0, round((start - offset) * frame.sample_rate))
    sound = sound[first : first + round((end - max(start, offset)) * frame.sample_rate)]
    if not len(sound):
        raise MediaError(f"ends before {start:.1f} s, where the utterance begins")
    sound = A.resample(sound, frame.sample_rate, RATE)
    if len(sound) < MIN_SAMPLES:
        raise MediaError(f"only {len(sound) / RATE * 1000:.0f} ms of sound")
    return sound.clamp(-1, 1)


def load_frames(path: Path, start: float | None = None, end: float | None = None, size: int = 224) -> Tensor:
    """8 frames spread evenly over an utterance. uint8 [8, 3, size, size], RGB.

    start, end: seconds; the window is a second wider on both sides. None: all of the file, at most MAX_SECONDS of it.
    The whole picture is squeezed to a square: actors sit at its edges, where a centre crop would cut them off.
    Errors: MediaError for a file that is missing, broken or without pictures in that window.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError("no picture in it")
            stream = container.streams.video[0]
            length = container.duration / av.time_base if container.duration else MAX_SECONDS
            low = max(0.0, start - MARGIN) if start is not None else 0.0
            high = min(length, end + MARGIN if end is not None else length, low + MAX_SECONDS)
            if high <= low:
                raise MediaError(f"ends at {length:.1f} s, before the utterance")
            times = np.linspace(low, high, 2 * FRAMES + 1)[1::2]  # the middles of 8 equal parts
            if low > 0:
                container.seek(int(low * av.time_base))  # to the key frame before
            frames = _pick(container.decode(stream), times, float(stream.average_rate or 25))
    except (av.FFmpegError, OSError, ValueError) as e:
        raise MediaError(_reason(path, e)) from e
    if not frames:
        raise MediaError("no picture in it")
    frames += frames[-1:] * (FRAMES - len(frames))  # the film ends early: its last frame stands still
    return V.resize(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), [size, size], antialias=True)


def _pick(film: Iterable[av.VideoFrame], times: np.ndarray, rate: float) -> list[np.ndarray]:
    """The first frame at or after each time (the last frame for times behind the end), as RGB [H, W, 3]."""
    picked, last = [], None
    for number, last in enumerate(film):
        time = number / rate if last.time is None else last.time
        while len(picked) < len(times) and time >= times[len(picked)]:
            picked.append(last.to_ndarray(format="rgb24"))
        if len(picked) == len(times):
            return picked
    return picked if last is None else [*picked, last.to_ndarray(format="rgb24")]


def _reason(path: Path, error: Exception) -> str:
    path = Path(path)
    if not path.exists():
        return "missing"
    size = path.stat().st_size
    return "empty file" if size == 0 else f"broken, {size} bytes ({type(error).__name__})"


class MediaStore:
    """Decoded sound and frames of utterances, by id, in three files of `folder`:

    audio.i16, all sound one after the other; frames.u8, [rows, 8, 3, size, size]; index.jsonl, a line per utterance,
    written after its data. A killed run therefore goes on at the first utterance without a line.
    """

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = Path(folder), size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = self._read_index()
        self._open()

    @property
    def problems(self) -> list[str]:
        """One line per file that could not be decoded."""
        return [f"{i}: {kind} {why}" for i, line in self.index.items() for kind, why in line["problems"].items()]

    def fill(self, utterances: list[Utterance], workers: int) -> None:
        """Decodes what is not in the store yet. Threads: FFmpeg and torch leave Python's lock while they work.

        RAM: 64 utterances at a time, 80 MB of frames at 224 x 224. Errors: InputError if the disk is too small.
        """
        todo = [u for u in utterances if u.id not in self.index]
        if not todo:
            return
        seconds = sum(4.0 if u.end is None else u.end - u.start for u in todo)
        need, free = len(todo) * self._frame_bytes + int(seconds * RATE * 2), shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(
                f"{self.folder}: the decoded sound and frames of {len(todo)} utterances need {need / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free; give a folder on a larger disk with --out"
            )
        print(f"decoding {len(todo)} utterances into {self.folder}: about {need / 1e9:.1f} GB", flush=True)
        with (
            open(self.folder / "audio.i16", "ab") as sound_file,
            open(self.folder / "frames.u8", "ab") as frame_file,
            open(self.folder / "index.jsonl", "a") as index_file,
            ThreadPoolExecutor(workers) as pool,
            tqdm(total=len(todo), desc="decoding", unit=" utterances", disable=None) as progress,
        ):
            for block in (todo[i : i + 64] for i in range(0, len(todo), 64)):
                for utterance, (sound, frames, problems) in zip(block, pool.map(self._decode, block)):
                    line = {"id": utterance.id, "sound": None, "frames": None, "problems": problems}
                    if sound is not None:
                        line["sound"] = [sound_file.tell() // 2, len(sound)]
                        sound_file.write(sound.tobytes())
                    if frames is not None:
                        line["frames"] = frame_file.tell() // self._frame_bytes
                        frame_file.write(frames.tobytes())
                    sound_file.flush()
                    frame_file.flush()
                    index_file.write(json.dumps(line) + "\n")
                    index_file.flush()
                    self.index[utterance.id] = line
                    progress.update()
        self._open()

    def length(self, utterance_id: str, modality: str) -> int:
        """Samples of its "audio" or frames of its "video"; 0 if the utterance lacks it."""
        line = self.index[utterance_id]
        return (line["sound"] or (0, 0))[1] if modality == "audio" else FRAMES * (line["frames"] is not None)

    def audio(self, utterance_id: str) -> Tensor:
        """float32 [T], 16 kHz mono, -1 to 1. Not for an utterance of length 0."""
        start, samples = self.index[utterance_id]["sound"]
        return torch.from_numpy(self._sound[start : start + samples] / np.float32(32767))

    def video(self, utterance_id: str) -> Tensor:
        """uint8 [8, 3, size, size], RGB. Not for an utterance of length 0."""
        return torch.from_numpy(self._frames[self.index[utterance_id]["frames"]].copy())

    @property
    def _frame_bytes(self) -> int:
        return FRAMES * 3 * self.size * self.size

    def _decode(self, u: Utterance) -> tuple[np.ndarray | None, np.ndarray | None, dict[str, str]]:
        sound, frames, problems = None, None, {}
        try:
            if u.audio is None:
                raise MediaError("missing")
            sound = (load_audio(u.audio) * 32767).round().to(torch.int16).numpy()
        except MediaError as e:
            problems["sound"] = str(e)
        try:
            if u.video is None:
                raise MediaError("missing")
            frames = load_frames(u.video, u.start, u.end, self.size).numpy()
        except MediaError as e:
            problems["picture"] = str(e)
        return sound, frames, problems

    def _read_index(self) -> dict[str, dict]:
        """The whole lines of the index; what a killed run left behind them is cut off, in all three files."""
        path = self.folder / "index.jsonl"
        whole = (
            [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            if path.exists()
            else []
        )
        lines = [json.loads(line) for line in whole]
        ends = {
            "index.jsonl": sum(map(len, whole)),
            "audio.i16": 2 * sum(line["sound"][1] for line in lines if line["sound"]),
            "frames.u8": self._frame_bytes * sum(line["frames"] is not None for line in lines),
        }
        for name, end in ends.items():
            with open(self.folder / name, "ab") as f:
                if f.tell() < end:
                    raise InputError(f"{self.folder / name} is shorter than its index says; delete {self.folder}")
                f.truncate(end)
        return {line["id"]: line for line in lines}

    def _open(self) -> None:
        def read(name: str, dtype: type) -> np.ndarray:
            path = self.folder / name  # an empty file cannot be mapped
            return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)

        self._sound = read("audio.i16", np.int16)
        self._frames = read("frames.u8", np.uint8).reshape(-1, FRAMES, 3, self.size, self.size)
