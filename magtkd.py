"""MAGTKD: emotion recognition in conversation from text, audio and video (IJCAI 2025).

    python magtkd.py demo                               # everything, on a small made-up corpus
    python magtkd.py iemocap --root IEMOCAP_full_release
    python magtkd.py iemocap --features my.safetensors  # stage 2 alone, on features of your own

The whole story, in the order of reading: the hyperparameters (Table 1); one training loop; stage 1, which fine-tunes an
encoder per modality, text as the teacher of audio and video (Eq. 1-14), and leaves one feature (a vector) per
utterance; stage 2, which fuses the features of a conversation (Eq. 15-25); the command line. Each step leaves a file in
runs/<name>/, and a second start continues after the last one that is whole.

Not here: the losses (losses.py), the fusion models (fusion.py), the encoders (encoders.py), the corpora and the feature
file (data.py), and what people use around the method: reports, experiments, prediction, the demo's corpus (extras/).
"""

import dataclasses
import json
import random
import resource
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports is quiet; guard.py goes on from there

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import losses

from data import MODALITIES, SPLITS, Batch, Conversations, Corpus, Encoded, FeatureFile, InputError  # isort: skip
from data import load_state, read_encoded, replace_file, save_state, to_feature_file, write_encoded, write_features  # isort: skip
from encoders import ENCODERS, Encoder, MediaStore, video_shape
from fusion import MAGT, TEXT, Concat, FusionConfig, FusionOutput

# Table 1


@dataclass(frozen=True)
class Config:
    """Table 1 of the paper, and what it leaves open. A learning rate is the peak of a warm-up and a linear decay."""

    width: int = 768  # d of the features, D of the fusion
    stage1_lr: float = 1e-5
    stage1_batch: int = 4
    stage1_epochs: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(MODALITIES, 10))
    stage2_lr: float = 1e-4
    stage2_batch: int = 16
    stage2_epochs: int = 30
    alpha: float = 0.7  # Eq. 25
    beta: float = 0.8
    # Not in Table 1
    text_model: str = "roberta-large"
    audio_model: str = "facebook/data2vec-audio-base-960h"
    video_model: str = "facebook/timesformer-base-finetuned-k400"
    modalities: tuple[str, ...] = MODALITIES
    max_tokens: int = 512  # of a prompt
    heads: int = 8
    dropout: float = 0.5
    clip: float = 1.0  # largest norm of the gradient
    precision: str = "auto"  # of the models' forward passes: a key of PRECISIONS
    class_weights: bool = False  # both stages: the cross entropy counts rare classes for more
    causal: bool = False  # stage 2: an utterance reads the past alone
    preset: str = "paper"  # released: stage 2 as the authors' code has it (extras/released.py)
    gradient_checkpointing: bool = False  # stage 1: less memory, more time
    log_steps: bool = False  # a line per step in log.jsonl, not only per epoch


TEN = dict.fromkeys(MODALITIES, 10)
CONFIGS = {
    # Table 1 has stage2_lr = 1e-5 for IEMOCAP. In 210 steps a model with random weights hardly moves (differences, 19).
    "iemocap": Config(768, 1e-5, 4, TEN, stage2_lr=1e-4, stage2_batch=16, stage2_epochs=30, alpha=0.7, beta=0.8),
    "meld": Config(768, 1e-5, 4, TEN, stage2_lr=1e-4, stage2_batch=16, stage2_epochs=30, alpha=0.01, beta=0.09),
    # Small encoders with random weights learn faster and for longer than pretrained ones are tuned.
    "demo": Config(64, 1.5e-3, 16, {"text": 4, "audio": 6, "video": 12}, stage2_lr=1e-3),
}
PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TABLE_NAMES = {"text": "T", "audio": "A", "video": "V", "audio_kd": "A_KD", "video_kd": "V_KD"}  # Table 3's

# The training loop of both stages


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    lr: float  # the highest, after the warm-up
    batch: int  # examples per step
    epochs: int
    warmup: float = 0.1  # share of all steps
    clip: float = 1.0  # largest norm of the gradient
    precision: str = "auto"
    log_steps: bool = False


