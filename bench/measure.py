"""What a model costs: matrix-multiply FLOPs, counted three ways, bytes kept for the backward pass, the machine's rate.

One convention everywhere: a multiply-add is 2 FLOPs. Counted are linear layers (1x1 convolutions among them) and the
two products of attention; not counted are softmax, LayerNorm, activations, positions, embeddings. Attention and
linear terms are kept apart. All counts are of a forward pass; forward and backward together are three times as much,
exactly (tested).

Closed forms, from the layers one by one. A linear layer from a to b on n rows: 2nab. Attention of q rows over k rows
at width d, heads together: 2qkd for the scores, 2qkd for the weighted sum, 4qkd together. With M modalities, C
classes:

MAGT over conversations of U utterances each, which may differ; n = sum(U) rows, width D:
    block   query 2nD^2, key and value 4nD^2, output 2nD^2, feed-forward D -> D -> D 4nD^2: 12nD^2
            attention, conversation by conversation: 4 sum(U^2) D
    anchor  M blocks, M gates 2nD^2, merge MD -> D 2nMD^2: 16M nD^2; attention 4M sum(U^2) D
    model   M anchors, M classifiers 2nDC: linear 16M^2 nD^2 + 2M nDC, attention 4M^2 sum(U^2) D
            and 2n d_m D for each modality with d_m != D. For M = 3: 144 nD^2 + 6nDC, and 36 sum(U^2) D.

MulT on S utterances of L_m frames, width d, N layers, memories of K layers and width w = (M - 1) d:
    layer   t target rows, s source rows, width d: query 2td^2, key and value 4sd^2, output 2td^2, feed-forward
            d -> 4d -> d 16td^2: (20t + 4s) d^2; attention 4tsd
    cross   N such layers for every target and every other source
    memory  K such layers for every target, t = s = S L_m, at width w: 24 S L_m w^2; attention 4 S L_m^2 w
    head    two linear layers Mw -> Mw and one to C, on S rows: 2S (2 (Mw)^2 + MwC)
            and 2 S L_m d_m d for each modality with d_m != d.
            For M = 3 and all L_m = L: linear (144N + 288K) SLd^2 + S (144d^2 + 12dC), attention (24N + 24K) SL^2 d.

So the ratio of the attention terms, MAGT at D to MulT at d, both on S utterances, in conversations of U each, is
3/2 / (N + K) * D/d * U/L^2.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from bench.mult import MulTConfig
from fusion import FusionConfig

SEED = 0
THREADS = min(2, os.cpu_count() or 1)  # the same on every machine with two cores or more


class Flops(NamedTuple):
    """Of a forward pass, in FLOPs: 2 for a multiply-add."""

    attention: int
    linear: int

    @property
    def total(self) -> int:
        return self.attention + self.linear


def magt_flops(config: FusionConfig, lengths: list[int]) -> Flops:
    """The closed form above, of MAGT on conversations of `lengths` utterances."""
    n, D, M = sum(lengths), config.width, len(config.widths)
    inputs = sum(2 * n * width * D for width in config.widths.values() if width != D)
    linear = 16 * M**2 * n * D**2 + 2 * M * n * D * config.num_classes + inputs
    return Flops(4 * M**2 * sum(U**2 for U in lengths) * D, linear)


def mult_flops(config: MulTConfig, utterances: int, frames: dict[str, int]) -> Flops:
    """The closed form above, of MulT on `utterances` utterances of `frames[m]` frames each."""
    S, d, M, C = utterances, config.width, len(config.widths), config.num_classes
    w = (M - 1) * d
    attention, linear = 0, 2 * S * (2 * (M * w) ** 2 + M * w * C)
    for target, t in frames.items():
        linear += 2 * S * t * config.widths[target] * d if config.widths[target] != d else 0
        for source, s in frames.items():
            if source != target:
                linear += config.layers * S * (20 * t + 4 * s) * d**2
                attention += config.layers * 4 * S * t * s * d
        linear += config.depth_of_memory * 24 * S * t * w**2
        attention += config.depth_of_memory * 4 * S * t * t * w
    return Flops(attention, linear)


def count_with_torch(model: Callable, inputs: tuple) -> Flops:
    """By torch's FlopCounterMode. What holds attention must be on the meta device: on a CPU its fused call counts 0."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    total = counter.get_flop_counts().get("Global", {})  # no such entry where there was no product
    counts = {str(op): flops for op, flops in total.items()}
    attention = sum(n for op, n in counts.items() if op == "aten.bmm")  # the meta device spells attention out
    return Flops(attention, sum(counts.values()) - attention)


