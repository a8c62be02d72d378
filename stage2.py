"""Stage 2: the vectors of a conversation's utterances are fused, by MAGT, Concat or Context (Eq. 15-25).

All features live on the device and batches are formed by indexing, so no loader is needed. The epoch is chosen on dev.

Not here: the models (fusion.py), the losses (losses.py).
"""

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import losses
from data import InputError
from features import Features
from fusion import MAGT, TEXT, Concat, Context, FusionConfig, FusionOutput
from report import main_row, mean_std, scores
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

FUSIONS = {"Concat": Concat, "Context": Context, "MAGT": MAGT}  # the tables' order; the paper's own system last
PAPERS = ("Concat", "MAGT")  # those of Table 3
ROWS = {"text": "T", "audio": "A", "video": "V", "audio_kd": "A_KD", "video_kd": "V_KD"}  # Table 3's names
SAVE_EVERY = 20.0  # seconds: an epoch can be shorter than the writing of its state (0.7 GB at D = 768)


class Batch(NamedTuple):
    """Conversations padded to the longest of them: what a fusion model takes, and what its losses need besides."""

    inputs: tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor], Tensor]  # as MAGT.forward has them, in order
    labels: Tensor  # [B, U]
    places: dict[str, Tensor]  # modality -> [n_m] int64, where in [B * U] it is there; text: every utterance


class Conversations:
    """A feature file on the device, handed out as padded batches of conversations by indexing."""

    def __init__(self, features: Features, kinds: tuple[str, ...], device: torch.device):
        self.kinds = kinds
        modality = {kind: kind.removesuffix("_kd") for kind in kinds}
        self.vectors = {modality[k]: features.vectors[k].to(device) for k in kinds}
        self.present = {modality[k]: features.present[k] for k in kinds}
        self.label = features.label.to(device)
        self.class_weights = class_weights(features.label[features.split == 0], len(features.label_names)).to(device)
        seen = features.speaker[features.split == 0].unique()
        self.num_speakers = int(seen.max()) + 1
        # A speaker never seen in training has an embedding that was never trained: -1, which adds nothing.
        self.speaker = torch.where(torch.isin(features.speaker, seen), features.speaker, -1).to(device)
        _, self.lengths = features.conversation.unique_consecutive(return_counts=True)
        starts = self.lengths.cumsum(0) - self.lengths
        place = torch.arange(int(self.lengths.max()))
        # On the CPU, like `present`: a batch's sizes are known there, and no step waits for the GPU to tell them.
        self.rows = torch.where(place < self.lengths[:, None], starts[:, None] + place, -1)  # [conversations, longest]
        self.names = [features.conversation_names[i] for i in features.conversation[starts].tolist()]
        self.of_split = [(features.split[starts] == s).nonzero().flatten().tolist() for s in range(3)]

    def batch(self, conversations: list[int]) -> Batch:
        """These conversations, by their number in the file."""
        rows = self.rows[conversations, : int(self.lengths[conversations].max())]
        mask = rows >= 0
        present = {m: x[rows] & mask for m, x in self.present.items()}
        places = {m: x.flatten().nonzero().squeeze(1) for m, x in {**present, TEXT: mask}.items()}

        device = self.label.device
        rows, mask = rows.clamp(min=0).to(device, non_blocking=True), mask.to(device, non_blocking=True)
        present, places = ({m: x.to(device, non_blocking=True) for m, x in part.items()} for part in (present, places))
        features = {m: x[rows] for m, x in self.vectors.items()}
        speakers = self.speaker[rows].where(mask, -1)
        return Batch((features, speakers, mask, present, places[TEXT]), self.label[rows], places)


