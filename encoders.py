"""Stage 1's encoders: from files to one feature (a vector) per utterance, by text (Eq. 1-3), audio (4) and video (5).

First the decoding: `load_audio` and `load_frames` read an utterance's sound and pictures from any file that PyAV reads,
and `MediaStore` keeps them, so that each file is decoded once. Then three encoders. Each is a pretrained transformer (a
hub name, or a folder written by `save_pretrained`), a rule for which of its output vectors stands for the utterance, a
linear layer where its width is not d, and a linear classifier:

    text   RoBERTa, or any encoder whose tokenizer has a mask token: the vector at the mask of a prompt that asks what
           the speaker feels, with the past before it
    audio  Data2vec, or another of the wav2vec 2.0 family: the mean over the frames
    video  TimeSformer: the class token; VideoMAE, which has none: the mean over the patches

All three are called alike: `features, logits = encoder(examples)`, [B, d] and [B, C]. What a checkpoint's processor
wants (mean, deviation, rate, normalisation) is read from the checkpoint.

Not here: which files belong to an utterance (data.py); the training (magtkd.py).
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
import torchaudio.functional as A
import torchvision.transforms.v2.functional as V
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from data import Conversation, InputError, MediaError, Utterance, replace_file

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries without a network; our error says it once
av.logging.set_level(av.logging.PANIC)  # the report names broken files; FFmpeg's own lines would drown the progress

RATE = 16_000  # Hz, what every speech encoder of this family was trained on
MAX_SECONDS = 35.0  # IEMOCAP's longest utterance has 34 s; some of MELD's clips are wrong cuts of 5 minutes
MIN_SAMPLES = 400  # 25 ms, one step of the encoder's convolutions
SHORTEST = 4_800  # samples; in training SpecAugment masks stretches of 10 frames (0.2 s), and raises on shorter clips
MARGIN = 1.0  # seconds of video before and after an utterance of a longer film
SPEAKER_TOKENS = [f"<s{i}>" for i in range(1, 10)]  # MELD has at most 9 speakers in a conversation; a tenth shares <s9>


# From a file to sound and pictures


def load_audio(path: Path, start: float = 0.0, end: float | None = None) -> Tensor:
    """The sound of a file from `start` to `end` (seconds), at most MAX_SECONDS of it. float32 [T], 16 kHz mono.

    Errors: MediaError for a file that is missing, broken or without sound, or shorter than 25 ms.
    """
    end = min(start + MAX_SECONDS, float("inf") if end is None else end)
    with _open(path) as container:
        if not container.streams.audio:
            raise MediaError("no sound in it")
        stream = container.streams.audio[0]
        if stream.sample_rate > 400_000:  # no recorder has it, and the resampler's memory grows with it
            raise MediaError(f"{stream.sample_rate} samples per second")
        if start > 0:
            container.seek(int(start * av.time_base))
        # Packed: PyAV crashes on 8 planes and more. The mean, since FFmpeg's own mix of equal channels clips.
        packed, parts, offset = av.AudioResampler(format="flt"), [], None
        for frame in container.decode(stream):
            time = 0.0 if frame.time is None else frame.time
            if time >= end:
                break
            offset = time if offset is None else offset
            parts += [p.to_ndarray().reshape(-1, p.layout.nb_channels).mean(axis=1) for p in packed.resample(frame)]
    if not parts:
        raise MediaError("no sound in it")
    sound, rate = torch.from_numpy(np.concatenate(parts)), frame.sample_rate
    first = max(0, round((start - offset) * rate))
    sound = sound[first : first + round((end - max(start, offset)) * rate)]
    if not len(sound):
        raise MediaError(f"ends before {start:.1f} s, where the utterance begins")
    # To the nearest 25 Hz (nobody hears 44,101 Hz as 44,100): the resampler's memory grows with rate / gcd(rate, RATE).
    sound = A.resample(sound, max(25, round(rate / 25) * 25), RATE)
    if len(sound) < MIN_SAMPLES:
        raise MediaError(f"only {len(sound) / RATE * 1000:.0f} ms of sound")
    if not sound.isfinite().all():
        raise MediaError("samples that are not numbers")
    return sound.clamp(-1, 1)


def load_frames(path: Path, start: float | None, end: float | None, count: int = 8, size: int = 224) -> Tensor:
    """Frames spread evenly over an utterance. uint8 [count, 3, size, size], RGB.

    start, end: seconds; the window is a second wider on both sides. None: all of the file, at most MAX_SECONDS of it.
    The whole picture is squeezed to a square: actors sit at its edges, where a centre crop would cut them off.
    Errors: MediaError for a file that is missing, broken or without pictures in that window.
    """
    with _open(path) as container:
        if not container.streams.video:
            raise MediaError("no picture in it")
        stream = container.streams.video[0]
        length = container.duration / av.time_base if container.duration else MAX_SECONDS
        low = max(0.0, start - MARGIN) if start is not None else 0.0
        high = min(length, end + MARGIN if end is not None else length, low + MAX_SECONDS)
        if high <= low:
            raise MediaError(f"ends at {length:.1f} s, before the utterance")
        times = np.linspace(low, high, 2 * count + 1)[1::2]  # the middles of `count` equal parts
        if low > 0:
            container.seek(int(low * av.time_base))  # to the key frame before
        frames = _pick(container.decode(stream), times, float(stream.average_rate or 25))
    if not frames:
        raise MediaError("no picture in it")
    frames += frames[-1:] * (count - len(frames))  # the film ends early: its last frame stands still
    pictures = [torch.from_numpy(frame).permute(2, 0, 1) for frame in frames]
    return torch.stack([V.resize(picture, [size, size], antialias=True) for picture in pictures])


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


def _open(path: Path):
    if not os.path.isfile(path):  # False, without an error, for names that no disk can hold
        raise MediaError("not a file" if os.path.exists(path) else "missing")
    return av.open(str(path))


def decode(u: Utterance, modality: str, frames: int = 8, size: int = 224) -> np.ndarray:
    """An utterance's "audio", int16 [T] at 16 kHz, or its "video", uint8 [frames, 3, size, size].

    Errors: MediaError that says why there is none. Whatever a file makes a decoder raise costs this file alone.
    """
    path = getattr(u, modality)
    try:
        if path is None:
            raise MediaError("missing")
        if modality == "audio":
            return (load_audio(path) * 32767).round().to(torch.int16).numpy()
        return load_frames(path, u.start, u.end, frames, size).numpy()
    except MediaError:
        raise
    except Exception as e:
        size = os.path.getsize(path)
        raise MediaError(f"broken, {size} bytes ({type(e).__name__})" if size else "empty file") from e


# What was decoded, on disk


class MediaStore:
    """Decoded sound and frames, so that no file is decoded twice: a NumPy file per utterance and modality.

    folder/audio/ID.npy, int16 [T] at 16 kHz; folder/video/ID.npy, uint8 [frames, 3, size, size]; or ID.txt, which says
    why there is none. Files are written whole, so a killed run continues where it was; RAM stays flat.

    modalities: which of "audio" and "video" are wanted. frames, size: of a video, how many and of how many pixels.
    """

    def __init__(self, folder: Path, modalities: tuple[str, ...], frames: int = 8, size: int = 224):
        self.folder, self.modalities, self.frames, self.size = Path(folder), modalities, frames, size
        for m in modalities:
            (self.folder / m).mkdir(parents=True, exist_ok=True)

    def fill(self, utterances: list[Utterance], workers: int) -> None:
        """Decodes what is not in the store yet. Threads: FFmpeg and torch leave Python's lock while they work.

        Processes would survive a crash in FFmpeg. None is known; they cost up to twice as much: docs/reliability.md.
        Errors: InputError if the disk is too small.
        """
        todo = [(u, m) for u in utterances for m in self.modalities if not self._is_done(u.id, m)]
        if not todo:
            return
        need, free = sum(self.bytes_for(u, m) for u, m in todo), shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(
                f"{self.folder}: the decoded media of {len(utterances)} utterances need {need / 1e9:.1f} GB more, "
                f"{free / 1e9:.1f} GB are free; give a folder on a larger disk with --out"
            )
        print(f"decoding {len(todo)} sounds and films into {self.folder}: about {need / 1e9:.1f} GB", flush=True)
        with ThreadPoolExecutor(workers) as pool:
            for _ in tqdm(pool.map(self._keep, todo), "decoding", len(todo), unit=" files", disable=None):
                pass

    def get(self, utterance_id: str, modality: str) -> Tensor:
        """Audio: float32 [T], 16 kHz mono, -1 to 1. Video: uint8 [frames, 3, size, size], RGB."""
        x = self._load(utterance_id, modality)
        return torch.from_numpy(x / np.float32(32767) if modality == "audio" else x)

    def length(self, utterance_id: str, modality: str) -> int:
        """Samples or frames; 0 if the utterance does not have it."""
        return len(self._load(utterance_id, modality, "r")) if self._path(utterance_id, modality).exists() else 0

    def problems(self) -> list[str]:
        """A line per utterance and modality that could not be decoded."""
        notes = [p for m in self.modalities for p in (self.folder / m).glob("*.txt")]
        return sorted(f"{p.stem}: {p.parent.name} {p.read_text(encoding='utf-8')}" for p in notes)

    def bytes_for(self, u: Utterance, modality: str) -> int:
        """How much disk the decoded media of an utterance take, about."""
        seconds = 4.0 if u.end is None else min(max(0.0, u.end - u.start), MAX_SECONDS)  # 0 if it is NaN
        return int(seconds * RATE * 2) if modality == "audio" else self.frames * 3 * self.size**2

    def _path(self, utterance_id: str, modality: str, ending: str = "npy") -> Path:
        return self.folder / modality / f"{utterance_id}.{ending}"

    def _is_done(self, utterance_id: str, modality: str) -> bool:
        return any(self._path(utterance_id, modality, ending).exists() for ending in ("npy", "txt"))

    def _keep(self, job: tuple[Utterance, str]) -> None:
        u, modality = job
        try:
            x = decode(u, modality, self.frames, self.size)
        except MediaError as e:
            why = str(e)
            replace_file(self._path(u.id, modality, "txt"), lambda part: part.write_text(why, encoding="utf-8"))
            return
        with open(f"{self._path(u.id, modality)}.part", "wb") as f:
            np.save(f, x)
        os.replace(f.name, self._path(u.id, modality))

    def _load(self, utterance_id: str, modality: str, mode: str | None = None) -> np.ndarray:
        path = self._path(utterance_id, modality)
        try:
            return np.load(path, mode)
        except Exception as e:  # a damaged header makes NumPy raise nearly anything
            raise InputError(f"{path}: damaged ({e}); delete it, and it is decoded again") from e


# From sound, pictures and words to features


class Encoder(nn.Module):
    """What the three share: a pretrained backbone, a linear layer where its width is not d, a linear classifier."""

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
    """RoBERTa at the mask of a prompt (Eq. 3). Examples are lists of token ids, from `prompts`.

    max_tokens: the longest prompt, if the checkpoint itself takes no shorter ones only.
    """

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
        if self.max_tokens < 32:  # P_k alone takes up to 22 beside the words
            raise InputError(f"--text-model {checkpoint}: prompts of {self.max_tokens} tokens, 32 are the least")

    def prompts(self, conversation: Conversation) -> list[list[int]]:
        """For each utterance k of a conversation the ids of <s> C_k </s> P_k </s> (Eq. 1, 2).

        Over `max_tokens` the oldest of C_k go first. P_k stays, but for the end of an utterance too long for it alone.
        """
        t = self.tokenizer

        def ids(text: str) -> list[int]:
            return t(text, add_special_tokens=False, verbose=False)["input_ids"]

        order = list(dict.fromkeys(u.speaker for u in conversation.utterances))
        context, prompts = [], []
        for u in conversation.utterances:
            s = SPEAKER_TOKENS[min(order.index(u.speaker), len(SPEAKER_TOKENS) - 1)]
            words, head, tail = ids(f" {u.text}"), ids(f"For {s}:"), ids(f" Now {s} feels {t.mask_token}")
            context += ids(f" {s}:") + words  # C_k: the past and the present, never the future
            room = self.max_tokens - 3 - len(head) - len(tail)  # beside <s>, </s>, </s>
            prompt = head + words[:room] + tail  # P_k
            past = context[max(0, len(context) - (room - len(words))) :] if room > len(words) else []
            prompts.append([self.start, *past, self.end, *prompt, self.end])
        return prompts

    def forward(self, examples: list[list[int]]) -> tuple[Tensor, Tensor]:
        pad = self.tokenizer.pad_token_id
        rows = [torch.tensor(ids) for ids in examples]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(self.device)  # [B, T]
        hidden = self.backbone(input_ids=ids, attention_mask=(ids != pad).long()).last_hidden_state
        # The last mask of a row: an utterance could hold one of its own.
        at = [max(i for i, x in enumerate(row) if x == self.tokenizer.mask_token_id) for row in examples]
        return self.classify(hidden[torch.arange(len(at)), at])


class AudioEncoder(Encoder):
    """Data2vec or its relatives, mean over the frames (Eq. 4). Examples are float32 [T] at 16 kHz.

    Each clip goes through the backbone by itself: in this family padding leaks into the sound, through group norms,
    position convolutions or attention, and a clip's feature would depend on the longest clip of its batch.
    """

    def __init__(self, checkpoint: str, num_classes: int, width: int = 768):
        processor = load(transformers.AutoFeatureExtractor.from_pretrained, checkpoint, "--audio-model")
        if getattr(processor, "sampling_rate", None) != RATE:
            rate = getattr(processor, "sampling_rate", "no")
            raise InputError(f"--audio-model {checkpoint}: wants {rate} Hz, this project reads {RATE}")
        super().__init__(checkpoint, "--audio-model", num_classes, width)
        if not hasattr(self.backbone, "feature_extractor"):  # the convolutions that read samples
            what = type(self.backbone).__name__
            raise InputError(f"--audio-model {checkpoint}: a {what}, not one of the wav2vec 2.0 family")
        self.processor = processor

    def forward(self, examples: list[Tensor]) -> tuple[Tensor, Tensor]:
        means = []
        for x in examples:
            x = self.processor(x.numpy(), sampling_rate=RATE, return_tensors="pt")["input_values"]  # [1, T]
            x = nn.functional.pad(x, (0, max(0, SHORTEST - x.shape[1])))
            means.append(self.backbone(x.to(self.device)).last_hidden_state.mean(dim=1))
        return self.classify(torch.cat(means))


class VideoEncoder(Encoder):
    """TimeSformer at its class token, VideoMAE at the mean (Eq. 5). Examples are uint8 [frames, 3, size, size], RGB."""

    def __init__(self, checkpoint: str, num_classes: int, width: int = 768):
        video_shape(checkpoint)  # refuses what is no video model
        processor = load(transformers.AutoImageProcessor.from_pretrained, checkpoint, "--video-model")
        super().__init__(checkpoint, "--video-model", num_classes, width)
        colours = [processor.image_mean, processor.image_std]
        mean, std = load(lambda _: torch.tensor(colours).float().view(2, 3, 1, 1), checkpoint, "--video-model")
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, examples: list[Tensor]) -> tuple[Tensor, Tensor]:
        pixels = torch.stack(examples).to(self.device)  # uint8 still: a quarter of the bytes on their way to the GPU
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
    """`load(checkpoint)` with a message that says what to do when it is not there."""
    try:
        return load(checkpoint, **options)
    except Exception as e:  # a damaged folder makes transformers raise nearly anything
        what = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        if Path(checkpoint).is_dir():
            where = "the folder is there, but not whole: it needs what model.save_pretrained and its processor's write"
        else:
            where = (
                "it is neither a folder here nor in the cache, and the hub did not give it. Without network: download "
                f"it elsewhere (hf download {checkpoint} --local-dir DIR), copy the folder here, and give {option} DIR"
            )
        raise InputError(f"cannot load {checkpoint!r}: {where}. ({what})") from e


def load_backbone(checkpoint: str, option: str) -> nn.Module:
    """A transformer with its checkpoint's weights, in float32 whatever they are kept in."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = load(transformers.AutoModel.from_pretrained, checkpoint, option, **options)
    if len(info["missing_keys"]) > len(model.state_dict()) / 2:  # transformers would go on, with random weights
        raise InputError(f"{option} {checkpoint}: these are not the weights of a {type(model).__name__}")
    shares = {name: x for name, x in model.config.to_dict().items() if "drop" in name and isinstance(x, float | int)}
    if bad := [f"{name} {x}" for name, x in shares.items() if not 0 <= x <= 1]:
        raise InputError(f"{option} {checkpoint}: its config.json has {', '.join(bad)}; a share is from 0 to 1")
    if hasattr(model, "pooler"):
        model.pooler = None  # not used here, and often not in the checkpoint
    return model
