"""The configurations (Table 1 of the paper) and what the two training loops share: batches,
precision, optimiser, one step.

Not here: the loops themselves (stage1.py, stage2.py).
"""

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from data import InputError
from fusion import RELEASED


@dataclass(frozen=True)
class Preset:
    """Where the paper and its authors' code disagree about stage 2 (README, "Differences from the released code")."""

    fusion: dict = field(default_factory=dict)  # fields of FusionConfig
    detach_teacher: bool = True
    branch_cross_entropy: bool = False  # a cross entropy on the audio and the video branch, inside their KD terms
    feature_loss: bool = True  # L_f in stage 2
    warmup: float = 0.1  # share of the optimiser steps


@dataclass(frozen=True)
class Config:
    """Table 1, and what the paper leaves open. A learning rate is the peak of a warm-up and a linear decay."""

    text_model: str = "roberta-large"
    audio_model: str = "facebook/data2vec-audio-base-960h"
    video_model: str = "facebook/timesformer-base-finetuned-k400"
    width: int = 768  # d of the vectors, D of the fusion
    stage1_lr: float = 1e-5
    stage1_batch: int = 4
    stage1_epochs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("text", "audio", "video"), 10))
    stage2_lr: float = 1e-4
    stage2_batch: int = 16
    stage2_epochs: int = 30
    alpha: float = 0.7
    beta: float = 0.8
    heads: int = 8
    dropout: float = 0.5
    clip: float = 1.0  # largest norm of the gradient
    gradient_checkpointing: bool = False  # stage 1: less memory, more time
    log_steps: bool = False  # a line per step in log.jsonl, not only per epoch
    class_weights: bool = False  # both stages: the cross entropy counts rare classes for more
    causal: bool = False  # stage 2: an utterance reads the past alone
    preset: Preset = Preset()


# Small encoders with random weights learn faster and for longer than pretrained ones are tuned.
TINY = {
    "width": 64,
    "stage1_lr": 1.5e-3,
    "stage1_batch": 16,
    "stage1_epochs": {"text": 4, "audio": 8, "video": 12},
    "stage2_lr": 1e-3,
}
CONFIGS = {
    # Table 1 has 1e-5 for IEMOCAP's stage 2: in 210 steps a model with random weights hardly moves (README).
    "iemocap": Config(),
    "meld": Config(alpha=0.01, beta=0.09),
    "demo": Config(**TINY),
}
PRESETS = {
    "paper": {name: Preset() for name in CONFIGS},
    "released": {
        name: Preset(RELEASED, False, branch_cross_entropy=True, feature_loss=name != "meld", warmup=0.5)
        for name in CONFIGS
    },
}


def make_batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices in batches of similar length, in random order: little padding, and no two epochs with the same batches.

    Sorted by the length times a random factor between 0.9 and 1.1, cut into batches, and the batches shuffled.
    """
    keys = torch.tensor(lengths) * torch.empty(len(lengths)).uniform_(0.9, 1.1)
    order = torch.randperm(len(lengths))
    order = order[keys[order].argsort(stable=True)].tolist()  # equal keys in random order
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def padding_share(lengths: list[int], batches: list[list[int]]) -> float:
    """The share of padding in batches that are padded to their longest row."""
    padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
    return 1 - sum(lengths) / padded


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Inverse frequency: N / (C n_c) for a class with n_c of the N labels, 1 each if all are as frequent. float32 [C].

    labels: [N] int64, of train. A class that train lacks counts as one that has a single label.
    """
    return len(labels) / (num_classes * torch.bincount(labels, minlength=num_classes).clamp(min=1))


def mixed_precision(device: torch.device) -> tuple[contextlib.AbstractContextManager, torch.amp.GradScaler]:
    """Half precision where the device has it: bfloat16, else float16 with a loss scaler; float32 on a CPU."""
    if device.type != "cuda":
        return contextlib.nullcontext(), torch.amp.GradScaler("cpu", enabled=False)
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.autocast("cuda", dtype), torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)


def make_optimizer(model: nn.Module, lr: float, steps: int, warmup: float):
    """AdamW, and a schedule that rises over the first `warmup` of the steps and then falls to zero, both linearly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    rise = max(1, round(warmup * steps))
    return optimizer, LambdaLR(optimizer, lambda s: min((s + 1) / rise, max(0.0, (steps - s) / max(1, steps - rise))))


def optimizer_step(loss: Tensor, model: nn.Module, optimizer, schedule, scaler, clip: float) -> None:
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # before clipping: the norm that is clipped is the true one
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()


def check_finite(step_losses: list[Tensor], batches: list[list[str]]) -> None:
    """Stops a run that has gone astray, with the names of what it was fed. Once an epoch: no waiting for the GPU."""
    bad = (~torch.stack(step_losses).isfinite()).nonzero()
    if len(bad):
        raise InputError(
            f"the loss is no longer a number, first in step {int(bad[0])} of this epoch, on "
            f"{', '.join(batches[int(bad[0])])}. Look at these utterances, or lower the learning rate."
        )