def fusion_losses(out: FusionOutput, batch: Batch, config: Config, weight: Tensor | None = None) -> dict[str, Tensor]:
    """Eq. 25 and its parts on a batch of conversations: {"total", "kd_audio", "kd_video"}, scalars.

    weight: [C], of the classes in every cross entropy.
    """

    def where_there(m: str, *padded: Tensor) -> list[Tensor]:
        """[B, U, ..] -> [n_m, ..], the utterances that have modality m."""
        return [x.flatten(0, 1).index_select(0, batch.places[m]) for x in padded]

    l_ce = losses.cross_entropy(*where_there(TEXT, out.logits[TEXT], batch.labels), weight)
    kd = {}
    for m in ("audio", "video"):
        kd[f"kd_{m}"] = l_ce.new_zeros(())
        if m not in out.logits or not len(batch.places[m]):
            continue  # Concat has no branches; a corpus or a batch may lack a modality
        logits, hidden, labels = where_there(m, out.logits[m], out.hidden[m], batch.labels)
        teacher_logits, teacher_hidden = where_there(m, out.logits[TEXT], out.hidden[TEXT])
        if config.preset.detach_teacher:
            teacher_logits, teacher_hidden = teacher_logits.detach(), teacher_hidden.detach()
        loss = losses.soft_label_loss(logits, teacher_logits)
        if config.preset.feature_loss:
            loss = loss + losses.feature_loss(hidden, teacher_hidden)  # Eq. 24
        if config.preset.branch_cross_entropy:
            loss = loss + losses.cross_entropy(logits, labels, weight)
        kd[f"kd_{m}"] = loss
    return {"total": losses.stage2_loss(l_ce, **kd, alpha=config.alpha, beta=config.beta), **kd}


def train_fusion(
    name: str, data: Conversations, num_classes: int, config: Config, place: Path, seed: int, device: torch.device
) -> dict:
    """Trains one fusion model (a key of FUSIONS) with one seed, and leaves place.json and place.safetensors.

    Returns the content of the JSON file, which is read if it is there: {"seed", "epoch", "dev_f1", "labels",
    "predictions" (on test, of the epoch with the best weighted F1 on dev), "test_selected" (scores of the best epoch on
    test), "history" (per epoch, per split: {"total", "kd_audio", "kd_video"})}.
    """
    path, resume = place.with_suffix(".json"), place.with_suffix(".resume.pt")
    if path.exists():
        return json.loads(path.read_text())
    checkpoint.seed_everything(seed, name)
    widths = {m: x.shape[1] for m, x in data.vectors.items()}
    fusion_config = FusionConfig(
        widths,
        num_classes,
        data.num_speakers,
        config.width,
        config.heads,
        config.dropout,
        causal=config.causal,
        **config.preset.fusion,
    )
    weight = data.class_weights if config.class_weights else None
    model = FUSIONS[name](fusion_config).to(device)
    train = data.of_split[0]
    lengths = data.lengths[train].tolist()
    steps = config.stage2_epochs * -(-len(train) // config.stage2_batch)
    optimizer, schedule = make_optimizer(model, config.stage2_lr, steps, config.preset.warmup)
    autocast, scaler = mixed_precision(device)

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    first, best = checkpoint.load(resume, parts) or (0, {"dev_f1": -1.0, "history": [], "test": []})
    saved = time.monotonic()
    epochs = range(first, config.stage2_epochs)
    for epoch in tqdm(epochs, desc=f"{place.name}", unit=" epochs", disable=None, leave=False):
        checkpoint.seed_everything(seed, name, epoch)
        model.train()
        start, terms = time.perf_counter(), []
        indices = make_batches(lengths, config.stage2_batch)
        batches = [[train[i] for i in conversations] for conversations in indices]
        for conversations in batches:
            batch = data.batch(conversations)
            with autocast:
                output = model(*batch.inputs)
            term = fusion_losses(output, batch, config, weight)
            optimizer_step(term["total"], model, optimizer, schedule, scaler, config.clip)
            terms.append({k: x.detach() for k, x in term.items()})
        check_finite([t["total"] for t in terms], [[data.names[i] for i in conversations] for conversations in batches])
        seconds = time.perf_counter() - start

        dev, test = (evaluate(model, data, split, config, autocast) for split in (1, 2))
        best["history"].append({"train": mean_terms(terms), "dev": dev["losses"], "test": test["losses"]})
        best["test"].append(scores(test["labels"], test["predictions"]))
        dev_f1 = scores(dev["labels"], dev["predictions"])["weighted_f1"]
        if dev_f1 > best["dev_f1"]:
            best |= {"dev_f1": dev_f1, "epoch": epoch + 1, "model": checkpoint.snapshot(model)}
            best |= {"labels": test["labels"], "predictions": test["predictions"]}
        speed = {"utterances_per_second": sum(lengths) / seconds, "lr": schedule.get_last_lr()[0]}
        padding = {"padding": padding_share(lengths, indices)}
        padding["padding_at_random"] = padding_share(lengths, make_batches([1] * len(train), config.stage2_batch))
        if config.log_steps:
            for step, term in enumerate(terms):
                losses_now = {k: float(x) for k, x in term.items()}
                checkpoint.log(place.parent, device, model=place.name, epoch=epoch + 1, step=step, **losses_now)
        checkpoint.log(place.parent, device, model=place.name, epoch=epoch + 1, dev_f1=dev_f1, **speed, **padding)
        if time.monotonic() - saved > SAVE_EVERY:
            checkpoint.save(resume, parts, epoch + 1, best)
            saved = time.monotonic()
    model.load_state_dict(best.pop("model"))
    metadata = {
        "config": json.dumps(dataclasses.asdict(fusion_config)),
        "fusion": name,
        "kinds": json.dumps(data.kinds),
    }
    checkpoint.replace(place.with_suffix(".safetensors"), lambda part: save_model(model, part, metadata))
    result = {"seed": seed, "test_selected": max(best.pop("test"), key=lambda s: s["weighted_f1"]), **best}
    checkpoint.replace(path, lambda part: part.write_text(json.dumps(result)))
    resume.unlink(missing_ok=True)
    return result


def mean_terms(terms: list[dict[str, Tensor]]) -> dict[str, float]:
    return {k: float(torch.stack([t[k] for t in terms]).mean()) for k in terms[0]}


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: Conversations, split: int, config: Config, autocast: contextlib.AbstractContextManager
) -> dict:
    """{"losses" (mean over batches), "labels", "predictions"} of a split (0 train, 1 dev, 2 test), in eval mode."""
    model.eval()
    terms, all_labels, predictions = [], [], []
    conversations = data.of_split[split]
    for start in range(0, len(conversations), config.stage2_batch):
        batch = data.batch(conversations[start : start + config.stage2_batch])
        with autocast:
            output = model(*batch.inputs)
        weight = data.class_weights if config.class_weights else None
        terms.append(fusion_losses(output, batch, config, weight))
        mask = batch.inputs[2]
        all_labels.append(batch.labels[mask])
        predictions.append(output.logits[TEXT].argmax(dim=-1)[mask])  # Eq. 23
    return {
        "losses": mean_terms(terms),
        "labels": torch.cat(all_labels).tolist(),
        "predictions": torch.cat(predictions).tolist(),
    }


