"""Stage 1: an encoder per modality is fine-tuned, and says one vector of every utterance (Eq. 1-14).

Text first; then audio and video, with text as the teacher where the name ends in _kd. Each leaves its weights and its
vectors in the run's folder; together the vectors are the feature file that stage 2 reads.

Not here: the encoders (encoders.py), the losses (losses.py).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
from data import SPLITS, Corpus, InputError
from encoders import ENCODERS
from features import Features
from losses import stage1_loss
from media import MediaStore
from report import scores
from training import (
    Config,
    check_finite,
    class_weights,
    make_batches,
    make_optimizer,
    mixed_precision,
    optimizer_step,
    padding_share,
)


class Examples(NamedTuple):
    """What an encoder takes, by utterance id."""

    get: Callable[[str], list[int] | Tensor]
    length: Callable[[str], int]  # tokens, samples or frames; 0: the utterance lacks it


@dataclass(frozen=True)
class Vectors:
    """What an encoder says of every utterance: features [N, d] and logits [N, C], NaN where sound or picture lacks."""

    features: Tensor
    logits: Tensor


def run_stage1(
    config: Config, names: list[str], corpus: Corpus, store: MediaStore, out: Path, seed: int, device: torch.device
) -> dict[str, Vectors]:
    """Trains the encoders that have not left their vectors in `out` yet; returns everyone's vectors, by encoder.

    names: "text" first, then any of audio, video, audio_kd, video_kd.
    """
    vectors: dict[str, Vectors] = {}
    everyone = [u.id for split in SPLITS for u in corpus.utterances(split)]
    for name in names:
        path = out / f"{name}.vectors.safetensors"
        if not path.exists():
            modality = name.removesuffix("_kd")
            checkpoint.seed_everything(seed, name)
            encoder = ENCODERS[modality](getattr(config, f"{modality}_model"), len(corpus.label_names), config.width)
            if config.gradient_checkpointing:
                encoder.backbone.gradient_checkpointing_enable()
            encoder.to(device)
            examples = make_examples(encoder, modality, corpus, store)
            teacher = vectors["text"] if name.endswith("_kd") else None
            train_encoder(name, encoder, examples, teacher, config, corpus, out, seed)
            x = encode(encoder, examples, everyone, progress=f"encoding {name}")
            tensors = {"features": x.features, "logits": x.logits}
            checkpoint.replace(path, lambda part, tensors=tensors: save_file(tensors, part))
        vectors[name] = Vectors(**load_file(path))
    return vectors


def make_examples(encoder: nn.Module, modality: str, corpus: Corpus, store: MediaStore) -> Examples:
    if modality != "text":
        return Examples(getattr(store, modality), lambda i: store.length(i, modality))
    conversations = [c for split in SPLITS for c in corpus.splits[split]]
    prompts = {u.id: p for c in conversations for u, p in zip(c.utterances, encoder.prompts(c))}
    return Examples(prompts.__getitem__, lambda i: len(prompts[i]))


def train_encoder(
    name: str,
    encoder: nn.Module,
    examples: Examples,
    teacher: Vectors | None,
    config: Config,
    corpus: Corpus,
    out: Path,
    seed: int,
) -> None:
    """Fine-tunes one encoder, in place, to the epoch with the best weighted F1 on dev; leaves out/<name>.safetensors.

    teacher: the text encoder's vectors, for Eq. 14; None for cross entropy alone. They were computed once, in eval
    mode: a frozen teacher says the same in every epoch. An interrupted training goes on after its last whole epoch.
    """
    device = next(encoder.parameters()).device
    row = {u.id: i for i, u in enumerate(u for split in SPLITS for u in corpus.utterances(split))}  # of the vectors
    train = [u for u in corpus.utterances("train") if examples.length(u.id)]
    dev = corpus.utterances("dev")
    if not train:
        raise InputError(
            f"no utterance of train has what the {name} encoder needs; look at the corpus' sound and video"
        )
    lengths = [examples.length(u.id) for u in train]
    weight = None
    if config.class_weights:
        weight = class_weights(torch.tensor([u.label for u in train]), len(corpus.label_names)).to(device)
    epochs = config.stage1_epochs[name.removesuffix("_kd")]
    steps = epochs * -(-len(train) // config.stage1_batch)
    optimizer, schedule = make_optimizer(encoder, config.stage1_lr, steps, 0.1)
    autocast, scaler = mixed_precision(device)

    parts = {"model": encoder, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    resume = out / f"{name}.resume.pt"
    first, best = checkpoint.load(resume, parts) or (0, {"f1": -1.0})
    for epoch in range(first, epochs):
        checkpoint.seed_everything(seed, name, epoch)
        encoder.train()
        start, step_losses, batches = time.perf_counter(), [], make_batches(lengths, config.stage1_batch)
        for batch in tqdm(batches, desc=f"{name} {epoch + 1}/{epochs}", unit=" steps", disable=None, leave=False):
            utterances = [train[i] for i in batch]
            labels = torch.tensor([u.label for u in utterances], device=device)
            inputs = {k: x.to(device) for k, x in encoder.collate([examples.get(u.id) for u in utterances]).items()}
            with autocast:
                features, logits = encoder(**inputs)
            if teacher is None:
                loss = stage1_loss(logits, labels, weight=weight)  # Eq. 13
            else:
                rows = [row[u.id] for u in utterances]
                t_logits, t_features = teacher.logits[rows].to(device), teacher.features[rows].to(device)
                loss = stage1_loss(logits, labels, features, t_logits, t_features, weight)  # Eq. 14
            optimizer_step(loss, encoder, optimizer, schedule, scaler, config.clip)
            step_losses.append(loss.detach())
        check_finite(step_losses, [[train[i].id for i in batch] for batch in batches])
        seconds = time.perf_counter() - start

        f1 = scores([u.label for u in dev], predict(encode(encoder, examples, [u.id for u in dev])))["weighted_f1"]
        if f1 > best["f1"]:
            best = {"f1": f1, "model": checkpoint.snapshot(encoder)}
        loss = float(torch.stack(step_losses).mean())
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {loss:.4f}, dev W-F1 {f1:.2f}", flush=True)
        padding = {"padding": padding_share(lengths, batches)}
        padding["padding_at_random"] = padding_share(lengths, make_batches([1] * len(train), config.stage1_batch))
        speed = {"utterances_per_second": len(train) / seconds, "lr": schedule.get_last_lr()[0]}
        if config.log_steps:
            for step, x in enumerate(step_losses):
                checkpoint.log(out, device, model=name, epoch=epoch + 1, step=step, loss=float(x))
        checkpoint.log(out, device, model=name, epoch=epoch + 1, loss=loss, dev_f1=f1, **speed, **padding)
        checkpoint.save(resume, parts, epoch + 1, best)
    encoder.load_state_dict(best["model"])
    checkpoint.replace(out / f"{name}.safetensors", lambda part: save_model(encoder, part))
    resume.unlink()


@torch.inference_mode()
def encode(
    encoder: nn.Module, examples: Examples, ids: list[str], batch: int = 32, progress: str | None = None
) -> Vectors:
    """Vectors of the utterances `ids` in eval mode, on the CPU."""
    device = next(encoder.parameters()).device
    autocast, _ = mixed_precision(device)
    encoder.eval()
    d, C = encoder.classifier.in_features, encoder.classifier.out_features
    x = Vectors(torch.full((len(ids), d), torch.nan), torch.full((len(ids), C), torch.nan))
    lengths = [examples.length(i) for i in ids]
    having = sorted((i for i, length in enumerate(lengths) if length), key=lengths.__getitem__)
    starts = range(0, len(having), batch)
    for start in tqdm(starts, desc=progress, unit=" batches", disable=None if progress else True, leave=False):
        rows = having[start : start + batch]
        inputs = {k: v.to(device) for k, v in encoder.collate([examples.get(ids[i]) for i in rows]).items()}
        with autocast:
            features, logits = encoder(**inputs)
        x.features[rows], x.logits[rows] = features.float().cpu(), logits.float().cpu()
    return x


def predict(vectors: Vectors) -> list[int]:
    """The most likely class of each utterance; class 0 where sound or picture lacks: a guess, and scored as one."""
    return vectors.logits.nan_to_num().argmax(dim=1).tolist()


def to_features(vectors: dict[str, Vectors], corpus: Corpus) -> Features:
    """Everyone's vectors with labels, speakers and conversations: the feature file's content."""
    conversations = [(s, c) for s, split in enumerate(SPLITS) for c in corpus.splits[split]]
    utterances = [(s, i, u) for i, (s, c) in enumerate(conversations) for u in c.utterances]
    speakers = list(dict.fromkeys(u.speaker for _, _, u in utterances))
    return Features(
        vectors={name: x.features.nan_to_num() for name, x in vectors.items()},
        present={name: ~x.features.isnan().any(dim=1) for name, x in vectors.items()},
        label=torch.tensor([u.label for _, _, u in utterances]),
        speaker=torch.tensor([speakers.index(u.speaker) for _, _, u in utterances]),
        conversation=torch.tensor([i for _, i, _ in utterances]),
        split=torch.tensor([s for s, _, _ in utterances]),
        label_names=list(corpus.label_names),
        speaker_names=speakers,
        conversation_names=[c.id for _, c in conversations],
        utterance_names=[u.id for _, _, u in utterances],
    )