def count_with_fvcore(model: nn.Module, inputs: tuple) -> Flops:
    """By fvcore, which counts multiply-adds and knows no fused attention: it gets a handler, and is doubled."""

    def attention_products(inputs: list, outputs: list) -> int:
        query, key = (x.type().sizes() for x in inputs[:2])  # [B, heads, rows, width of a head]
        batch, heads, rows, width = query
        return 2 * batch * heads * rows * key[2] * width

    tensors = tuple(x for x in tree_leaves(inputs) if isinstance(x, Tensor))
    analysis = (
        FlopCountAnalysis(_Flat(model, inputs), tensors)
        .set_op_handle("aten::scaled_dot_product_attention", attention_products)
        .unsupported_ops_warnings(False)
        .uncalled_modules_warnings(False)
        .tracer_warnings("none")
    )
    training = model.training
    model.eval()  # the tracer cannot follow the random bytes of fusion.Dropout, which holds no matrix product
    counts = analysis.by_operator()
    model.train(training)
    del counts["layer_norm"]  # no matrix product
    attention = counts.pop("scaled_dot_product_attention")
    return Flops(2 * attention, 2 * sum(counts.values()))


class _Flat(nn.Module):
    """Tensors in, tensors out: what fvcore's tracer can follow. Inputs that are no tensors (lengths) are kept fixed."""

    def __init__(self, model: nn.Module, inputs: tuple):
        super().__init__()
        self.model = model
        self.leaves, self.spec = tree_flatten(inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, Tensor) else x for x in self.leaves]
        return tuple(tree_leaves(self.model(*tree_unflatten(leaves, self.spec))))


def bytes_for_backward(function: Callable, inputs: tuple, parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps from function(*inputs): each storage once, those of `parameters` not counted. Exact.

    The inputs count where a gradient needs them. A module stays in the mode (train or eval) that it is in. Works on the
    meta device too; there attention is always spelled out, and its L x L weights are kept.
    """
    own = {p.untyped_storage()._cdata for p in parameters}  # the storage, since data on the meta device has no address
    kept = []  # keeps the storages alive, so that none is taken for another

    def keep(x: Tensor) -> Tensor:
        kept.append(x.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function(*inputs)
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    return sum(size for storage, size in sizes.items() if storage not in own)


def synchronize(device: str) -> None:
    """Waits for the device, so that a timed function ends when its work does."""
    if device == "cuda":
        torch.cuda.synchronize()


def gemm_rates(device: str, sizes: Iterable[int] = (1024, 2048, 4096), rounds: int = 7) -> dict[str, float]:
    """FLOP/s of float32 matrix products: {"n x n": rate} for each of `sizes`, and that of MAGT's own, "layers".

    "layers" is [768, 768] times [768, 768], 60 different pairs in turn: a stage-2 step has 60 linear layers and, on
    IEMOCAP, some 760 utterances, and nothing of one layer is still near the processor when its turn comes again.
    """
    operands = {f"{n} x {n}": [torch.randn(2, n, n, device=device)] for n in sizes}
    width = min(768, max(sizes))
    operands["layers"] = [torch.randn(2, width, width, device=device) for _ in range(60)]
    rates = {}
    for name, pairs in operands.items():
        seconds = []
        for _ in range(1 + rounds):
            synchronize(device)
            start = time.perf_counter()
            for a, b in pairs:
                a @ b
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        rates[name] = 2 * len(pairs) * pairs[0].shape[-1] ** 3 / statistics.median(seconds[1:])
    return rates


def environment(device: str) -> dict[str, str | int]:
    """What a table has to say of where its numbers come from."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        "device": device,
        "cpu": _cpu_model(),
        "threads": THREADS,
        "idle threads": f"spin {os.environ['GOMP_SPINCOUNT']} times, then sleep",
        **gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "float32 products": torch.get_float32_matmul_precision(),
        "seed": SEED,
    }


def _cpu_model() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
