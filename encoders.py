"""Stage 1's encoders: from files to one feature (a vector) per utterance, for text (Eq. 1-3), audio (4) and video (5).

An encoder is a pretrained transformer (a hub name, or a folder written by `save_pretrained`), a rule for which of its
output vectors stands for the utterance, a linear layer where its width is not d, and a linear classifier. All are
called alike: `features, logits = encoder(examples)`, [B, d] and [B, C].
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torchaudio.functional as A
import torchvision.transforms.v2.functional as V
import transformers
from av.format import Flags
from av.stream import Disposition
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from data import Conversation, InputError, MediaError, Utterance, append_line, digest, replace_file

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries without a network; our error says it once
av.logging.set_level(av.logging.PANIC)  # the report names broken files; FFmpeg's own lines would hide the progress

RATE = 16_000  # Hz, what every speech encoder of this family was trained on
MAX_SECONDS = 35.0  # IEMOCAP's longest utterance has 34 s; some of MELD's clips are wrong cuts of 5 minutes
SHORTEST = 4_800  # samples (0.3 s); shorter clips are padded: SpecAugment raises on clips shorter than its masks
MARGIN = 1.0  # seconds of video before and after an utterance of a longer recording
LEAD = 1.0  # seconds of audio decoded before the window: MP3 and Opus packets need those before them
SEARCH = 10.0  # seconds before the window at which MPEG streams are searched: they have no index of key frames
# The mean of ITU-R BS.775's stereo: left and right at 1, the centre at 0.7 on both sides, surround at 0.7 on its own.
MIX = {"FL": 0.7071, "FR": 0.7071, "FC": 1.0, "LFE": 0.0, "BL": 0.5, "BR": 0.5, "SL": 0.5, "SR": 0.5, "BC": 0.5}
SPEAKER_TOKENS = [f"<s{i}>" for i in range(1, 10)]  # MELD has at most 9 speakers in a conversation; a tenth shares <s9>


# From a file to audio and frames


class UnreadableError(MediaError):
    """The file is missing or cannot be read now. This may change, so it is not cached."""


class Window:
    """A stretch of one stream: its packets, not yet decoded. Times are in seconds from the container's start.

    All packets are read first, since only the last time stamp tells where a stream ends: containers may name no length.
    """

    def __init__(self, container, stream, start: float, end: float, seek: bool):
        audio = stream.type == "audio"
        self.stream, self.packets = stream, []  # [(seconds, packet)], from the last one where decoding may begin
        self.begin = self.end = self.lost = 0.0  # of the packets; seconds of those that could not be decoded
        self.step = 0.0 if audio else float(1 / (stream.average_rate or 25))  # of packets that name no duration
        self.origin = max(0, container.start_time or 0) / av.time_base  # below 0 lies only an encoder's delay
        flags = Flags(container.format.flags)
        self.named_end = None  # as the container's index has it
        if stream.duration and not flags & (Flags.generic_index | Flags.ts_discont):
            self.named_end = self._seconds((stream.start_time or 0) + stream.duration)
        needed = start - LEAD if audio else start
        target = min(needed, 1e9) - (SEARCH if flags & Flags.ts_discont else 0)
        seek = seek and target > 0 and not flags & Flags.generic_index
        if seek:
            with suppress(av.FFmpegError):  # then the packets are read from the beginning
                container.seek(int((target + self.origin) * av.time_base))
        for packet in container.demux(stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if not packet.size or seek and stamp is None and not self.packets:
                continue
            time = self.end if stamp is None else self._seconds(stamp)
            if not self.packets or 0 < time <= needed and packet.is_keyframe:
                self.packets, self.begin = [], time
            seconds = float(packet.duration * stream.time_base) or self.step
            self.packets.append((seconds, packet))
            self.end = max(self.end, time + seconds)
            if packet.dts is not None and self._seconds(packet.dts) > end:  # no earlier frame can follow
                break

    def _seconds(self, stamp: int) -> float:
        return float(stamp * self.stream.time_base) - self.origin

    def frames(self) -> Iterator[tuple[float, av.AudioFrame | av.VideoFrame]]:
        """(time, frame) in the order of presentation. A packet that cannot be decoded is skipped."""
        last = av.Packet()  # an empty packet makes the decoder return what it still holds
        last.time_base = self.stream.time_base
        time = self.begin
        for seconds, packet in [*self.packets, (0.0, last)]:
            try:
                frames = self.stream.codec_context.decode(packet)
            except av.FFmpegError:
                self.lost += seconds
                continue
            for frame in frames:
                time = time if frame.time is None else frame.time - self.origin
                yield time, frame
                time += self.step


@contextmanager
def open_window(path: Path, kind: str, start: float, end: float) -> Iterator[Window]:
    """Opens a file and reads its "audio" or "video" from `start` to `end` (seconds), with what its decoding needs.

    A seek is tried first, except in formats whose packets have no time stamps of their own (MP3, Ogg, WAV, ..). If it
    ends too late, the packets are read from the beginning of the file.
    Errors: MediaError for a file without such a stream; UnreadableError; what PyAV raises for a broken file.
    """
    for seek in (start > 0, False):
        with av.open(absolute(path)) as container:
            streams = [s for s in getattr(container.streams, kind) if s.codec_context is not None]
            streams = [s for s in streams if not s.disposition & Disposition.attached_pic]  # a cover picture
            if not streams:
                raise MediaError(f"no {kind} in it")
            default = max(streams, key=lambda s: bool(s.disposition & Disposition.default))  # the first, if none is
            window = Window(container, default, start, end, seek)
            if not seek or window.packets and window.begin <= start:
                yield window
                return


def absolute(path: Path | None) -> str:
    """FFmpeg takes a relative name with a colon for a URL. Errors: UnreadableError."""
    if path is None or not os.path.isfile(path):  # False, without an error, for names that no disk can hold
        raise UnreadableError("not a file" if path is not None and os.path.exists(path) else "missing")
    return os.path.abspath(path)


def load_audio(path: Path, start: float = 0.0, end: float | None = None) -> Tensor:
    """Audio from `start` to `end` (seconds), at most MAX_SECONDS. float32 [T], 16 kHz mono. Errors: MediaError."""
    return _load_audio(path, start, end)[0]


def _load_audio(path: Path, start: float, end: float | None) -> tuple[Tensor, str]:
    start = max(0.0, start)
    stop = min(start + MAX_SECONDS, float("inf") if end is None else end)
    parts, count, rate, begin, gaps, packers = [], 0, None, 0.0, 0.0, {}
    with open_window(path, "audio", start, stop) as window:
        for time, frame in window.frames():
            if time >= stop:
                break
            if rate is None:
                rate, begin = frame.sample_rate, time
            samples = _to_mono(frame, rate, packers)
            position = begin + count / rate
            if time - position > 0.01:  # seconds; silence is inserted
                gaps += max(0.0, time - max(start, position))
                samples = np.concatenate([np.zeros(round((time - position) * rate), np.float32), samples])
            parts.append(samples)
            count += len(samples)
    if not count:
        is_before = 0 < window.end <= start
        raise MediaError(f"ends at {window.end:.1f} s, before the utterance" if is_before else "no audio in it")
    first = max(0, round((start - begin) * rate))
    audio = torch.from_numpy(np.concatenate(parts))[first : first + round((stop - max(start, begin)) * rate)]
    if len(audio) < 0.025 * rate:  # one step of the encoder's convolutions
        raise MediaError(f"ends at {begin + count / rate:.1f} s, {1000 * len(audio) / rate:.0f} ms of the utterance")
    note = _loss(window, len(audio) / rate - gaps, start, end)
    # To the nearest 25 Hz, which nobody hears: the resampler's memory grows with rate / gcd(rate, RATE).
    audio = A.resample(audio, max(25, round(rate / 25) * 25), RATE)
    audio = audio.nan_to_num().clamp(-1, 1)
    return audio, "silent throughout" if audio.abs().max() < 1e-4 else note  # three steps of 16 bits


def _to_mono(frame: av.AudioFrame, rate: int, packers: dict) -> np.ndarray:
    """float32 [T] at `rate`. By MIX where all channels are named, else their mean."""
    weights = np.array([MIX.get(channel.name, np.nan) for channel in frame.layout.channels], np.float32)
    weights = weights if weights.sum() > 0 else np.ones_like(weights)
    # Packed: PyAV crashes on 8 planes and more. Mixed here, since FFmpeg's own mix of equal channels clips.
    key = frame.format.name, frame.layout.name, frame.sample_rate  # may change where files were joined to one
    packed = packers.setdefault(key, av.AudioResampler(format="flt", rate=rate)).resample(frame)
    return np.concatenate([p.to_ndarray().reshape(-1, len(weights)) @ (weights / weights.sum()) for p in packed])


def _loss(window: Window, got: float, start: float, end: float | None) -> str:
    """For the report, if too much of the wanted window is missing. got: seconds that could be decoded."""
    wanted_end = end if end is not None else window.named_end or window.end
    wanted = min(wanted_end - start, MAX_SECONDS)
    share = 1 - got / wanted if wanted > 0 else 0.0
    return f"{share:.0%} of the wanted {wanted:.1f} s missing (damaged, or after the end)" if share > 0.1 else ""


def load_frames(path: Path, start: float | None, end: float | None, count: int = 8, size: int = 224) -> Tensor:
    """Frames spread evenly over an utterance. uint8 [count, 3, size, size], RGB.

    start, end: seconds; the window is a second wider on both sides. None: all of the file, at most MAX_SECONDS of it.
    The whole picture is squeezed to a square: a centre crop would cut off actors at its edges. Errors: MediaError.
    """
    return _load_frames(path, start, end, count, size)[0]


def _load_frames(path: Path, start: float | None, end: float | None, count: int, size: int) -> tuple[Tensor, str]:
    low = 0.0 if start is None else max(0.0, start - MARGIN)
    high = min(low + MAX_SECONDS, float("inf") if end is None else end + MARGIN)
    with open_window(path, "video", low, high) as window:
        high = min(high, window.end)
        if high <= max(low, start or 0.0):
            raise MediaError(f"ends at {window.end:.1f} s, before the utterance")
        times = np.linspace(low, high, 2 * count + 1)[1::2]  # the middles of `count` equal parts
        pictures, frame = [], None
        for time, frame in window.frames():
            due = int((times <= time).sum()) - len(pictures)  # the first frame at or after each time
            if due > 0:
                pictures += [_picture(frame, size)] * due
            if len(pictures) == count:
                break
        if frame is None:
            raise MediaError("no frame of its video can be decoded")
        pictures += [_picture(frame, size)] * (count - len(pictures))  # the last frame for times after the end
    start = start or 0.0
    got = min(window.end, float("inf") if end is None else end) - start - window.lost
    return torch.stack(pictures), _loss(window, got, start, end)


def _picture(frame: av.VideoFrame, size: int) -> Tensor:
    """uint8 [3, size, size], RGB, upright: phones store it as the sensor lies, and the rotation beside it."""
    x = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)).copy()
    return V.resize(torch.from_numpy(x).permute(2, 0, 1), [size, size], antialias=True)


def decode(u: Utterance, modality: str, frames: int = 8, size: int = 224) -> tuple[np.ndarray, str]:
    """An utterance's "audio", int16 [T] at 16 kHz, or "video", uint8 [frames, 3, size, size]; a note for the report.

    Audio is cut to the utterance's start and end, unless the file holds this utterance only: `u.audio_is_cut`, or
    another file than the video, that ends before `u.end` and is about as long as the utterance.
    Errors: MediaError that says why there is none; UnreadableError if that may change.
    """
    path = getattr(u, modality)
    start, end = (None, None) if modality == "audio" and u.audio_is_cut else (u.start, u.end)
    try:
        if modality == "video":
            x, note = _load_frames(path, start, end, frames, size)
            return x.numpy(), note
        if end is not None and path != u.video:
            with av.open(absolute(path)) as container:
                seconds = (container.duration or 0) / av.time_base
            if seconds < end and abs(seconds - (end - (start or 0.0))) <= 0.5:
                start, end = None, None
        x, note = _load_audio(path, start or 0.0, end)
        return (x * 32767).round().to(torch.int16).numpy(), note
    except MediaError:
        raise
    except Exception as e:  # a damaged file makes PyAV raise nearly anything; it affects only this utterance
        length = os.path.getsize(path)
        raise MediaError(f"broken, {length} bytes ({type(e).__name__})" if length else "empty file") from e


# The cache of decoded media

DECODER_VERSION = 1  # part of every key: raise it with a change above that makes `decode` return other values


class Entry(NamedTuple):
    path: Path | None = None  # of the array; None: the media file cannot be read now
    digest: str = ""  # of the decoded content; "" if there is none
    note: str = ""  # for the report: why there is none, or what is wrong with it
    length: int = 0  # samples or frames; 0 if there is none


class MediaStore:
    """Decoded audio and frames, so that no file is decoded twice.

    folder/MODALITY/KEY.safetensors contains what `decode` returns, of length 0 for broken media. KEY is a hash of the
    media file's content, the window, `frames`, `size` and DECODER_VERSION, so runs can share the folder, and it can be
    moved. folder/index.jsonl has the hash of each media file, whose size and time decide whether it is hashed again.
    """

    def __init__(self, folder: Path, modalities: tuple[str, ...], frames: int = 8, size: int = 224):
        self.folder, self.modalities, self.frames, self.size = Path(folder), modalities, frames, size
        self.index = self.folder / "index.jsonl"
        self.hashes: dict[str, str] = {}  # "size, time and path" of a media file -> hash of its content
        self.entries: dict[tuple[str, str], Entry] = {}  # by utterance and modality, of the last `fill`

    def fill(self, utterances: list[Utterance], workers: int) -> None:
        """Decodes what is not in the store yet, in threads: FFmpeg and torch release Python's lock while they work.

        The methods below are about these utterances. Errors: InputError or OSError if the folder cannot be used.
        """
        for m in self.modalities:
            (self.folder / m).mkdir(parents=True, exist_ok=True)
        for line in self.index.read_bytes().splitlines() if self.index.exists() else ():
            try:
                self.hashes |= json.loads(line)
            except (ValueError, TypeError):
                print(f"{self.index}: a line that is torn or not of this program is ignored", flush=True)
        wanted = [(u, m) for u in utterances for m in self.modalities]
        files = list({getattr(u, m): None for u, m in wanted})  # one video may serve many utterances
        with ThreadPoolExecutor(workers) as pool:
            hashes = dict(zip(files, pool.map(self._hash, files)))
            self.entries = {(u.id, m): self._find(u, m, hashes[getattr(u, m)]) for u, m in wanted}
            todo = {entry.path: at for at, entry in zip(wanted, self.entries.values()) if entry == Entry(entry.path)}
            print(f"{self.folder}: {len(todo)} audio and video clips to decode", flush=True)
            made = tqdm(pool.map(self._make, todo, todo.values()), "decoding", len(todo), unit=" clips", disable=None)
            made = dict(zip(todo, made))
            self.entries = {at: made.get(entry.path, entry) for at, entry in self.entries.items()}

    def get(self, utterance_id: str, modality: str) -> Tensor:
        """Audio: float32 [T], 16 kHz mono, -1 to 1. Video: uint8 [frames, 3, size, size], RGB."""
        x = load_file(self.entries[utterance_id, modality].path)["array"]
        return x / 32767 if modality == "audio" else x

    def length(self, utterance_id: str, modality: str) -> int:
        """Samples or frames; 0 if the utterance does not have it."""
        return self.entries.get((utterance_id, modality), Entry()).length

    def digest(self, utterance_id: str, modality: str) -> str:
        """A hash of the decoded content; "" if the utterance does not have it."""
        return self.entries.get((utterance_id, modality), Entry()).digest

    def problems(self) -> list[str]:
        """A line per utterance and modality that could not be decoded, or not well."""
        return sorted(f"{i}: {m} {entry.note}" for (i, m), entry in self.entries.items() if entry.note)

    def bytes_for(self, u: Utterance, modality: str) -> int:
        """How much disk the decoded media of an utterance take, about."""
        seconds = 4.0 if u.end is None else min(max(0.0, u.end - (u.start or 0.0)), MAX_SECONDS)  # 0 if it is NaN
        return int(seconds * RATE * 2) if modality == "audio" else self.frames * 3 * self.size**2

    def _hash(self, path: Path | None) -> str | UnreadableError:
        try:
            status = os.stat(absolute(path))
            name = f"{status.st_size} {status.st_mtime_ns} {absolute(path)}"
            if name not in self.hashes:
                self.hashes[name] = hash_file(path)
                append_line(self.index, json.dumps({name: self.hashes[name]}))
            return self.hashes[name]
        except UnreadableError as e:
            return e
        except OSError as e:
            return UnreadableError(f"cannot be read ({e.strerror})")

    def _find(self, u: Utterance, modality: str, content: str | UnreadableError) -> Entry:
        """Only with its path if it is not decoded yet."""
        if isinstance(content, UnreadableError):
            return Entry(note=str(content))
        options = [self.frames, self.size] if modality == "video" else [u.audio_is_cut, u.audio == u.video]
        key = digest(DECODER_VERSION, modality, content, u.start, u.end, *options)
        path = self.folder / modality / f"{key}.safetensors"
        if path.exists():
            try:
                with safe_open(path, "pt") as f:
                    return Entry(path, length=f.get_slice("array").get_shape()[0], **f.metadata())
            except (SafetensorError, OSError, TypeError):  # damaged, or of another program
                print(f"{path}: damaged, decoded again", flush=True)
        return Entry(path)

    def _make(self, path: Path, job: tuple[Utterance, str]) -> Entry:
        u, modality = job
        try:
            array, note = decode(u, modality, self.frames, self.size)
        except UnreadableError as e:  # since it was hashed
            return Entry(note=str(e))
        except MediaError as e:
            array, note = np.empty(0), str(e)
        x = torch.from_numpy(array)
        content = digest(x) if len(x) else ""
        replace_file(path, lambda temporary: save_file({"array": x}, temporary, {"digest": content, "note": note}))
        return Entry(path, content, note, len(x))


def hash_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# From audio, frames and text to features


class Encoder(nn.Module):
    """What the three share."""

    def __init__(self, checkpoint: str, option: str, num_classes: int, width: int):
        super().__init__()
        self.backbone = load_backbone(checkpoint, option)
        hidden = self.backbone.config.hidden_size
        self.project = nn.Identity() if hidden == width else nn.Linear(hidden, width)
        self.classifier = nn.Linear(width, num_classes)

    @property
    def device(self) -> torch.device:
        return self.classifier.weight.device

    def classify(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, hidden] -> features [B, d], logits [B, C]."""
        features = self.project(hidden)
        return features, self.classifier(features)


