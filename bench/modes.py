"""The ways to run MAGT that the benchmark compares: a step of stage 2, and attention on padded batches.

    eager          fusion.MAGT as it stands: no padding, one call of attention per conversation, float32
    padded         as eager, but one call of attention per block, on the batch padded to its longest conversation
    bfloat16       as eager, under autocast; only where the processor multiplies in bfloat16
    torch.compile  forward pass and losses compiled; only on CUDA
    CUDA graph     the whole step captured once and replayed; only on CUDA

Not here: what is measured (grid.py), and how (measure.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.gpu_stage2 import padded
from bench.measure import Flops, magt_flops
from data import Batch
from fusion import MAGT, Block, FusionConfig
from magtkd import Config, fusion_losses, make_optimizer, mixed_precision, optimizer_step

MODES = ("eager", "torch.compile", "CUDA graph")  # of a prediction
STAGE2_MODES = ("padded", "eager", "bfloat16", "torch.compile", "CUDA graph")  # of a training step


def can_run(mode: str, device: str) -> bool:
    """Whether a mode is measured on this machine."""
    if mode == "bfloat16":
        return bfloat16_is_fast(device)
    return device == "cuda" or mode not in ("torch.compile", "CUDA graph")


def bfloat16_is_fast(device: str) -> bool:
    """On a CPU: whether it has AMX or AVX512-BF16. Without them bfloat16 is many times slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


# Attention on padded batches


class PaddedBlock(Block):
    """fusion.Block with one call of attention for all conversations, padded to the longest. Not causal."""

    def attend(self, q, k, v, lengths, readable, kept) -> Tensor:
        """As Block.attend: [N, D] each -> [N, D]. Errors: ValueError for a past or a causal model."""
        if self.causal or kept is not None:
            raise ValueError("attention on padded batches has no causal form here")
        return padded(self, q, k, v, lengths, readable, kept)


class PaddedMAGT(MAGT):
    """fusion.MAGT with padded attention: the same weights, the same logits."""

    def __init__(self, config: FusionConfig):
        super().__init__(config)
        for anchor in self.anchor.values():
            for source in anchor.block:
                anchor.block[source] = PaddedBlock(config)


def padded_flops(config: FusionConfig, lengths: list[int]) -> Flops:
    """The closed form of PaddedMAGT: attention works on padding too, the linear layers do not."""
    longest = [max(lengths)] * len(lengths)
    return Flops(magt_flops(config, longest).attention, magt_flops(config, lengths).linear)


# A step of stage 2


def stage2_loss_of(model: nn.Module, batch: Batch, config: Config, mode: str) -> Callable[..., Tensor]:
    """Eq. 25 with the teacher detached, as a function of *batch.inputs. mode: one of STAGE2_MODES."""
    autocast, _ = mixed_precision(batch.labels.device, "bfloat16" if mode == "bfloat16" else "float32")

    def loss(*inputs) -> Tensor:
        with autocast:
            return fusion_losses(model(*inputs), batch, config)["loss"]

    return loss


def stage2_step(model: nn.Module, batch: Batch, config: Config, mode: str) -> Callable[[], Tensor]:
    """A function that takes one training step on `batch`, as magtkd.train does, and returns the loss.

    mode: one of STAGE2_MODES; for "padded" give a PaddedMAGT. In a CUDA graph the learning rate stays that of the
    capture.
    """
    loss = stage2_loss_of(model, batch, config, mode)
    forward = torch.compile(loss) if mode == "torch.compile" else loss
    optimizer, schedule = make_optimizer(model, config.stage2_lr, steps=1000, warmup=0.1)
    for group in optimizer.param_groups:
        group["capturable"] = mode == "CUDA graph"
    _, scaler = mixed_precision(batch.labels.device, "float32")  # float32 and bfloat16 need no scaling

    def step() -> Tensor:
        value = forward(*batch.inputs)
        optimizer_step(value, model, optimizer, schedule, scaler, config.clip)
        return value.detach()

    return captured(step) if mode == "CUDA graph" else step


def captured(run: Callable) -> Callable:
    """`run` as one CUDA graph; every replay works on the tensors of the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is initialised on first use must not be captured
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay():
        graph.replay()
        return result

    return replay
