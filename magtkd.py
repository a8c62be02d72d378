"""MAGTKD: emotion recognition in conversation from text, audio and video (IJCAI 2025).

    python magtkd.py demo                               # both stages on a small synthetic corpus
    python magtkd.py iemocap --root IEMOCAP_full_release
    python magtkd.py iemocap --features my.safetensors  # stage 2 only, on your own features

In the order of reading: the hyperparameters (Table 1), which are also the options of the command line; one training
loop; stage 1, which fine-tunes an encoder per modality, with text as the teacher of audio and video (Eq. 1-14), and
leaves one feature (a vector) per utterance; stage 2, which fuses the features of a conversation (Eq. 15-25); the
folder of a run, where every file that training makes says what it was made from; the command line.

The losses are in losses.py, the fusion models in fusion.py, the encoders in encoders.py, corpora and the feature file
in data.py. What is used around the method (reports, experiments, prediction, the demo's corpus) is in extras/.
"""

import argparse
import dataclasses
import errno
import inspect
import json
import math
import os
import random
import secrets
import signal
import sys
import time
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below, which take seconds, prints nothing

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from tqdm import tqdm

import losses
from data import (
    KINDS,
    MODALITIES,
    SPLITS,
    TEMPORARY,
    Conversations,
    Corpus,
    Encoded,
    FeatureFile,
    InputError,
    append_line,
    check_target,
    digest,
    file_digest,
    read_csv,
    read_features,
    read_iemocap,
    read_meld,
    read_text,
    remove_leftovers,
    replace_file,
    scores,
    standardise,
    to_feature_file,
    write_features,
)
from encoders import ENCODERS, Encoder, MediaStore, checkpoint_digest, video_shape
from fusion import MAGT, TEXT, Concat, FusionConfig

# Table 1, and every option that changes a result


def option(default: Any, help: str, low: float | None = None, high: float | None = None, choices=None) -> Any:
    """A field of Config with what argparse needs. A dict has a value per modality: --stage1-lr text=1e-6,audio=5e-6."""
    about = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=about)
    return field(default=default, metadata=about)


def each(x: float) -> dict[str, float]:
    return dict.fromkeys(MODALITIES, x)


@dataclass(frozen=True)
class Config:
    """Table 1 of the paper, and what it leaves open. Each field is an option of the command line."""

    width: int = option(768, "width of the features (d) and of the fusion (D)", 8, 8192)
    stage1_lr: dict[str, float] = option(each(1e-5), "peak learning rate of the encoders", 1e-12, 10)
    stage1_batch: int = option(4, "utterances per step of the encoders; 16 makes L_s less noisy", 1, 100_000)
    stage1_epochs: dict[str, int] = option(each(10), "epochs of the encoders", 1, 100_000)
    stage2_lr: float = option(1e-4, "peak learning rate of the fusion (Table 1, IEMOCAP: 1e-5)", 1e-12, 10)
    stage2_batch: int = option(16, "conversations per step of the fusion", 1, 100_000)
    stage2_epochs: int = option(30, "epochs of the fusion", 1, 100_000)
    alpha: float = option(0.7, "weight of L_KD^a in Eq. 25", 0, 1000)
    beta: float = option(0.8, "weight of L_KD^v in Eq. 25", 0, 1000)
    # Not in Table 1
    text_model: str = option("roberta-large", "hub name or folder of a text encoder with a mask token")
    audio_model: str = option("facebook/data2vec-audio-base-960h", "hub name or folder of a Data2vec or wav2vec 2.0")
    video_model: str = option("facebook/timesformer-base-finetuned-k400", "hub name or folder of a TimeSformer")
    modalities: tuple[str, ...] = option(MODALITIES, "text, or text with audio or video or both, as text,audio")
    max_tokens: int = option(512, "longest prompt; the oldest context is cut", 64, 100_000)
    dropout: float = option(0.5, "of MAGT and Context (Concat has 0.1)", 0, 0.99)
    warmup: float = option(0.1, "share of the steps in which the learning rate rises, both stages", 0, 1)
    clip: float = option(1.0, "largest norm of the gradient", 1e-6, 1e6)
    precision: str = option(
        "auto",
        "of the forward passes; auto: bfloat16 (else float16) on CUDA, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    class_weights: bool = option(False, "cross entropy weighted by inverse class frequency, both stages")
    causal: bool = option(False, "stage 2 attends to the past only, as `predict --stream` needs")
    gradient_checkpointing: bool = option(False, "stage 1 with less memory, more slowly")


CONFIGS = {
    # Table 1 has stage2_lr = 1e-5 for IEMOCAP: in 210 steps a model with random weights hardly moves (differences, 19).
    "iemocap": Config(stage2_lr=1e-4, alpha=0.7, beta=0.8),
    "meld": Config(stage2_lr=1e-4, alpha=0.01, beta=0.09),
    "csv": Config(),
    # Small encoders with random weights learn faster and for longer than pretrained ones are tuned.
    "demo": Config(64, each(1.5e-3), 16, {"text": 4, "audio": 6, "video": 12}, stage2_lr=1e-3),
}
TABLE_NAMES = {"text": "T", "audio": "A", "video": "V", "audio_kd": "A_KD", "video_kd": "V_KD"}  # Table 3's
MODELS = {"Concat": Concat, "MAGT": MAGT}  # what stage 2 trains: rows of the table

# The training loop of both stages


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW, a learning rate that rises and then falls linearly, one step per batch."""

    lr: float  # the peak
    batch: int  # examples per step
    epochs: int
    warmup_steps: int
    total_steps: int  # after which the learning rate would be 0
    clip: float
    precision: str
    weight_decay: float = 0.01


def make_recipe(config: Config, lr: float, batch: int, epochs: int, examples: int) -> Recipe:
    steps = epochs * math.ceil(examples / batch)
    return Recipe(lr, batch, epochs, math.ceil(config.warmup * steps), steps, config.clip, config.precision)


def train(
    model: nn.Module,
    lengths: dict[str, int],
    loss_terms: Callable[[list[str]], dict[str, Tensor]],
    evaluate: Callable[[], dict],
    recipe: Recipe,
    path: Path,
    seed: int,
    key: str,
) -> tuple[list[dict], int]:
    """Trains a model and leaves it at its best epoch on dev.

    Returns the history, per epoch {"train": mean loss terms, **evaluate()}, and the best epoch, counted from 0.

    lengths: each training example's name and length; batches hold examples of similar length.
    loss_terms: of a batch of examples, by their names: {"loss": scalar, more scalars to log}.
    evaluate: called after each epoch: {"dev_f1": the best epoch has the highest, ..}.
    path, key: the state after an epoch is kept in `path`.resume.pt under this key, from where an interrupted training
        resumes with the same digits. The caller writes the final file, then removes it. log.jsonl gets a line an epoch.
    Errors: InputError if the loss is no longer finite.
    """
    device, resume = next(model.parameters()).device, Path(f"{path}.resume.pt")
    optimizer, schedule = make_optimizer(model, recipe)
    autocast, scaler = mixed_precision(device, recipe.precision)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history, best = load_state(resume, parts, key)
    saved, cost, printed = time.monotonic(), 0.0, 0.0
    for epoch in range(len(history), recipe.epochs):
        seed_everything(seed, epoch)
        model.train()
        start, terms, batches = time.perf_counter(), [], make_batches(lengths, recipe.batch)
        for batch in tqdm(batches, f"{path.name} {epoch + 1}/{recipe.epochs}", disable=None, leave=False):
            with autocast:
                term = loss_terms(batch)
            optimizer_step(term["loss"], model, optimizer, schedule, scaler, recipe.clip)
            terms.append({name: x.detach() for name, x in term.items()})
        check_finite([term["loss"] for term in terms], batches)
        seconds = time.perf_counter() - start

        mean, found = mean_terms(terms), evaluate()
        history.append({"train": mean, **found})
        if found["dev_f1"] > best["dev_f1"]:
            weights = {name: x.detach().to("cpu", copy=True) for name, x in model.state_dict().items()}
            best = {"epoch": epoch, "dev_f1": found["dev_f1"], "model": weights}
        entry = {"model": path.name, "epoch": epoch + 1, "lr": schedule.get_last_lr()[0], "seconds": seconds}
        append_line(path.parent / "log.jsonl", json.dumps(entry | {"key": key[:8], "dev_f1": found["dev_f1"], **mean}))
        if time.monotonic() - printed > 5:  # epochs of stage 2 can be short
            printed = time.monotonic()
            text = f"{path.name}: epoch {epoch + 1} of {recipe.epochs}, loss {mean['loss']:.4f}"
            print(f"{text}, dev W-F1 {found['dev_f1']:.2f}", flush=True)
        if time.monotonic() - saved > 10 * cost:  # saving may take a tenth of the time
            started = time.monotonic()
            state = {"key": key, "history": history, "best": best}
            state["parts"] = {name: part.state_dict() for name, part in parts.items()}
            replace_file(resume, lambda temporary, state=state: torch.save(state, temporary))
            saved = time.monotonic()
            cost = saved - started
    model.load_state_dict(best["model"])
    return history, best["epoch"]


def load_state(path: Path, parts: dict[str, Any], key: str) -> tuple[list[dict], dict]:
    """Puts the parts into the state kept under this key. Returns history and best epoch; empty if there is none."""
    nothing = ([], {"epoch": -1, "dev_f1": -1.0})
    if not path.is_file():
        return nothing
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["key"] == key:
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            return list(state["history"]), dict(state["best"])
        why = "of a training with other data or options"
    except OSError:
        raise  # for lack of rights, say: nothing is wrong with the file
    except Exception as e:  # a damaged file makes torch raise nearly anything
        why = f"damaged ({type(e).__name__})"
    print(f"{path.name} is {why}: this training starts anew, the file is kept as {set_aside(path).name}")
    return nothing


def optimizer_step(loss: Tensor, model: nn.Module, optimizer, schedule, scaler, clip: float) -> None:
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # before clipping: the norm that is clipped is the true one
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()


def make_optimizer(model: nn.Module, recipe: Recipe):
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    steps = {"num_warmup_steps": recipe.warmup_steps, "num_training_steps": recipe.total_steps}
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, **steps)


def mixed_precision(device: torch.device, precision: str) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """Autocast, and a loss scaler for float16. auto: bfloat16 on CUDA, float16 where it has none; float32 on a CPU."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
    if dtype is None and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    half = dtype in (torch.bfloat16, torch.float16)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half), scaler