def run_stage2(
    config: Config,
    features: Features,
    sets: list[tuple[str, ...]],
    seeds: range,
    out: Path,
    device: torch.device,
    fusions: tuple[str, ...] = PAPERS,
) -> dict[str, list[dict]]:
    """Each fusion over each feature set, with each seed; the main row's best model is left in fusion.safetensors.

    sets: tuples of kinds of vectors, text first. Returns rows of Table 3: name -> a result of train_fusion per seed.
    """
    rows: dict[str, list[dict]] = {}
    (out / "fusion").mkdir(exist_ok=True)
    for fusion in fusions:
        for kinds in sets:
            data = Conversations(features, kinds, device)
            row = f"{fusion} {'+'.join(ROWS[k] for k in kinds)}"
            places = {seed: out / "fusion" / f"{row.replace(' ', '-')}-seed{seed}" for seed in seeds}
            rows[row] = [
                train_fusion(fusion, data, len(features.label_names), config, place, seed, device)
                for seed, place in places.items()
            ]
            mean, std = mean_std([scores(r["labels"], r["predictions"])["weighted_f1"] for r in rows[row]])
            print(f"{row}: test W-F1 {mean:.2f} ± {std:.2f}, {len(places)} seeds", flush=True)
    row = main_row(list(rows))
    best = max(rows[row], key=lambda r: r["dev_f1"])
    weights = out / "fusion" / f"{row.replace(' ', '-')}-seed{best['seed']}.safetensors"
    checkpoint.replace(out / "fusion.safetensors", lambda part: shutil.copyfile(weights, part))
    return rows


def load_fusion(path: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """A trained fusion model, in eval mode on the CPU, and the kinds of vectors that it fuses.

    Errors: InputError for a file that `train_fusion` did not leave.
    """
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
        model = FUSIONS[metadata["fusion"]](FusionConfig(**json.loads(metadata["config"])))
        load_model(model, path)
        return model.eval(), tuple(json.loads(metadata["kinds"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise InputError(
            f"{path}: not a fusion model that this version trained ({type(e).__name__}); train it again"
        ) from e