def train(
    model: nn.Module,
    lengths: dict[str, int],
    loss_terms: Callable[[list[str]], dict[str, Tensor]],
    evaluate: Callable[[], dict],
    recipe: Recipe,
    path: Path,
    seed: int,
) -> list[dict]:
    """Trains a model and leaves it at its best epoch. Returns per epoch {"train": mean loss terms, **evaluate()}.

    lengths: each training example's name and length; batches hold examples of similar length.
    loss_terms: of a batch of examples, by their names: {"loss": scalar, more scalars to log}.
    evaluate: {"dev_f1": what the best epoch is chosen by, ..}, after each epoch.
    path: the state after an epoch is kept in `path`.resume.pt, from where an interrupted training continues. The caller
        writes the final file, then removes it. A line per epoch goes to log.jsonl beside it.
    Errors: InputError if the loss is no longer a number, or for a `path`.resume.pt that is not this model's.
    """
    device, resume = next(model.parameters()).device, Path(f"{path}.resume.pt")
    steps = recipe.epochs * -(-len(lengths) // recipe.batch)
    optimizer, schedule = make_optimizer(model, recipe.lr, steps, recipe.warmup)
    autocast, scaler = mixed_precision(device, recipe.precision)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    history, best = load_state(resume, parts) or ([], {"dev_f1": -1.0})
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
            best = {"dev_f1": found["dev_f1"], "model": weights}
        for step, term in enumerate(terms if recipe.log_steps else []):
            log(path, device, epoch, step=step, **{name: float(x) for name, x in term.items()})
        log(path, device, epoch, lr=schedule.get_last_lr()[0], seconds=seconds, dev_f1=found["dev_f1"], **mean)
        if time.monotonic() - printed > 5:  # a line every 5 seconds at the most: epochs of stage 2 can be short
            printed, now = time.monotonic(), f"{path.name}: epoch {epoch + 1} of {recipe.epochs}"
            print(f"{now}, loss {mean['loss']:.4f}, dev W-F1 {found['dev_f1']:.2f}", flush=True)
        if time.monotonic() - saved > 10 * cost:  # saving may take a tenth of the time
            begun = time.monotonic()
            save_state(resume, parts, history, best)
            saved = time.monotonic()
            cost = saved - begun
    model.load_state_dict(best["model"])
    return history


def optimizer_step(loss: Tensor, model: nn.Module, optimizer, schedule, scaler, clip: float) -> None:
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # before clipping: the norm that is clipped is the true one
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()


def make_optimizer(model: nn.Module, lr: float, steps: int, warmup: float):
    """AdamW, and a schedule that rises over the first `warmup` of the steps and then falls to zero, both linearly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    rise = max(1, round(warmup * steps))
    return optimizer, LambdaLR(optimizer, lambda s: min((s + 1) / rise, max(0.0, (steps - s) / max(1, steps - rise))))


def mixed_precision(device: torch.device, precision: str) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """Autocast, and a loss scaler for float16. auto: bfloat16 on CUDA, float16 where it has none; float32 on a CPU."""
    dtype = PRECISIONS[precision]
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
    """Stops a run whose loss is no longer a number. Called once an epoch, so that no step waits for a GPU."""
    bad = (~torch.stack(step_losses).isfinite()).nonzero()
    if len(bad):
        raise InputError(
            f"the loss is no longer a number, first in step {int(bad[0])} of this epoch, on "
            f"{', '.join(batches[int(bad[0])])}. Look at these utterances, or lower the learning rate."
        )


def mean_terms(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name: float(torch.stack([term[name] for term in terms]).float().mean()) for name in terms[0]}


def seed_everything(*parts: int | str) -> None:
    """Seeds Python, NumPy (SpecAugment draws from it) and torch.

    Called at the start of every epoch with the run's seed and the epoch, it makes the random state a function of these:
    a resumed run draws what an undisturbed one would have drawn, and two models of a seed get the same batches.
    """
    seed = zlib.crc32(json.dumps(parts).encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def log(path: Path, device: torch.device, epoch: int, **entry) -> None:
    """Appends a line to log.jsonl beside `path`: what an epoch was like, with the memory it took, in bytes."""
    if device.type == "cuda":
        entry["gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    entry["process_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the largest so far
    with open(path.parent / "log.jsonl", "a") as f:
        f.write(json.dumps({"model": path.name, "epoch": epoch + 1, **entry}) + "\n")


def scores(labels: list[int], predictions: list[int]) -> dict[str, float]:
    """Accuracy, weighted and macro F1, in percent. A class that neither occurs nor is predicted counts nowhere."""
    return {
        "accuracy": 100 * accuracy_score(labels, predictions),
        "weighted_f1": 100 * f1_score(labels, predictions, average="weighted", zero_division=0),
        "macro_f1": 100 * f1_score(labels, predictions, average="macro", zero_division=0),
    }


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Inverse frequency: N / (C n_c) for a class with n_c of the N labels, 1 each if all are as frequent. float32 [C].

    labels: [N] int64, of train. A class without a label in train counts as one that has a single label.
    """
    return len(labels) / (num_classes * torch.bincount(labels, minlength=num_classes).clamp(min=1))


# Stage 1: an encoder per modality


class Examples(NamedTuple):
    """What an encoder takes, by utterance id."""

    get: Callable[[str], Any]
    lengths: dict[str, int]  # tokens, samples or frames; an utterance without sound or picture has no entry


def run_stage1(
    config: Config, names: list[str], corpus: Corpus, store: MediaStore | None, out: Path, seed: int,
    device: torch.device,
) -> dict[str, Encoded]:  # fmt: skip
    """Trains the encoders that have not left their features in `out` yet. Returns the answers of all, by name.

    names: "text" first, then any of audio, video, audio_kd, video_kd. store: None if text is all.
    """
    encoded: dict[str, Encoded] = {}
    ids = [u.id for u in corpus.utterances()]
    for name in names:
        path = out / f"{name}.features.safetensors"
        if not path.exists():
            seed_everything(seed, name)
            encoder = make_encoder(name, config, len(corpus.label_names)).to(device)
            examples = make_examples(encoder, name, corpus, store)
            teacher = encoded["text"] if name.endswith("_kd") else None
            train_encoder(name, encoder, examples, teacher, config, corpus, out, seed)
            answers = encode(encoder, examples, ids, config.precision)
            write_encoded(path, answers, ids)
        encoded[name] = read_encoded(path, ids)
    return encoded


def make_encoder(name: str, config: Config, num_classes: int) -> Encoder:
    modality = name.removesuffix("_kd")
    more = {"max_tokens": config.max_tokens} if modality == "text" else {}
    encoder = ENCODERS[modality](getattr(config, f"{modality}_model"), num_classes, config.width, **more)
    if config.gradient_checkpointing:
        encoder.backbone.gradient_checkpointing_enable()
    return encoder


def make_examples(encoder: Encoder, name: str, corpus: Corpus, store: MediaStore | None) -> Examples:
    if name == "text":
        conversations = [c for split in SPLITS for c in corpus.splits[split]]
        prompts = {u.id: p for c in conversations for u, p in zip(c.utterances, encoder.prompts(c))}
        return Examples(prompts.__getitem__, {i: len(p) for i, p in prompts.items()})
    modality = name.removesuffix("_kd")
    lengths = {u.id: store.length(u.id, modality) for u in corpus.utterances()}
    return Examples(lambda i: store.get(i, modality), {i: n for i, n in lengths.items() if n})


def train_encoder(
    name: str,
    encoder: Encoder,
    examples: Examples,
    teacher: Encoded | None,
    config: Config,
    corpus: Corpus,
    out: Path,
    seed: int,
) -> None:
    """Fine-tunes one encoder, in place, to the epoch with the best weighted F1 on dev. Leaves out/<name>.safetensors.

    teacher: the text encoder's answers, for Eq. 14; None for cross entropy alone. They were computed once, in eval
    mode: a frozen teacher gives the same answers in every epoch.
    """
    label = {u.id: u.label for u in corpus.utterances()}
    row = {u.id: i for i, u in enumerate(corpus.utterances())}  # of the teacher's answers
    train_ids, dev_ids = ([u.id for u in corpus.utterances(split)] for split in ("train", "dev"))
    lengths = {i: examples.lengths[i] for i in train_ids if i in examples.lengths}
    if not lengths:
        raise InputError(f"no utterance of train has what the {name} encoder needs; look at the sound and video files")
    weight = None
    if config.class_weights:
        labels = torch.tensor([label[i] for i in lengths])
        weight = class_weights(labels, len(corpus.label_names)).to(encoder.device)

    def loss_terms(ids: list[str]) -> dict[str, Tensor]:
        features, logits = encoder([examples.get(i) for i in ids])
        l_ce = losses.cross_entropy(logits, torch.tensor([label[i] for i in ids], device=logits.device), weight)
        if teacher is None:
            return {"loss": l_ce}  # Eq. 13
        rows = [row[i] for i in ids]
        t_features, t_logits = (x[rows].to(logits.device) for x in teacher)
        l_s = losses.soft_label_loss(logits, t_logits)  # Eq. 9
        l_f = losses.feature_loss(features, t_features)  # Eq. 12
        return {"loss": l_ce + l_s + l_f, "l_ce": l_ce, "l_s": l_s, "l_f": l_f}  # Eq. 14

    def evaluate() -> dict:
        guesses = most_likely(encode(encoder, examples, dev_ids, config.precision))
        return {"dev_f1": scores([label[i] for i in dev_ids], guesses)["weighted_f1"]}

    epochs = config.stage1_epochs[name.removesuffix("_kd")]
    recipe = Recipe(config.stage1_lr, config.stage1_batch, epochs, 0.1, config.clip, config.precision, config.log_steps)
    train(encoder, lengths, loss_terms, evaluate, recipe, out / name, seed)
    replace_file(out / f"{name}.safetensors", lambda part: save_model(encoder, part))
    (out / f"{name}.resume.pt").unlink(missing_ok=True)


@torch.inference_mode()
def encode(encoder: Encoder, examples: Examples, ids: list[str], precision: str = "auto", batch: int = 32) -> Encoded:
    """The answers for the utterances `ids` in eval mode, on the CPU."""
    autocast, _ = mixed_precision(encoder.device, precision)
    encoder.eval()
    d, C = encoder.classifier.in_features, encoder.classifier.out_features
    answers = Encoded(torch.full((len(ids), d), torch.nan), torch.full((len(ids), C), torch.nan))
    there = sorted((r for r, i in enumerate(ids) if i in examples.lengths), key=lambda r: examples.lengths[ids[r]])
    starts = range(0, len(there), batch)
    for start in tqdm(starts, "encoding", unit=" batches", disable=None, leave=False):
        rows = there[start : start + batch]
        with autocast:
            features, logits = encoder([examples.get(ids[r]) for r in rows])
        answers.features[rows], answers.logits[rows] = features.float().cpu(), logits.float().cpu()
    return answers


def most_likely(encoded: Encoded) -> list[int]:
    """The most likely class of each utterance; class 0 where sound or picture is missing: a guess, scored as one."""
    return encoded.logits.nan_to_num().argmax(dim=1).tolist()


# Stage 2: the fusion


def fusion_losses(
    out: FusionOutput, batch: Batch, config: Config, weight: Tensor | None = None, detach_teacher: bool = True
) -> dict[str, Tensor]:
    """Eq. 25 and its parts on a batch of conversations, scalars: "loss", "l_ce", and per modality "kd_audio" (Eq. 24),
    "l_s_audio" (Eq. 9), "l_f_audio" (Eq. 12); 0 for one that the model or the batch does not have.

    The teacher is the text branch, detached: with gradient flowing into it, it gives in to its students.
    weight: [C], of the classes in the cross entropy.
    """
    teacher = [x[TEXT].detach() if detach_teacher else x[TEXT] for x in (out.logits, out.hidden)]
    l_ce = losses.cross_entropy(out.logits[TEXT], batch.labels, weight)
    terms = {"l_ce": l_ce}
    for m in ("audio", "video"):
        rows = batch.rows.get(m, slice(None))
        if m not in out.logits or (m in batch.rows and not len(rows)):
            l_s = l_f = l_ce.new_zeros(())
        else:
            l_s = losses.soft_label_loss(out.logits[m][rows], teacher[0][rows])
            l_f = losses.feature_loss(out.hidden[m][rows], teacher[1][rows])
        terms |= {f"kd_{m}": l_f + l_s, f"l_s_{m}": l_s, f"l_f_{m}": l_f}  # Eq. 24
    loss = losses.stage2_loss(l_ce, terms["kd_audio"], terms["kd_video"], config.alpha, config.beta)  # Eq. 25
    return {"loss": loss, **terms}


class Method(NamedTuple):
    """What stage 2 trains. extras/ has others: a model of our own, and the authors' variants."""

    models: dict[str, Callable[[FusionConfig], nn.Module]]  # by the tables' names
    losses: Callable[..., dict[str, Tensor]] = fusion_losses
    warmup: float = 0.1
    input_norm: bool = True  # FusionConfig


PAPER = Method({"Concat": Concat, "MAGT": MAGT})


def train_fusion(
    name: str, data: Conversations, num_classes: int, config: Config, path: Path, seed: int, method: Method = PAPER
) -> dict:
    """Trains one fusion model (a key of method.models) with one seed. Leaves path.json and path.safetensors.

    Returns the content of the JSON file, which is read if it is there: {"seed", "epoch", "dev_f1", "labels",
    "predictions" (on test, of the epoch with the best weighted F1 on dev), "test_selected" (scores of the best epoch on
    test), "history" (per epoch, per split, the loss terms)}.
    """
    result_file, weights_file = Path(f"{path}.json"), Path(f"{path}.safetensors")
    if result_file.exists():
        return json.loads(result_file.read_text())
    seed_everything(seed, name)
    widths = {m: x.shape[1] for m, x in data.features.items()}
    sizes = (widths, num_classes, data.num_speakers, config.width, config.heads, config.dropout)
    model = method.models[name](FusionConfig(*sizes, method.input_norm, config.causal)).to(data.device)
    weight = None
    if config.class_weights:
        train_labels = data.batch(data.splits["train"]).labels.cpu()
        weight = class_weights(train_labels, num_classes).to(data.device)

    def loss_terms(names: list[str]) -> dict[str, Tensor]:
        batch = data.batch(names)
        return method.losses(model(*batch.inputs), batch, config, weight)

    def evaluate() -> dict:
        dev, test = (evaluate_fusion(model, data, split, config, method, weight) for split in ("dev", "test"))
        both = {"dev": dev["terms"], "test": test["terms"]}
        return {"dev_f1": dev["scores"]["weighted_f1"], **both, "test_scores": test["scores"]}

    lengths = dict.fromkeys(data.splits["train"], 1)  # rows are not padded, so batches are at random
    how = (config.clip, config.precision, config.log_steps)
    recipe = Recipe(config.stage2_lr, config.stage2_batch, config.stage2_epochs, method.warmup, *how)
    history = train(model, lengths, loss_terms, evaluate, recipe, path, seed)

    best = max(range(len(history)), key=lambda epoch: history[epoch]["dev_f1"])
    test = evaluate_fusion(model, data, "test", config, method, weight)
    result = {"seed": seed, "epoch": best + 1, "dev_f1": history[best]["dev_f1"]}
    result |= {"labels": test["labels"], "predictions": test["predictions"]}
    result["test_selected"] = max((h.pop("test_scores") for h in history), key=lambda s: s["weighted_f1"])
    result["history"] = history
    about = {"fusion": name, "config": json.dumps(dataclasses.asdict(model.config)), "kinds": json.dumps(data.kinds)}
    replace_file(weights_file, lambda part: save_model(model, part, about))
    replace_file(result_file, lambda part: part.write_text(json.dumps(result)))
    Path(f"{path}.resume.pt").unlink(missing_ok=True)
    return result


@torch.inference_mode()
def evaluate_fusion(
    model: nn.Module, data: Conversations, split: str, config: Config, method: Method, weight: Tensor | None
) -> dict:
    """{"terms" (of the loss, mean over batches), "labels", "predictions", "scores"} of a split, in eval mode."""
    autocast, _ = mixed_precision(data.device, config.precision)
    model.eval()
    terms, labels, predictions, names = [], [], [], data.splits[split]
    for start in range(0, len(names), config.stage2_batch):
        batch = data.batch(names[start : start + config.stage2_batch])
        with autocast:
            out = model(*batch.inputs)
            terms.append(method.losses(out, batch, config, weight))
        labels.append(batch.labels)
        predictions.append(out.logits[TEXT].argmax(dim=-1))  # Eq. 23
    answers = {"labels": torch.cat(labels).tolist(), "predictions": torch.cat(predictions).tolist()}
    return {"terms": mean_terms(terms), **answers, "scores": scores(**answers)}


def run_stage2(
    config: Config,
    file: FeatureFile,
    sets: list[tuple[str, ...]],
    seeds: range,
    out: Path,
    device: torch.device,
    method: Method = PAPER,
) -> dict[str, list[dict]]:
    """Each model of the method over each set of features, with each seed. The main row's best model is left in
    fusion.safetensors.

    sets: tuples of kinds of features, text first. Returns rows of Table 3: name -> a result of train_fusion per seed.
    """
    rows: dict[str, list[dict]] = {}
    (out / "fusion").mkdir(exist_ok=True)
    for name in method.models:
        for kinds in sets:
            data, row = Conversations(file, kinds, device), row_name(name, kinds)
            C = len(file.label_names)
            paths = {seed: out / "fusion" / f"{row.replace(' ', '-')}-seed{seed}" for seed in seeds}
            rows[row] = [train_fusion(name, data, C, config, path, seed, method) for seed, path in paths.items()]
            f1 = [scores(r["labels"], r["predictions"])["weighted_f1"] for r in rows[row]]
            spread = np.std(f1, ddof=1) if len(f1) > 1 else 0.0
            print(f"{row}: test W-F1 {np.mean(f1):.2f} ± {spread:.2f}, {len(f1)} seeds", flush=True)
    row = main_row(list(rows))
    best = max(rows[row], key=lambda r: r["dev_f1"])
    weights = out / "fusion" / f"{row.replace(' ', '-')}-seed{best['seed']}.safetensors"
    replace_file(out / "fusion.safetensors", lambda part: shutil.copyfile(weights, part))
    return rows


def row_name(fusion: str, kinds: tuple[str, ...]) -> str:
    """As in Table 3: "MAGT T+A_KD+V"."""
    return f"{fusion} {'+'.join(TABLE_NAMES[k] for k in kinds)}"


def main_row(rows: list[str]) -> str:
    """The row that is shown in detail and whose model is kept: the paper's best, or else the last."""
    return "MAGT T+A_KD+V" if "MAGT T+A_KD+V" in rows else rows[-1]


def feature_sets(kinds: list[str], all_of_table3: bool) -> list[tuple[str, ...]]:
    """Which features are fused: T + A_KD + V, the paper's best row, or what is nearest to it; or all of Table 3."""
    audio, video = ([k for k in order if k in kinds] for order in (("audio", "audio_kd"), ("video_kd", "video")))
    if not all_of_table3:
        return [("text", *audio[-1:], *video[-1:])]
    return [("text", *a, *v) for a in ([(k,) for k in audio] or [()]) for v in ([(k,) for k in video[::-1]] or [()])]


def load_fusion(path: Path, build: Callable[[str, dict], nn.Module] | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """A trained fusion model, in eval mode on the CPU, and the kinds of features that it fuses.

    build: makes the model from its name and the fields of its configuration. Default: the paper's models.
    Errors: InputError for a file that `train_fusion` did not leave.
    """
    build = build or (lambda name, fields: PAPER.models[name](FusionConfig(**fields)))
    try:
        with safe_open(path, framework="pt") as f:
            about = f.metadata() or {}
        known = {field.name for field in dataclasses.fields(FusionConfig)}
        fields = json.loads(about["config"])  # an earlier version wrote down the authors' variants, all off: left out
        model = build(about["fusion"], {name: x for name, x in fields.items() if x or name in known})
        load_model(model, path)
        return model.eval(), tuple(json.loads(about["kinds"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"{path}: not a fusion model of this program ({type(e).__name__}); train it again") from e


# Both stages, and the command line


def run_both(
    config: Config, names: list[str], corpus: Corpus, out: Path, seeds: range, device: torch.device, workers: int,
    all_of_table3: bool = False, method: Method = PAPER,
) -> tuple[FeatureFile, dict[str, list[dict]], list[str]]:  # fmt: skip
    """From a corpus to the rows of Table 3.

    names: of the encoders, "text" first. Returns the features, name of a row -> results (of one training of an encoder,
    of a fusion per seed), and a line per broken media file. All of it is in `out`, too.
    """
    store, wanted = None, tuple(m for m in ("audio", "video") if m in config.modalities)
    if wanted:
        shape = video_shape(config.video_model) if "video" in wanted else ()
        store = MediaStore(out / "media", wanted, *shape)
        if not all((out / f"{name}.features.safetensors").exists() for name in names):
            store.fill(corpus.utterances(), workers)
    encoded = run_stage1(config, names, corpus, store, out, seeds[0], device)
    file = to_feature_file(encoded, corpus)
    write_features(out / "features.safetensors", file)

    rows, test = {}, (file.split == SPLITS.index("test")).nonzero().flatten()
    for name, answers in encoded.items():
        result = {"seed": seeds[0], "epoch": None, "labels": file.label[test].tolist()}
        rows[TABLE_NAMES[name]] = [result | {"predictions": [most_likely(answers)[i] for i in test]}]
    rows |= run_stage2(config, file, feature_sets(names, all_of_table3), seeds, out, device, method)
    return file, rows, store.problems() if store else []


def main(argv: list[str] | None = None) -> int:
    """The command line, whose options and files are people's convenience: the only part that needs extras/."""
    from extras import cli

    return cli.main(argv)


if __name__ == "__main__":
    import magtkd  # under its own name, since extras/ imports it too: there must be one copy of every class

    sys.exit(magtkd.main())