def make_batches(lengths: dict[str, int], size: int) -> list[list[str]]:
    """Names in batches of similar length, in random order; all at random where the lengths are equal.

    Sorted by the length times a random factor between 0.9 and 1.1, cut into batches, and the batches shuffled: little
    padding, and no two epochs with the same batches.
    """
    names = list(lengths)
    names = [names[i] for i in torch.randperm(len(names)).tolist()]
    factors = dict(zip(names, torch.empty(len(names)).uniform_(0.9, 1.1).tolist()))
    if len(set(lengths.values())) > 1:
        names.sort(key=lambda name: lengths[name] * factors[name])
    batches = [names[i : i + size] for i in range(0, len(names), size)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def check_finite(step_losses: list[Tensor], batches: list[list[str]]) -> None:
    """Stops a run whose loss is no longer finite. Called once an epoch, so that no step waits for a GPU."""
    bad = (~torch.stack(step_losses).isfinite()).nonzero()
    if len(bad):
        raise InputError(
            f"the loss is no longer finite, first in step {int(bad[0])} of this epoch, on "
            f"{', '.join(batches[int(bad[0])])}. Look at these utterances, or lower the learning rate."
        )


def mean_terms(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name: float(torch.stack([term[name] for term in terms]).float().mean()) for name in terms[0]}


def seed_everything(*parts: int | str) -> None:
    """Seeds Python, NumPy (SpecAugment draws from it) and torch.

    Called at the start of every epoch with the run's seed and the epoch, it makes the random state a function of these:
    a resumed run draws what an undisturbed one would have drawn, and two models with one seed get the same batches.
    """
    seed = zlib.crc32(json.dumps(parts).encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Inverse frequency: N / (C n_c) for a class with n_c of the N labels, 1 each if all are as frequent. float32 [C].

    labels: [N] int64, of train. A class without a label in train counts as one with a single label.
    """
    return len(labels) / (num_classes * torch.bincount(labels, minlength=num_classes).clamp(min=1))


# Stage 1: an encoder per modality


class Examples(NamedTuple):
    """The inputs of an encoder, by utterance id."""

    get: Callable[[str], Any]
    lengths: dict[str, int]  # tokens, samples or frames; an utterance without audio or video has no entry


def run_stage1(
    config: Config, names: list[str], corpus: Corpus, store: MediaStore | None, run: "Run", seed: int,
    device: torch.device,
) -> tuple[dict[str, Encoded], dict[str, str]]:  # fmt: skip
    """Trains each encoder unless the run's folder has what today's corpus and options would make.

    names: of KINDS, in this order. audio_kd starts from the trained audio encoder, as in the released code (the paper
        is silent); video_kd starts from the checkpoint. store: None for text only.
    Returns features and logits by name, and the keys of the weights that made them. Each encoder leaves
    NAME.safetensors (weights) and NAME.features.safetensors (features and logits of every utterance).
    """
    made = stage1_parts(config, names, corpus, store, run, seed)
    files = {name: (run.out / f"{name}.safetensors", run.out / f"{name}.features.safetensors") for name in names}
    fits = {n: is_current(files[n][1], made[n].features) for n in names}
    # Weights that somebody removed, to save space, are not missed as long as their features are today's.
    to_train = [n for n in names if files[n][0].exists() or not fits[n]]
    to_train = [n for n in to_train if not is_current(files[n][0], made[n].weights)]
    if "audio_kd" in to_train and "audio" not in to_train and not files["audio"][0].exists():
        to_train.insert(to_train.index("audio_kd"), "audio")
    to_encode = [n for n in names if n in to_train or not fits[n]]

    def new_encoder(name: str) -> tuple[Encoder, Examples]:
        seed_everything(seed, name)
        encoder = make_encoder(name, config, len(corpus.label_names)).to(device)
        return encoder, make_examples(encoder, name, corpus, store)

    for name in to_train:
        encoder, examples = new_encoder(name)
        try_encoder(name, encoder, examples, corpus, config)
    for name in to_encode:
        weights, features = files[name]
        encoder, examples = new_encoder(name)
        if name in to_train:
            teacher = Encoded(**load_file(files[TEXT][1])) if name.endswith("_kd") else None
            if name == "audio_kd":
                load_model(encoder, files["audio"][0])
            train_encoder(name, encoder, examples, teacher, config, corpus, weights, seed, made[name].weights)
        load_model(encoder, weights)
        encoded = encode(encoder, examples, [u.id for u in corpus.utterances()], config.precision)
        ids = {"utterances": json.dumps([u.id for u in corpus.utterances()])}
        about_it = ids | metadata(made[name].features)
        put(features, lambda path, x=encoded, about_it=about_it: save_file(x._asdict(), path, about_it))
    return {name: Encoded(**load_file(files[name][1])) for name in names}, {n: digest(made[n].weights) for n in names}


class Made(NamedTuple):
    """What an encoder's two files are made from, by part."""

    weights: dict[str, Any]
    features: dict[str, Any]


def stage1_parts(config, names, corpus, store, run, seed) -> dict[str, Made]:
    """What each encoder's files would be made from today. A corrected label of test changes scores, not weights."""
    made: dict[str, Made] = {}
    for name in names:
        m = name.removesuffix("_kd")

        def inputs(*splits: str, m=m) -> str:
            if m == TEXT:
                return digest(
                    [[[u.id, u.speaker, u.text] for u in c.utterances] for s in splits for c in corpus.splits[s]]
                )
            return digest([[u.id, store.digest(u.id, m)] for u in corpus.utterances(*splits)])

        checkpoint = checkpoint_digest(getattr(config, f"{m}_model"))
        if checkpoint is None:  # neither a folder nor in the cache: what was made with it before can still be used
            checkpoint = about(run.out / f"{name}.safetensors")["made_from"].get("checkpoint")
            if checkpoint:
                print(f"{name}: {getattr(config, f'{m}_model')} is not at hand; taken to be what it was")
            else:
                make_encoder(name, config, len(corpus.label_names))  # downloads it, or says why not
                checkpoint = checkpoint_digest(getattr(config, f"{m}_model"))
        recipe = [config.stage1_lr[m], config.stage1_batch, config.stage1_epochs[m], config.warmup, config.clip]
        options = [*recipe, config.width, config.precision, config.class_weights, m == TEXT and config.max_tokens]
        weights = {
            "salt": run.salt, "seed": seed, "options": options, "checkpoint": checkpoint,
            "labels": digest([corpus.label_names, [u.label for u in corpus.utterances("train", "dev")]]),
            "inputs": inputs("train", "dev"),
        }  # fmt: skip
        if name.endswith("_kd"):
            weights["teacher"] = digest(made[TEXT].features)
        if name == "audio_kd":
            weights["start"] = digest(made["audio"].weights)
        made[name] = Made(weights, {"weights": digest(weights), "inputs": inputs(*SPLITS)})
    return made


def make_encoder(name: str, config: Config, num_classes: int) -> Encoder:
    modality = name.removesuffix("_kd")
    more = {"max_tokens": config.max_tokens} if modality == TEXT else {}
    encoder = ENCODERS[modality](getattr(config, f"{modality}_model"), num_classes, config.width, **more)
    if config.gradient_checkpointing:
        encoder.backbone.gradient_checkpointing_enable()
    return encoder


def make_examples(encoder: Encoder, name: str, corpus: Corpus, store: MediaStore | None) -> Examples:
    if name == TEXT:
        conversations = [c for split in SPLITS for c in corpus.splits[split]]
        prompts = {u.id: p for c in conversations for u, p in zip(c.utterances, encoder.prompts(c))}
        return Examples(prompts.__getitem__, {i: len(p) for i, p in prompts.items()})
    modality = name.removesuffix("_kd")
    lengths = {u.id: store.length(u.id, modality) for u in corpus.utterances()}
    return Examples(lambda i: store.get(i, modality), {i: n for i, n in lengths.items() if n})


def try_encoder(name: str, encoder: Encoder, examples: Examples, corpus: Corpus, config: Config) -> None:
    """What would fail after hours should fail at once: a training step on the longest and on the shortest examples.

    The longest fill a GPU's memory; on the shortest, SpecAugment's masks may be longer than the clip. A text encoder
    whose features depend on the batch is named. The encoder is changed by this: throw it away.
    Errors: InputError if no utterance of train has an example.
    """
    ids = sorted((u.id for u in corpus.utterances("train") if u.id in examples.lengths), key=examples.lengths.get)
    if not ids:
        raise InputError(f"no utterance of train has what the {name} encoder needs; look at the audio and video files")
    recipe = make_recipe(config, 0.0, config.stage1_batch, 1, len(ids))
    optimizer, schedule = make_optimizer(encoder, recipe)
    autocast, scaler = mixed_precision(encoder.device, config.precision)
    encoder.train()
    for batch in (ids[-config.stage1_batch :], ids[: config.stage1_batch]):
        with autocast:
            features, logits = encoder([examples.get(i) for i in batch])
            loss = features.float().square().mean() + logits.float().square().mean()
        optimizer_step(loss, encoder, optimizer, schedule, scaler, config.clip)
    encoder.eval()
    with torch.inference_mode():
        single = encoder([examples.get(ids[0])])[0]
        in_batch = encoder([examples.get(i) for i in (ids[0], *ids[-3:])])[0][:1]
    if (single - in_batch).abs().max() > 0.01 * single.abs().max():
        print(f"{name}: a feature of this encoder depends on the other examples of its batch", file=sys.stderr)


def train_encoder(
    name: str, encoder: Encoder, examples: Examples, teacher: Encoded | None, config: Config, corpus: Corpus,
    path: Path, seed: int, parts: dict[str, Any],
) -> None:  # fmt: skip
    """Fine-tunes one encoder to the epoch with the best weighted F1 on dev, and leaves its weights in `path`.

    teacher: the text encoder's features and logits, for Eq. 14; None for cross entropy only. They were computed once,
    in eval mode: a frozen teacher gives the same in every epoch.
    """
    label = {u.id: u.label for u in corpus.utterances()}
    row = {u.id: i for i, u in enumerate(corpus.utterances())}  # of the teacher
    train_ids, dev_ids = ([u.id for u in corpus.utterances(split)] for split in ("train", "dev"))
    lengths = {i: examples.lengths[i] for i in train_ids if i in examples.lengths}
    weight = None
    if config.class_weights:
        labels = torch.tensor([label[i] for i in lengths])
        weight = class_weights(labels, len(corpus.label_names)).to(encoder.device)

    def loss_terms(ids: list[str]) -> dict[str, Tensor]:
        features, logits = encoder([examples.get(i) for i in ids])
        labels, teaching = torch.tensor([label[i] for i in ids], device=logits.device), {}
        if teacher is not None:
            rows = [row[i] for i in ids]
            teaching = {f"teacher_{what}": x[rows].to(logits.device) for what, x in teacher._asdict().items()}
        return losses.stage1_loss(logits, labels, features, **teaching, weight=weight)  # Eq. 13, 14

    def evaluate() -> dict:
        predictions = most_likely(encode(encoder, examples, dev_ids, config.precision))
        return {"dev_f1": scores([label[i] for i in dev_ids], predictions)["weighted_f1"]}

    m = name.removesuffix("_kd")
    recipe = make_recipe(config, config.stage1_lr[m], config.stage1_batch, config.stage1_epochs[m], len(lengths))
    train(encoder, lengths, loss_terms, evaluate, recipe, path.with_suffix(""), seed, digest(parts))
    put(path, lambda temporary: save_model(encoder, temporary, metadata(parts)))
    path.with_suffix(".resume.pt").unlink(missing_ok=True)


@torch.inference_mode()
def encode(encoder: Encoder, examples: Examples, ids: list[str], precision: str = "auto", batch: int = 32) -> Encoded:
    """Features and logits of the utterances `ids` in eval mode, on the CPU; NaN where audio or video is missing."""
    autocast, _ = mixed_precision(encoder.device, precision)
    encoder.eval()
    d, C = encoder.classifier.in_features, encoder.classifier.out_features
    encoded = Encoded(torch.full((len(ids), d), torch.nan), torch.full((len(ids), C), torch.nan))
    there = sorted((r for r, i in enumerate(ids) if i in examples.lengths), key=lambda r: examples.lengths[ids[r]])
    for start in tqdm(range(0, len(there), batch), "encoding", unit=" batches", disable=None, leave=False):
        rows = there[start : start + batch]
        with autocast:
            features, logits = encoder([examples.get(ids[r]) for r in rows])
        encoded.features[rows], encoded.logits[rows] = features.float().cpu(), logits.float().cpu()
    return encoded


def most_likely(encoded: Encoded) -> list[int]:
    """The most likely class of each utterance; class 0 where audio or video is missing: a prediction like any other."""
    return encoded.logits.nan_to_num().argmax(dim=1).tolist()


# Stage 2: the fusion


def train_fusion(
    name: str, build: Callable[[FusionConfig], nn.Module], data: Conversations, config: Config, path: Path,
    seed: int, run: "Run", loss: Callable[..., dict[str, Tensor]] = losses.stage2_loss,
    adjust: Callable[[Recipe, int], Recipe] = lambda recipe, examples: recipe, keep_weights: bool = True,
) -> dict:  # fmt: skip
    """Trains one fusion model with one seed, unless path.json says that it was made from all of this already.

    name: with the seed it decides the initial weights and the batches. build: the model, from its sizes. loss: as
    losses.stage2_loss. adjust: another recipe, from Table 1's and the number of training conversations. keep_weights:
    leave path.safetensors too.
    Returns the content of path.json: {"seed", "epoch", "dev_f1", "labels", "predictions" (on test, at the epoch with
    the best weighted F1 on dev), "test_selected" (scores of the epoch that is best on test), "history" (per epoch, per
    split, the loss terms), "key", "made_from"}.
    """
    result_file, weights_file = Path(f"{path}.json"), Path(f"{path}.safetensors")
    seed_everything(seed, name)
    widths = {m: x.shape[1] for m, x in data.features.items()}
    sizes = {"width": config.width, "dropout": config.dropout, "causal": config.causal}
    model = build(FusionConfig(widths, data.num_classes, data.num_speakers, **sizes)).to(data.device)
    batch, epochs, examples = config.stage2_batch, config.stage2_epochs, len(data.splits["train"])
    recipe = adjust(make_recipe(config, config.stage2_lr, batch, epochs, examples), examples)
    parts = {
        "salt": run.salt, "seed": seed, "features and labels": data.digest, "code": code_digest(build, loss),
        "recipe": dataclasses.asdict(recipe), "weights of the loss": [config.alpha, config.beta, config.class_weights],
        "model": [type(model).__name__, repr(model.config), describe(build), describe(loss)],
    }  # fmt: skip
    if is_current(result_file, parts) and (not keep_weights or is_current(weights_file, parts)):
        return json.loads(result_file.read_text())
    weight = None
    if config.class_weights:
        weight = class_weights(data.batch(data.splits["train"]).labels.cpu(), data.num_classes).to(data.device)

    def loss_of(batch) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(*batch.inputs)
        terms = loss(out.logits, out.hidden, batch.labels, config.alpha, config.beta, batch.rows, weight)
        return out.logits[TEXT], terms

    def loss_terms(names: list[str]) -> dict[str, Tensor]:
        return loss_of(data.batch(names))[1]

    def evaluate() -> dict:
        dev, test = (evaluate_fusion(model, loss_of, data, split, recipe) for split in ("dev", "test"))
        both = {"dev": dev["terms"], "test": test["terms"]}
        return {"dev_f1": dev["scores"]["weighted_f1"], **both, "test_scores": test["scores"]}

    lengths = dict.fromkeys(data.splits["train"], 1)  # rows are not padded, so batches are at random
    history, best = train(model, lengths, loss_terms, evaluate, recipe, path, seed, digest(parts))

    test = evaluate_fusion(model, loss_of, data, "test", recipe)
    result = {"seed": seed, "epoch": best + 1, "dev_f1": history[best]["dev_f1"]}
    result |= {"labels": test["labels"], "predictions": test["predictions"]}
    result["test_selected"] = max((h["test_scores"] for h in history), key=lambda s: s["weighted_f1"])
    result["history"] = [{name: x for name, x in h.items() if name != "test_scores"} for h in history]
    if keep_weights:
        about = {"class": type(model).__name__, "config": json.dumps(dataclasses.asdict(model.config))}
        about |= {"kinds": json.dumps(data.kinds), **metadata(parts)}
        put(weights_file, lambda temporary: save_model(model, temporary, about))
    text = json.dumps({**result, "key": digest(parts), "made_from": parts})
    put(result_file, lambda temporary: temporary.write_text(text))
    Path(f"{path}.resume.pt").unlink(missing_ok=True)
    return json.loads(text)


@torch.inference_mode()
def evaluate_fusion(model: nn.Module, loss_of: Callable, data: Conversations, split: str, recipe: Recipe) -> dict:
    """{"terms" (of the loss, mean over batches), "labels", "predictions", "scores"} of a split, in eval mode."""
    autocast, _ = mixed_precision(data.device, recipe.precision)
    model.eval()
    all_terms, labels, predictions, names = [], [], [], data.splits[split]
    for start in range(0, len(names), recipe.batch):
        batch = data.batch(names[start : start + recipe.batch])
        with autocast:
            logits, terms = loss_of(batch)
        all_terms.append(terms)
        labels.append(batch.labels)
        predictions.append(logits.argmax(dim=-1))  # Eq. 23
    found = {"labels": torch.cat(labels).tolist(), "predictions": torch.cat(predictions).tolist()}
    return {"terms": mean_terms(all_terms), **found, "scores": scores(**found)}


def run_stage2(
    config: Config, file: FeatureFile, sets: list[tuple[str, ...]], seeds: range, run: "Run", device: torch.device,
    models: dict[str, Callable[[FusionConfig], nn.Module]] = MODELS, **variant,
) -> dict[str, list[dict]]:  # fmt: skip
    """Each model over each set of features, with each seed.

    sets: tuples of feature kinds, text first. variant: `loss` and `adjust` of train_fusion.
    Returns rows of Table 3: name -> a result of train_fusion per seed.
    """
    rows: dict[str, list[dict]] = {}
    (run.out / "fusion").mkdir(exist_ok=True)
    for name, build in models.items():
        for kinds in sets:
            data, row = Conversations(file, kinds, device), row_name(name, kinds)
            rows[row] = [
                train_fusion(name, build, data, config, fusion_path(run, row, s), s, run, **variant) for s in seeds
            ]
            f1 = [scores(r["labels"], r["predictions"])["weighted_f1"] for r in rows[row]]
            std = np.std(f1, ddof=1) if len(f1) > 1 else 0.0
            print(f"{row}: test W-F1 {np.mean(f1):.2f} ± {std:.2f}, seeds: {len(f1)}", flush=True)
    return rows


def fusion_path(run: "Run", row: str, seed: int) -> Path:
    """Without an ending: .json has the result, .safetensors the weights."""
    return run.out / "fusion" / f"{row.replace(' ', '-')}-seed{seed}"


def row_name(fusion: str, kinds: tuple[str, ...]) -> str:
    """As in Table 3: "MAGT T+A_KD+V"."""
    return f"{fusion} {'+'.join(TABLE_NAMES[k] for k in kinds)}"


def feature_sets(kinds: list[str], all_of_table3: bool) -> list[tuple[str, ...]]:
    """Which features are fused: T + A_KD + V, the paper's best row, or the nearest to it; or all of Table 3, and T."""
    audio, video = ([k for k in order if k in kinds] for order in (("audio", "audio_kd"), ("video_kd", "video")))
    if not all_of_table3:
        return [(TEXT, *audio[-1:], *video[-1:])]
    sets = [(TEXT, *a, *v) for a in ([(k,) for k in audio] or [()]) for v in ([(k,) for k in video[::-1]] or [()])]
    return sorted({(TEXT,), *sets}, key=lambda kinds: (len(kinds), kinds))


def load_fusion(path: Path, more: dict[str, tuple[type, type]] | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """A trained fusion model, in eval mode on the CPU, and the kinds of features that it fuses.

    more: name of a class -> class and class of its configuration, besides the paper's (extras/variants.py).
    Errors: InputError for a file that `train_fusion` did not leave.
    """
    classes = {"Concat": (Concat, FusionConfig), "MAGT": (MAGT, FusionConfig), **(more or {})}
    try:
        with safe_open(path, framework="pt") as f:
            about = f.metadata() or {}
        model_class, config_class = classes[about["class"]]
        model = model_class(config_class(**json.loads(about["config"])))
        load_model(model, path)
        return model.eval(), tuple(json.loads(about["kinds"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"{path}: not a fusion model of this program ({type(e).__name__}); train it again") from e


# A run's folder. Every file that training makes carries a key: a hash of its parts, what it was made from. It is used
# again if and only if the key is today's. Else it is made again, a line says which part changed, and the old file is
# renamed to NAME.<8 digits of its key>. Nothing is deleted. Sizes, times and paths decide nothing.

CONFIG = "config.json"  # the first file of a folder: what marks it as a run's, with the options that it was made with


class Run(NamedTuple):
    """A run's folder, owned by this process as long as `lock` lives."""

    out: Path
    salt: str  # part of every key; --fresh draws another one
    lock: Any


def open_run(out: Path, options: dict[str, Any], fresh: bool = False, notes: dict[str, Any] | None = None) -> Run:
    """Makes or reopens a run's folder.

    options: they must be those that the folder was made with. notes: written to config.json besides.
    Errors: InputError if the folder holds other files, is in use, or was made with other options.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, salt, record = out / CONFIG, secrets.token_hex(4) if fresh else "", {}
    options = json.loads(json.dumps(options))
    names = sorted(p.name for p in out.iterdir() if p.name != ".lock" and not p.name.startswith(TEMPORARY))
    if names and CONFIG not in names:
        raise InputError(f"{out}: holds files that are not of a run ({', '.join(names[:3])}); give a new --out")
    check_target(out / ".lock")
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as e:
        raise InputError(f"{out}: another run is using this folder; wait for it, or give another --out") from e
    if path.exists():
        record = read_json(path)
        if record.get("program") != "magtkd":
            raise InputError(f"{path}: not of this program; give another --out")
        changed = [f"{k}: {record.get(k)} there, {x} now" for k, x in sorted(options.items()) if record.get(k) != x]
        made = any(out.glob("*.safetensors*")) or any(out.glob("*.resume.pt*")) or any(out.glob("*/*-seed*"))
        if changed and made and not fresh:
            raise InputError(
                f"{out} was made with other options ({'; '.join(changed)}). Give the same options to resume, another "
                "folder with --out, or --fresh to train everything again (the old files are kept under a second name)"
            )
    for folder in (out, *(p for p in out.iterdir() if p.is_dir() and not p.is_symlink())):
        remove_leftovers(folder)
    record |= {"program": "magtkd", "salt": salt or record.get("salt", "")} | options | (notes or {})
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(record, indent=2)))
    return Run(out, record["salt"], lock)


def read_json(path: Path) -> dict[str, Any]:
    """Errors: InputError for what is no JSON object, or cannot be read."""
    try:
        return dict(json.loads(read_text(path)))
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: no JSON object ({type(e).__name__}); restore it, or use another folder") from e


def metadata(parts: dict[str, Any]) -> dict[str, str]:
    """What a safetensors file says of itself. `code` is for a warning only: stage 1 takes hours."""
    return {"key": digest(parts), "made_from": json.dumps(parts), "code": code_digest()}


def about(path: Path) -> dict[str, Any]:
    """Key, parts and code of a file that training made. Any other file, or a damaged one, has no parts and no key.

    Errors: OSError for a file that cannot be read now: nothing is known of it, so it must not be made again.
    """
    if not path.is_file():
        return {"made_from": {}}
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_bytes())
            return {"key": found["key"], "made_from": dict(found["made_from"])}
        with safe_open(path, framework="pt") as f:
            found = f.metadata() or {}
        return {"key": found["key"], "made_from": dict(json.loads(found["made_from"])), "code": found["code"]}
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return {"made_from": {}}


def is_current(path: Path, parts: dict[str, Any]) -> bool:
    """Whether a file was made from these parts. A line says what changed where it was made from others."""
    found = about(path)
    if found.get("key") == digest(parts):
        return True
    if os.path.lexists(path):
        before, now = found["made_from"], json.loads(json.dumps(parts))
        changed = [name for name in now if before.get(name) != now[name]]
        why = f"made from other {', '.join(changed)}" if before else "not of this program, or damaged"
        why = "--fresh" if "salt" in changed and before else why
        check_target(path)  # before hours of training, not after them
        print(f"{path.name}: {why}; it is made again, the old file is kept under a second name", flush=True)
    return False


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that training made; one that is there already is renamed first."""
    if os.path.lexists(path):
        set_aside(path)
    replace_file(path, write)


def set_aside(path: Path) -> Path:
    """Renames a file to NAME.<8 digits>, of its key or, without one, of its content. Returns the new path."""
    check_target(path)
    number = str(about(path).get("key") or digest(path.read_bytes()))[:8]
    new = path.with_name(f"{path.name}.{number}")
    while os.path.lexists(new):
        new = new.with_name(f"{new.name}+")
    return path.rename(new)


def code_digest(*functions: Callable) -> str:
    """Of the method's source: the five modules, extras/variants.py, and the files that define these functions."""
    here = Path(__file__).resolve().parent
    files = {here / f"{name}.py" for name in ("data", "encoders", "fusion", "losses", "magtkd", "extras/variants")}
    files |= {Path(inspect.getsourcefile(f)).resolve() for f in functions if callable(f) and hasattr(f, "__module__")}
    return digest([path.read_text(encoding="utf-8") for path in sorted(files) if path.exists()])


def describe(function: Callable) -> str:
    """Its name, and the object that it belongs to: a method of a dataclass has the fields in it."""
    owner = getattr(function, "__self__", "")
    return f"{getattr(function, '__qualname__', type(function).__name__)} {owner!r}"


def check_absent(corpus: Corpus, names: list[str], out: Path) -> None:
    """Errors: InputError if the corpus lacks utterances or media files that the run's encoders were made from.

    A disk that is not mounted or a session that was not unpacked must not train anything again.
    """
    here = {u.id: u for u in corpus.utterances()}
    for name in names:
        path, m = out / f"{name}.features.safetensors", name.removesuffix("_kd")
        if "weights" not in about(path)["made_from"]:  # not there, or other than an encoder's features
            continue
        with safe_open(path, framework="pt") as f:
            ids, missing = json.loads(f.metadata()["utterances"]), f.get_tensor("features").isnan().any(dim=1)
        media = {i: m == TEXT or os.path.exists(getattr(u, m) or "") for i, u in here.items()}
        gone = [i for i, without in zip(ids, missing.tolist()) if i not in here or not (media[i] or without)]
        if gone:
            raise InputError(
                f"{corpus.name}: {len(gone)} utterances are missing, or their files, that {path} was made from ("
                f"{', '.join(gone[:3])}). Bring them back (is a disk not mounted?), or train without them: --fresh"
            )


# Both stages, and the command line

READERS = {"iemocap": read_iemocap, "meld": read_meld, "csv": read_csv}
ROOTS = {"iemocap": "data/IEMOCAP_full_release", "meld": "data/MELD.Raw"}
SMALL = ("width", "stage1_lr", "stage1_batch", "stage1_epochs", "stage2_lr")  # what --encoders tiny takes of the demo's
FREE = ("modalities", "causal", "gradient_checkpointing")  # options that may change: the keys of the files see to them


def run_all(args: argparse.Namespace, config: Config) -> None:
    """From a corpus or a feature file to a report in args.out."""
    from extras import demo, report, variants

    if args.check:
        from extras import check

        corpus = READERS[args.corpus](args.root)
        return check.check(corpus, args.root, config, args.out, args.device)
    device = torch.device(args.device or choose_device(args.encoders == "full" and not args.features))
    corpus = file = None
    if args.features:
        file = read_features(args.features)
    elif args.corpus != "demo":
        corpus = READERS[args.corpus](args.root)
        check_media(corpus, config, args.root)
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    options |= {"corpus": args.corpus, "seed": args.seed, "encoders": args.encoders, "preset": args.preset}
    options["features"] = bool(args.features)
    notes = {k: getattr(config, k) for k in FREE} | {"root": args.root and os.path.abspath(args.root)}
    run = open_run(args.out, options, args.fresh, notes)

    models, variant = dict(MODELS), {}
    if args.preset == "released":
        released = variants.released(args.corpus)
        models["MAGT"], variant = released.model, {"loss": released.loss, "adjust": released.recipe}
    if args.ablation:
        models = {"Concat": models.pop("Concat"), "Context": variants.Context, **models}
    seeds = range(args.seed, args.seed + args.seeds)
    rows, problems, scaling = {}, [], {}
    if file is None:
        corpus = corpus or demo.read_demo(args.out)
        print(f"{corpus.name} at {args.root or args.out / 'corpus'}:", *corpus.notes, sep="\n  ", flush=True)
        names = [k for k in KINDS if k.removesuffix("_kd") in config.modalities]
        if not args.ablation and "video_kd" in names:  # the paper's best row needs T, A_KD (which starts from A) and V
            names.remove("video_kd")
        if not args.fresh:
            check_absent(corpus, names, args.out)
        if args.encoders == "tiny":
            config = dataclasses.replace(config, **demo.tiny_models(corpus, args.out))
        store, wanted = None, tuple(m for m in ("audio", "video") if m in config.modalities)
        if wanted:
            shape = video_shape(config.video_model) if "video" in wanted else ()
            store = MediaStore(args.media or args.out / "media", wanted, *shape)
            store.fill(corpus.utterances(), args.workers)
            problems = store.problems()
        encoded, keys = run_stage1(config, names, corpus, store, run, args.seed, device)
        file = to_feature_file(encoded, corpus, keys)
        write_joint(args.out / "features.safetensors", file)
        rows = encoder_rows(encoded, corpus, args.seed)
        lines = [*corpus.notes, *stage1_notes(encoded, corpus, args.out)]
    else:
        names = [k for k in file.features if k.removesuffix("_kd") in config.modalities]
        if lacking := set(getattr(args, "modalities", ())) - {k.removesuffix("_kd") for k in names}:
            raise InputError(f"{args.features}: has no {', '.join(lacking)} features, which --modalities names")
        file, scaling = standardise(dataclasses.replace(file, features={k: file.features[k] for k in names}))
        how = f"standardised on train: {', '.join(scaling)}" if scaling else "as they are"
        lines = [f"features of {len(file.label)} utterances from {args.features.name}, {how}"]
        replace_file(args.out / "standardisation.json", lambda path: path.write_text(json.dumps(scaling)))
    rows |= run_stage2(config, file, feature_sets(names, args.ablation), seeds, run, device, models, **variant)

    main_row = report.main_row(rows)
    best = max(rows[main_row], key=lambda r: r["dev_f1"])
    weights = f"{fusion_path(run, main_row, best['seed']).relative_to(args.out).as_posix()}.safetensors"
    own = [f"{k} {x}" for k, x in options.items() if x != getattr(CONFIGS[args.corpus], k, None)]
    title = args.features.name if args.features else corpus.name
    result = {"title": f"MAGTKD on {title}", "synthetic": args.corpus == "demo"}
    result |= {"corpus": corpus.name if corpus else "", "machine": report.machine(device), "weights": weights}
    result |= {"notes": [*lines, f"options: {', '.join(own)}"], "problems": problems, "file": file, "rows": rows}
    if args.ablation:

        def load(row: str, seed: int):
            return load_fusion(Path(f"{fusion_path(run, row, seed)}.safetensors"), variants.CLASSES)

        result["section"] = report.ablation(file, rows, load, args.out)
    path = args.out / "report.md"
    if path.is_file() and not path.is_symlink() and not path.read_bytes().startswith(b"# MAGTKD on "):
        print(f"{path} is not this program's: it is kept as {set_aside(path).name}")
    table = report.write_report(args.out, result)
    print(f"\n{result['title']}; test, seeds of stage 2: {args.seeds}\n\n{table}\n")
    print(f"The whole report: {args.out / 'report.md'}")


def write_joint(path: Path, file: FeatureFile) -> None:
    """features.safetensors: all encoders' features with labels and speakers, unless it has them already."""
    try:
        old = read_features(path)  # after an ablation it has a kind more
        same = file.made_from.items() <= old.made_from.items() and file.features.keys() <= old.features.keys()
        same = same and file_digest(old, file.features) == file_digest(file, file.features)
    except InputError:
        same = False  # none yet, or another program's
    if not same:
        put(path, lambda temporary: write_features(temporary, file))


def encoder_rows(encoded: dict[str, Encoded], corpus: Corpus, seed: int) -> dict[str, list[dict]]:
    """The encoders' own predictions on test as rows of Table 3, of one training each."""
    labels = [u.label for u in corpus.utterances("test")]  # the last rows
    predictions = {name: most_likely(x)[-len(labels) :] for name, x in encoded.items()}
    result = {"seed": seed, "epoch": None, "labels": labels}
    return {TABLE_NAMES[name]: [result | {"predictions": p}] for name, p in predictions.items()}


def stage1_notes(encoded: dict[str, Encoded], corpus: Corpus, out: Path) -> list[str]:
    """What a reader of the results should know of the encoders."""
    notes, dev = [], slice(len(corpus.utterances("train")), len(corpus.utterances("train", "dev")))
    for name, x in encoded.items():
        if len(set(most_likely(x)[dev])) == 1:
            notes.append(
                f"{name}: one class is predicted for all of dev; try a lower --stage1-lr "
                f"({name.removesuffix('_kd')}=..) or a longer --warmup"
            )
        weights, features = (out / f"{name}{end}" for end in (".safetensors", ".features.safetensors"))
        if (about(weights).get("code") or about(features).get("code")) != code_digest():
            notes.append(f"{name}: its encoder was trained by older code than today's; --fresh trains it again")
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    return notes


def check_media(corpus: Corpus, config: Config, root: Path) -> None:
    """Errors: InputError if a split has no file at all of a modality that is wanted."""
    for split in SPLITS:
        for m in config.modalities:
            if m != TEXT and not any(getattr(u, m) for u in corpus.utterances(split)):
                raise InputError(
                    f"{corpus.name} at {root}: no {m} file for any utterance of {split}. Complete the copy, "
                    "train on what there is with --modalities (for example --modalities text), or run stage 2 on "
                    f"your own features with --features. What was found: {'; '.join(corpus.notes)}"
                )


def choose_device(full_size: bool) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.path.exists("/proc/driver/nvidia/version"):
        why = f"compare its CUDA ({torch.version.cuda}) with what nvidia-smi prints"
        print(f"an NVIDIA GPU is here, and torch {torch.__version__} cannot use it: {why}", file=sys.stderr)
    if full_size:
        print("full-size encoders on a CPU may take days: --check estimates, --encoders tiny is small", file=sys.stderr)
    return "cpu"


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(
        prog="magtkd.py",
        usage="%(prog)s {iemocap,meld,csv,demo} [options]; --help lists them",
        description="Emotion recognition in conversation: both stages of MAGTKD, from raw files to a results table.",
        epilog="A run leaves its files in --out. The same command resumes where it was interrupted, and takes seconds "
        "if nothing is left to do.",
    )
    add = parser.add_argument
    add("corpus", choices=list(CONFIGS), help="demo: a small synthetic corpus, written on the spot")
    add("--root", type=Path, help=f"the corpus' folder (default: {' or '.join(ROOTS.values())}); the file of csv")
    add("--out", type=Path, help="the run's folder (default: runs/<corpus>, or by the name of the feature file or csv)")
    add("--features", type=Path, help="stage 2 only, on this feature file (docs/corpora.md)")
    add("--media", type=Path, help="folder of the decoded audio and video, which runs can share (default: in --out)")
    add("--seeds", type=number(int, 1, 100), default=3, help="how often stage 2 is repeated (default: 3)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="the first seed (default: 0)")
    add("--ablation", action="store_true", help="all rows of Table 3 (five encoders, four sets), and Context")
    add("--preset", choices=["paper", "released"], default="paper", help="released: stage 2 as in the authors' code")
    add("--encoders", choices=["full", "tiny"], help="tiny: small, random weights (default for demo)")
    add("--device", type=device_name, help="cpu, cuda or cuda:N (default: cuda if there)")
    add("--workers", type=number(int, 1, 256), default=os.cpu_count() or 1, help="threads that decode media")
    add("--check", action="store_true", help="is --root complete, and what will a run need? Trains and writes nothing")
    add("--fresh", action="store_true", help="train everything again; old files are kept under a second name")
    for f in dataclasses.fields(Config):
        how = {"type": converter(f), "choices": f.metadata["choices"]}
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        others = {c: getattr(x, f.name) for c, x in CONFIGS.items() if getattr(x, f.name) != getattr(Config(), f.name)}
        text = f"{f.metadata['help']} (default: {getattr(Config(), f.name)}{others or ''})"
        add(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **how)
    args = parser.parse_args(argv)

    base = CONFIGS[args.corpus]
    args.encoders = args.encoders or ("tiny" if args.corpus == "demo" else "full")
    if args.encoders == "tiny":
        base = dataclasses.replace(base, **{name: getattr(CONFIGS["demo"], name) for name in SMALL})
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    given = {name: {**getattr(base, name), **x} if isinstance(x, dict) else x for name, x in given.items()}
    config = dataclasses.replace(base, **given)
    if config.width % FusionConfig.heads:
        parser.error(f"--width must be a multiple of {FusionConfig.heads}, the number of attention heads")
    if args.encoders == "tiny" and any(name.endswith("_model") for name in given):
        parser.error("--encoders tiny brings its own encoders; to choose one, add --encoders full")
    if args.corpus == "demo" and args.root:
        parser.error("demo writes its own corpus; --root belongs to iemocap, meld and csv")
    if args.corpus == "csv" and not (args.root or args.features):
        parser.error("csv needs --root FILE.csv, one row per utterance (docs/corpora.md has the columns)")
    if args.check and (args.corpus == "demo" or args.features):
        parser.error("--check reads a corpus on disk, without --features")
    named = args.features or (args.root if args.corpus == "csv" else None)
    args.root = args.root or (Path(ROOTS[args.corpus]) if args.corpus in ROOTS else None)
    args.out = args.out or Path("runs") / (named.stem if named else args.corpus)
    return args, config


def converter(f: dataclasses.Field) -> Callable[[str], Any]:
    """For argparse: text to a value of a field of Config."""
    if f.type is str:
        return str
    if f.type == tuple[str, ...]:
        return modalities
    kind = f.type.__args__[1] if isinstance(f.type, types.GenericAlias) else f.type
    convert = number(kind, f.metadata["low"], f.metadata["high"])
    if kind is f.type:
        return convert

    def per_modality(text: str) -> dict[str, Any]:
        if "=" not in text:
            return each(convert(text))
        pairs = dict(pair.partition("=")[::2] for pair in text.split(","))
        if not pairs.keys() <= set(MODALITIES):
            raise argparse.ArgumentTypeError(f"wants a number, or text=X,audio=X,video=X, not {text[:60]!r}")
        return {m: convert(x) for m, x in pairs.items()}

    return per_modality


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """For argparse: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"wants {what} from {low:,} to {high:,}, not {text[:40]!r}")
        return value

    return parse


def modalities(text: str) -> tuple[str, ...]:
    wanted = tuple(m for m in MODALITIES if m in text.split(","))
    if not set(text.split(",")) <= set(MODALITIES) or TEXT not in wanted:
        raise argparse.ArgumentTypeError(f"wants text, or text with audio or video or both, not {text[:60]!r}")
    return wanted


def device_name(name: str) -> str:
    """For argparse: a device that torch has here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        reason = (str(e).splitlines() or [""])[0]
        raise argparse.ArgumentTypeError(f"{name!r} is no device that torch has here ({reason}); use cpu") from e
    return name


def read_config(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The options of a run's config.json, as Config and whole. Errors: InputError if it is missing or damaged."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no run's folder: it has no config.json. `bash run.sh demo` makes runs/demo")
    options, given = read_json(path), {}
    for name, default in dataclasses.asdict(Config()).items():
        x = options.get(name)
        x = tuple(x) if isinstance(x, list) else float(x) if type(x) is int and isinstance(default, float) else x
        if type(x) is not type(default):
            raise InputError(f"{path}: {name} is missing or damaged; the run's own command writes it anew")
        given[name] = x
    return Config(**given), options


# What a disk refuses, or stands in the way on it: a file where a folder belongs.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG}
DISK |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EPIPE}


def run_command(program: str, work: Callable[[], None], stopped: str = "stopped") -> int:
    """Runs a command of this project. Returns its exit code: 0; 2 with one line for the user's error; 130 for Ctrl-C.

    stopped: what to say then. Any other error is a bug: its traceback is shown, and the exit code is 1.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal of few letters
    try:
        work()
        print(end="", flush=True)
        return 0
    except InputError as e:
        return complain(f"{program}: {e}", 2)
    except KeyboardInterrupt:
        return complain(f"\n{stopped}", 130)
    except torch.OutOfMemoryError as e:
        reason = str(e).splitlines()[0]
        return complain(f"{program}: the GPU's memory is full ({reason}); try --gradient-checkpointing", 2)
    except OSError as e:
        if e.errno not in DISK:
            raise
        if e.filename is None:  # stdout: at its end Python would fail a second time, on what is left in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if e.errno == errno.EPIPE:  # as in `.. | head`: nobody reads on
            return 141
        return complain(f"{program}: {e.filename or 'output'}: {e.strerror}. What is complete is kept", 2)


def complain(message: str, code: int) -> int:
    """Prints one line, and indented notes, to stderr. Control characters in it are shown, not sent to the terminal."""
    shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in message)
    print(shown, file=sys.stderr, flush=True)
    return code


def main(argv: list[str] | None = None) -> int:
    args, config = parse(argv)
    return run_command(
        "magtkd", lambda: run_all(args, config), f"stopped; the same command resumes{', without --fresh' * args.fresh}"
    )


if __name__ == "__main__":
    import magtkd  # under its own name, since extras/ imports it too: there must be one copy of every class

    sys.exit(magtkd.main())