class TextEncoder(Encoder):
    """RoBERTa at the mask of a prompt (Eq. 3). Examples are lists of token ids, from `prompts`, at most max_tokens."""

    def __init__(self, checkpoint: str, num_classes: int, width: int = 768, max_tokens: int = 512):
        t = load(transformers.AutoTokenizer.from_pretrained, checkpoint, "--text-model")
        if t.mask_token_id is None:
            raise InputError(f"--text-model {checkpoint}: its tokenizer has no mask token, which Eq. 2 needs")
        super().__init__(checkpoint, "--text-model", num_classes, width)
        self.tokenizer = t
        # lstrip: the space before a speaker's token belongs to the token
        tokens = [transformers.AddedToken(s, lstrip=True, special=True) for s in SPEAKER_TOKENS]
        t.add_tokens(tokens, special_tokens=True)
        table = self.backbone.get_input_embeddings().num_embeddings
        self.backbone.resize_token_embeddings(max(table, len(t)))
        self.start = t.bos_token_id if t.bos_token_id is not None else t.cls_token_id
        self.end = t.eos_token_id if t.eos_token_id is not None else t.sep_token_id
        if None in (self.start, self.end, t.pad_token_id):
            raise InputError(f"--text-model {checkpoint}: its tokenizer has no token for the start, the end or padding")
        positions = getattr(self.backbone.config, "max_position_embeddings", max_tokens)
        table = getattr(getattr(self.backbone, "embeddings", None), "position_embeddings", None)
        if getattr(table, "padding_idx", None) is not None:
            positions -= table.padding_idx + 1  # RoBERTa counts its positions from there
        self.max_tokens = min(max_tokens, positions, t.model_max_length)

    def prompts(self, conversation: Conversation) -> list[list[int]]:
        """For each utterance k of a conversation the ids of <s> C_k </s> P_k </s> (Eq. 1, 2).

        Above `max_tokens` the oldest of C_k is cut. P_k is kept, except the end of an utterance too long for it.
        """
        t = self.tokenizer

        def ids(text: str) -> list[int]:
            return t(text, add_special_tokens=False, verbose=False)["input_ids"]

        order = list(dict.fromkeys(u.speaker for u in conversation.utterances))
        context, prompts = [], []
        for u in conversation.utterances:
            s = SPEAKER_TOKENS[min(order.index(u.speaker), len(SPEAKER_TOKENS) - 1)]
            text, head, tail = ids(f" {u.text}"), ids(f"For {s}:"), ids(f" Now {s} feels {t.mask_token}")
            context += ids(f" {s}:") + text  # C_k: the past and the present, never the future
            room = self.max_tokens - 3 - len(head) - len(tail)  # beside <s>, </s>, </s>
            prompt = head + text[:room] + tail  # P_k
            past = context[max(0, len(context) - (room - len(text))) :] if room > len(text) else []
            prompts.append([self.start, *past, self.end, *prompt, self.end])
        return prompts

    def forward(self, examples: list[list[int]]) -> tuple[Tensor, Tensor]:
        pad = self.tokenizer.pad_token_id
        rows = [torch.tensor(ids) for ids in examples]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(self.device)  # [B, T]
        hidden = self.backbone(input_ids=ids, attention_mask=(ids != pad).long()).last_hidden_state
        # The last mask of a row: an utterance may contain one itself.
        at = [max(i for i, x in enumerate(row) if x == self.tokenizer.mask_token_id) for row in examples]
        return self.classify(hidden[torch.arange(len(at)), at])


