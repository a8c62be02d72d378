"""A step of stage 2 on a machine that has torch and little else.

magtkd.py imports scikit-learn, and encoders.py PyAV. Where both are at hand these are magtkd's own functions; where one
is missing, the same from losses.py and torch, which a test holds equal to magtkd's.
"""

import torch
from torch import Tensor, nn

import losses
from data import Batch
from fusion import TEXT, FusionOutput

OPTIONAL = ("av", "sklearn", "scipy", "fvcore", "matplotlib")  # what a bare machine may be without


def missing_package(error: Exception) -> str | None:
    """The package that a machine may be without and whose absence is the error; None for any other error."""
    name = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else None
    return name if name in OPTIONAL else None


def plain_losses(out: FusionOutput, batch: Batch, config, weight: Tensor | None = None) -> dict[str, Tensor]:
    """Eq. 25 of a batch in which nothing is missing: {"loss": scalar}."""
    teacher = out.logits[TEXT].detach(), out.hidden[TEXT].detach()
    kd = {m: losses.distillation_loss(out.logits[m], out.hidden[m], *teacher) for m in ("audio", "video")}
    l_ce = losses.cross_entropy(out.logits[TEXT], batch.labels, weight)
    return {"loss": losses.stage2_loss(l_ce, kd["audio"], kd["video"], config.alpha, config.beta)}


def plain_optimizer(model: nn.Module, lr: float, steps: int, warmup: float):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def plain_step(loss: Tensor, model: nn.Module, optimizer, schedule, scaler, clip: float) -> None:
    """scaler: not used here, where nothing runs in float16."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()


try:
    from magtkd import fusion_losses, make_optimizer, optimizer_step

    MISSING = None
except ModuleNotFoundError as e:
    MISSING = missing_package(e)
    if MISSING is None:
        raise
    fusion_losses, make_optimizer, optimizer_step = plain_losses, plain_optimizer, plain_step
