"""What a model costs: matrix-multiply FLOPs counted three ways, bytes, and the machine's own matrix rates.

A multiply-add is 2 FLOPs. Counted are linear layers and the two products of attention, apart, in a forward pass; with
the backward pass they are exactly three times as much (tested). Softmax, LayerNorm and activations are not counted.

Closed forms: a linear layer from a to b on n rows takes 2nab. Attention of q query rows and k key rows at width d, all
heads together, takes 2qkd for the scores and 2qkd for the weighted sum.
"""

import math
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.mult import MulTConfig
from fusion import FusionConfig


class Flops(NamedTuple):
    """Of a forward pass."""

    attention: int
    linear: int


def magt_flops(config: FusionConfig, lengths: list[int]) -> Flops:
    """MAGT with M modalities and inputs of its width D, on conversations of `lengths` rows: utterances, or frames.

    A block takes 12nD^2 on n rows (query 2, key and value 4, output 2, feed-forward 4), a gate 2nD^2, the merge of an
    anchor's M streams 2M nD^2. There are M anchors, each with M blocks and gates: linear 16M^2 nD^2, and classifiers.
    """
    n, D, M = sum(lengths), config.width, len(config.widths)
    linear = 16 * M**2 * n * D**2 + 2 * M * n * D * config.num_classes
    return Flops(4 * M**2 * sum(U**2 for U in lengths) * D, linear)


def mult_flops(config: MulTConfig, utterances: int, frames: dict[str, int]) -> Flops:
    """MulT on `utterances` utterances of `frames[m]` frames each.

    A layer with t target and s source rows takes (20t + 4s) d^2: query and output 2t each, key and value 4s,
    feed-forward d -> 4d -> d 16t. In a memory t = s, and the width is that of the concatenated streams.
    """
    S, d, M = utterances, config.width, len(config.widths)
    w = (M - 1) * d
    attention, linear = 0, 2 * S * (2 * (M * w) ** 2 + M * w * config.num_classes)
    for target, t in frames.items():
        linear += 2 * S * t * config.widths[target] * d if config.widths[target] != d else 0
        for source, s in frames.items():
            if source != target:
                linear += config.layers * S * (20 * t + 4 * s) * d**2
                attention += config.layers * S * 4 * t * s * d
        linear += config.layers * S * 24 * t * w**2
        attention += config.layers * S * 4 * t * t * w
    return Flops(attention, linear)


def count_with_torch(model: nn.Module, inputs: tuple) -> Flops:
    """By torch's FlopCounterMode. The model must be on the meta device: on a CPU fused attention counts as 0."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = counts.pop("aten.bmm", 0)  # the meta device runs attention as two batched products
    return Flops(attention, sum(counts.values()))


def count_with_fvcore(model: nn.Module, inputs: tuple) -> Flops:
    """By fvcore. It counts multiply-adds, hence the factor 2. For fused attention it has no handler and gets one."""

    def attention_products(inputs: list, outputs: list) -> int:
        query, key = (x.type().sizes() for x in inputs[:2])  # [B, heads, rows, width of a head]
        return 2 * math.prod(query) * key[2]

    analysis = (
        FlopCountAnalysis(_ByTensors(model, inputs), tuple(inputs[0].values()))
        .set_op_handle("aten::scaled_dot_product_attention", attention_products)
        .tracer_warnings("none")
    )
    counts = analysis.by_operator()
    del counts["layer_norm"]  # no matrix product
    attention = counts.pop("scaled_dot_product_attention")
    return Flops(2 * attention, 2 * sum(counts.values()))


class _ByTensors(nn.Module):
    """Features as separate arguments, as fvcore's tracer needs them; the model's other arguments are constants."""

    def __init__(self, model: nn.Module, inputs: tuple):
        super().__init__()
        self.model = model
        self.names, self.others = list(inputs[0]), inputs[1:]

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(self.model(dict(zip(self.names, features)), *self.others)))


def bytes_for_backward(model: nn.Module, inputs: tuple) -> int:
    """Bytes that autograd keeps from model(*inputs): each storage once, parameters not counted. Exact."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = []  # keeps the storages alive: a freed one's address may be used again

    def keep(x: Tensor) -> Tensor:
        kept.append(x.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(*inputs)
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    return sum(size for storage, size in sizes.items() if storage not in own)


def peak_bytes(function: Callable, device: str) -> int:
    """The most bytes that function() has allocated at one time; on a CPU buffers inside MKL or oneDNN are not seen."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def seconds(function: Callable, device: str) -> float:
    """The time of one call."""
    synchronize = torch.get_device_module(device).synchronize  # does nothing on a CPU
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def matrix_rates(device: str, dtypes: list[str], n: int = 4096) -> dict[str, float]:
    """FLOP/s of products of two [n, n] matrices by type, the median of five."""
    rates = {}
    for dtype in dtypes:
        a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        times = [seconds(lambda a=a: a @ a, device) for _ in range(6)]
        rates[dtype] = 2 * n**3 / statistics.median(times[1:])
    return rates