class AudioEncoder(Encoder):
    """Data2vec or its relatives, mean over the frames (Eq. 4). Examples are float32 [T] at 16 kHz.

    Each clip goes through the backbone by itself: in this family padding leaks into the clip, and its feature would
    depend on the longest clip of the batch.
    """

    def __init__(self, checkpoint: str, num_classes: int, width: int = 768):
        processor = load(transformers.AutoFeatureExtractor.from_pretrained, checkpoint, "--audio-model")
        super().__init__(checkpoint, "--audio-model", num_classes, width)
        if not hasattr(self.backbone, "feature_extractor") or processor.sampling_rate != RATE:
            raise InputError(f"--audio-model {checkpoint}: not a model of the wav2vec 2.0 family for {RATE} Hz")
        self.backbone.config.mask_time_length = 3  # of SpecAugment, 60 ms; 10 would mask most of a short clip
        self.processor = processor

    def forward(self, examples: list[Tensor]) -> tuple[Tensor, Tensor]:
        means = []
        for x in examples:
            x = self.processor(x.numpy(), sampling_rate=RATE, return_tensors="pt")["input_values"]  # [1, T]
            x = nn.functional.pad(x, (0, max(0, SHORTEST - x.shape[1])))
            means.append(self.backbone(x.to(self.device)).last_hidden_state.mean(dim=1))
        return self.classify(torch.cat(means))


