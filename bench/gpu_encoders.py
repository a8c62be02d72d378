"""Stage 1 on a GPU: the three encoders at full size, and whether the CPU's data path keeps up with them.

Random weights in the published configurations: the time of a step does not depend on what the weights are. Text has 256
tokens, sound 5 s, a film 8 frames of 224 x 224; each encoder is used as encoders.py uses it (sound clip by clip, frames
as bytes on their way to the card). Without chance in the model (layer drop, SpecAugment): a
little dearer than training.
"""

import io
import tempfile
import time
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import losses
from bench.gpu_hours import BATCH, CONTEXT, best_batch

GIB = 2**30
CARDS = {"11 GB": 11 * GIB, "24 GB": 24 * GIB, "80 GB": 80 * GIB}
ROBERTA_LARGE = {
    "vocab_size": 50265,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CLASSES, RATE = 6, 16_000


class Encoder(nn.Module):
    """A backbone and a classifier, used as the encoder of the modality in encoders.py is."""

    def __init__(self, modality: str, toy: bool):
        super().__init__()
        self.modality, self.tokens, self.samples = modality, 16 if toy else 256, 6400 if toy else 5 * RATE
        if modality == "text":
            config = transformers.RobertaConfig(**{**ROBERTA_LARGE, **({**SMALL, "vocab_size": 1000} if toy else {})})
            self.backbone = transformers.RobertaModel(config, add_pooling_layer=False)
        elif modality == "audio":
            channels = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
            small = {**SMALL, **channels} if toy else {}
            config = transformers.Data2VecAudioConfig(layerdrop=0.0, apply_spec_augment=False, **small)
            self.backbone = transformers.Data2VecAudioModel(config)
        else:
            config = transformers.TimesformerConfig(**({**SMALL, "image_size": 32} if toy else {}))
            self.backbone = transformers.TimesformerModel(config)
        self.config = config
        self.classifier = nn.Linear(config.hidden_size, CLASSES)

    def examples(self, B: int) -> Tensor:
        """As the data path delivers them, on the CPU."""
        if self.modality == "text":
            return torch.randint(10, 1000, (B, self.tokens))
        if self.modality == "audio":
            return torch.randn(B, self.samples)
        size = self.config.image_size
        return torch.randint(0, 256, (B, 8, 3, size, size), dtype=torch.uint8)

    def forward(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        x = examples.to(self.classifier.weight.device, non_blocking=True)
        if self.modality == "text":
            features = self.backbone(x).last_hidden_state[:, -2]
        elif self.modality == "audio":
            features = torch.cat([self.backbone(clip[None]).last_hidden_state.mean(dim=1) for clip in x])
        else:
            features = self.backbone((x / 255 - 0.45) / 0.225).last_hidden_state[:, 0]
        return features, self.classifier(features)


def make_step(encoder: Encoder, examples: Tensor) -> Callable[[], Tensor]:
    """A step of stage 1 as magtkd.train takes it: autocast, Eq. 13 or 14, backward, clipping, AdamW."""
    device, B = encoder.classifier.weight.device, len(examples)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, fused=True)
    labels = torch.zeros(B, dtype=torch.int64, device=device)
    taught = ()
    if encoder.modality != "text":
        taught = torch.randn(B, CLASSES, device=device), torch.randn(B, encoder.config.hidden_size, device=device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            features, logits = encoder(examples)
            loss = losses.stage1_loss(logits, labels, features, *taught)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(bench) -> None:
    for modality in ("text", "audio", "video"):
        measure_encoder(bench, modality)
        if bench.cuda:
            torch.cuda.empty_cache()


def measure_encoder(bench, modality: str) -> None:
    """Steps of growing batches with and without gradient checkpointing; encoding; which card carries it."""
    with torch.device(bench.device):
        encoder = Encoder(modality, bench.toy)
    bench.row("weights", encoder=modality, parameters=sum(p.numel() for p in encoder.parameters()))

    encoder.eval()
    many = encoder.examples(2 if bench.toy else 32)
    with torch.inference_mode(), torch.autocast(bench.device.type, torch.bfloat16):
        seconds = bench.seconds(lambda: encoder(many), rounds=3, warmup=1)
    each = seconds / len(many) if isinstance(seconds, float) else seconds
    bench.row("encoding", encoder=modality, **{"seconds per utterance": each})

    encoder.train()
    measured: dict[bool, dict[int, tuple[float, float]]] = {False: {}, True: {}}
    for checkpointing in measured:
        if checkpointing:
            encoder.backbone.gradient_checkpointing_enable()
        for batch in (2,) if bench.toy else (BATCH, 8, 16, 32, 64, 128):
            about = {"encoder": modality, "checkpointing": checkpointing, "batch": batch}
            try:
                step = make_step(encoder, encoder.examples(batch))
                peak, reserved = bench.peak(
                    lambda step=step: [step() for _ in range(2)]
                )  # AdamW's state from the 2nd on
                seconds = bench.seconds(step, rounds=3, warmup=0)
            except torch.OutOfMemoryError:
                encoder.zero_grad(set_to_none=True)
                bench.row("step", **about, seconds="not measured", why="more memory than this card has")
                break
            finally:
                step = None  # its optimiser holds two numbers per weight
            bench.row("step", **about, seconds=seconds, **{"peak bytes": peak, "reserved bytes": reserved})
            if isinstance(seconds, float) and isinstance(reserved, int):
                measured[checkpointing][batch] = (reserved, seconds)

    for card, limit in CARDS.items():
        facts = {"result": "not measured"}
        if measured[False]:
            fits = {how: [b for b, (peak, _) in x.items() if peak + CONTEXT <= limit] for how, x in measured.items()}
            best = {how: best_batch(x, limit) for how, x in measured.items()}
            facts = {"carries batch 4": BATCH in fits[False], "with checkpointing": BATCH in fits[True]}
            facts |= {"best batch": best[False], "best batch, checkpointing": best[True]}
        bench.row(f"a card of {card}", encoder=modality, **facts)


# The data path


def measure_data_path(bench) -> None:
    """Utterances per second that this machine's cores decode, and load and collate, beside what the encoders take."""
    from encoders import MediaStore

    count, size = (2, 32) if bench.toy else (64, 224)
    with tempfile.TemporaryDirectory() as folder:
        utterances = make_media(Path(folder), count, toy=bench.toy)
        store = MediaStore(Path(folder) / "store", ("audio", "video"), 8, size)
        start = time.perf_counter()
        store.fill(utterances, workers=bench.environment["cpu cores"])
        seconds = "not measured" if bench.toy else (time.perf_counter() - start) / count
        films = "films of 720 x 480, 30 a second, key frames 2 s apart; utterances of 5 s"
        problems = store.problems()
        bench.row("decoding", **{"seconds per utterance": seconds}, films=films, problems=problems)

        ids = [u.id for u in utterances]
        for modality, collate in (("audio", list), ("video", torch.stack)):
            whole = bench.seconds(lambda m=modality, c=collate: c([store.get(i, m) for i in ids]), rounds=3, warmup=1)
            rate = count / whole if isinstance(whole, float) else whole
            wanted = bench.found("encoders", name="step", encoder=modality, checkpointing=False, batch=BATCH)
            taken = (
                BATCH / wanted[0]["seconds"] if wanted and isinstance(wanted[0]["seconds"], float) else "not measured"
            )
            facts = {"delivered per second": rate, "taken per second": taken}
            if isinstance(rate, float) and isinstance(taken, float):
                facts["share of a step that waits for it"] = taken / rate
            bench.row("loading and collating, one thread", modality=modality, **facts)


def make_media(folder: Path, count: int, toy: bool) -> list:
    """Utterances of 5 s in a film (MPEG-4, as in an AVI of IEMOCAP) and a sound file each. Errors: without PyAV."""
    import av

    from data import Utterance

    width, height, seconds = (64, 48, 8) if toy else (720, 480, 30)
    blocks = np.random.default_rng(0).integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    base = blocks.repeat(16, axis=0).repeat(16, axis=1)
    film = folder / "film.avi"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 60
        for number in range(30 * seconds):
            picture = av.VideoFrame.from_ndarray(np.roll(base, number, axis=1), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    utterances = []
    for i in range(count):
        sound = folder / f"{i}.wav"
        sound.write_bytes(wav(np.random.default_rng(i).integers(-9000, 9000, RATE * 5, dtype=np.int16)))
        start = float(i % (seconds - 5))
        utterances.append(Utterance(str(i), "a", "words", 0, sound, film, start, start + 5))
    return utterances


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(RATE)
        f.writeframes(samples.tobytes())
    return file.getvalue()
