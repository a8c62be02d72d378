"""The benchmark's grid (results/cpu.json) on a GPU: the same FLOPs to the digit, the allocator's peak, the times.

The models, sizes and counts are those of the stored CPU run, so fvcore and pytest-benchmark are not needed here.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.mult import MulT, MulTConfig
from data import MODALITIES
from fusion import MAGT, FusionConfig

STORED = Path(__file__).parent / "results" / "cpu.json"
CLASSES, HEADS = 6, 8
PUBLISHED_WIDTHS = dict(zip(MODALITIES, (300, 74, 35)))


def build(variant: str, width: int, device: torch.device) -> nn.Module:
    """A model of the grid, in training mode."""
    torch.manual_seed(0)
    widths = dict.fromkeys(MODALITIES, width)
    with torch.device(device):
        if variant == "MAGT":
            return MAGT(FusionConfig(widths, CLASSES, 2, width, HEADS))
        if variant == "MulT as published":
            return MulT(MulTConfig(PUBLISHED_WIDTHS, CLASSES, width))
        memories = {"MulT matched": 1, "MulT matched, authors' memories": None}[variant]
        return MulT(MulTConfig(widths, CLASSES, width, HEADS, layers=1, memory_layers=memories))


def inputs(row: dict, samples: int, device: torch.device) -> tuple:
    """What the model of a stored row is called with: `samples` utterances."""
    n = row["length"]
    if row["variant"] == "MAGT":
        features = {m: torch.randn(samples, row["width"], device=device) for m in MODALITIES}
        return features, torch.ones(samples, dtype=torch.int64, device=device), [n] * (samples // n)
    frames = dict(zip(MODALITIES, n if isinstance(n, list) else [n] * 3))
    widths = PUBLISHED_WIDTHS if row["variant"] == "MulT as published" else dict.fromkeys(MODALITIES, row["width"])
    sounds = {m: torch.randn(samples, frames[m], widths[m], device=device) for m in MODALITIES}
    # With a mask, as in the CPU's run: it decides which kernel attends.
    return sounds, {m: torch.ones(x.shape[:2], dtype=torch.bool, device=device) for m, x in sounds.items()}


def count(model: nn.Module, given: tuple) -> tuple[int, int]:
    """FLOPs of attention and of the linear layers, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        model(*given)
    found = {str(op): n for op, n in counter.get_flop_counts().get("Global", {}).items()}
    attention = sum(n for op, n in found.items() if "attention" in op or op == "aten.bmm")
    return attention, sum(found.values()) - attention


def total(outputs) -> Tensor:
    """A number that depends on every output."""
    if isinstance(outputs, Tensor):
        return outputs.square().mean()
    return sum(x.square().mean() for x in outputs.logits.values())


def measure(bench) -> None:
    rows = [row for row in json.loads(STORED.read_text())["rows"] if row["kind"] == "count"]
    if bench.toy:
        rows = [row for row in rows if row["length"] == 8]
    for row in rows:
        samples = row["samples"]
        if bench.cuda:  # halved until what is kept for the backward pass fits well
            free = torch.cuda.mem_get_info()[0]
            while samples > 8 and row["bytes"] * samples / row["samples"] > 0.4 * free:
                samples //= 2
        about = {"variant": row["variant"], "length": row["length"], "width": row["width"], "samples": samples}
        # A CPU's fused attention is not counted by torch: the meta device spells it out.
        where = bench.device if bench.cuda else torch.device("meta")
        given = inputs(row, samples, where)
        model = build(row["variant"], row["width"], where)
        flops = [n * row["samples"] / samples for n in count(model, given)]
        equal = flops == [row["flops_attention"], row["flops_linear"]]
        bench.row("FLOPs", **about, **{"FLOPs": sum(flops)}, equal=equal)
        if not bench.cuda:
            continue

        def both(model=model, given=given) -> None:
            model.zero_grad(set_to_none=True)
            total(model(*given)).backward()

        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            forward = bench.seconds(lambda m=model, g=given: m(*g), rounds=3)
        step = bench.seconds(both, rounds=3)
        model.zero_grad(set_to_none=True)
        kept = bench.peak(lambda m=model, g=given: m(*g))[0] - before
        counted = row["bytes"] * samples // row["samples"]
        bench.row("time", **about, forward=forward, step=step, **{"peak bytes": kept, "counted bytes": counted})
        del model, given, both