class VideoEncoder(Encoder):
    """TimeSformer, ViViT at the class token, VideoMAE at the mean (Eq. 5). Examples: uint8 [frames, 3, size, size]."""

    def __init__(self, checkpoint: str, num_classes: int, width: int = 768):
        video_shape(checkpoint)  # refuses what is no video model
        processor = load(transformers.AutoImageProcessor.from_pretrained, checkpoint, "--video-model")
        super().__init__(checkpoint, "--video-model", num_classes, width)
        mean, std = torch.tensor([processor.image_mean, processor.image_std]).view(2, 3, 1, 1)
        # As (pixels / 255 - self.mean) / self.std. ViViT subtracts an offset besides: it rescales to -1 .. 1.
        scale, offset = 255 * processor.rescale_factor, float(getattr(processor, "offset", False))
        self.register_buffer("mean", (mean + offset) / scale, persistent=False)
        self.register_buffer("std", std / scale, persistent=False)

    def forward(self, examples: list[Tensor]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack(examples).to(self.device)  # still uint8: a quarter of the bytes on their way to the GPU
        hidden = self.backbone((pixels / 255 - self.mean) / self.std).last_hidden_state  # [B, patches, hidden]
        has_class_token = hasattr(self.backbone.embeddings, "cls_token")
        return self.classify(hidden[:, 0] if has_class_token else hidden.mean(dim=1))


ENCODERS = {"text": TextEncoder, "audio": AudioEncoder, "video": VideoEncoder}


def video_shape(checkpoint: str) -> tuple[int, int]:
    """How many frames a video checkpoint takes, and their height and width in pixels."""
    config = load(transformers.AutoConfig.from_pretrained, checkpoint, "--video-model")
    if not hasattr(config, "num_frames"):
        raise InputError(f"--video-model {checkpoint}: not a video model, its configuration names no number of frames")
    return config.num_frames, config.image_size


def load(load: Callable, checkpoint: str, option: str, **options):
    """`load(checkpoint)`, with an InputError that says what to do if it fails."""
    try:
        return load(checkpoint, **options)
    except Exception as e:  # a damaged folder makes transformers raise nearly anything
        what = str(e).strip().partition("\n")[0][:200] or type(e).__name__
        if any(name in str(e).lower() for name in ("sentencepiece", "tiktoken", "protobuf")):  # as DeBERTa-v3's
            remedy = "its tokenizer needs two more packages: pip install sentencepiece protobuf"
        elif Path(checkpoint).is_dir():
            remedy = "the folder is incomplete or damaged; it must have all that save_pretrained writes"
        else:
            remedy = "it is neither a folder nor in the cache, and the hub did not give it; without network, "
            remedy += f"download it elsewhere (hf download NAME --local-dir DIR), and give {option} DIR"
        raise InputError(f"cannot load {checkpoint!r}: {remedy}. ({what})") from e


def load_backbone(checkpoint: str, option: str) -> nn.Module:
    """A transformer with its checkpoint's weights, in float32 whatever they are stored in."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = load(transformers.AutoModel.from_pretrained, checkpoint, option, **options)
    if len(info["missing_keys"]) > len(model.state_dict()) / 2:  # transformers would continue, with random weights
        raise InputError(f"{option} {checkpoint}: these are not the weights of a {type(model).__name__}")
    if hasattr(model, "pooler"):
        model.pooler = None  # not used here, and often not in the checkpoint
    return model


def checkpoint_digest(checkpoint: str) -> str | None:
    """A hash of a local folder's files, or "name@commit" of what the hub's cache has. None if not known offline."""
    if Path(checkpoint).is_dir():
        suffixes = (".json", ".safetensors", ".bin", ".txt", ".model")
        return digest([(p.name, hash_file(p)) for p in sorted(Path(checkpoint).iterdir()) if p.suffix in suffixes])
    try:
        config = transformers.utils.cached_file(checkpoint, "config.json", local_files_only=True)
    except Exception:  # OSError, or what a name of another form makes the hub's client raise
        return None
    return f"{checkpoint}@{Path(config).parent.name}"
