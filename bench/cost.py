"""What a model costs: matrix-multiply FLOPs counted three ways, bytes, and the machine's own matrix rates.

A multiply-add is 2 FLOPs, everywhere. Counted are linear layers and the two products of attention; not counted are
softmax, LayerNorm, activations, positions and embeddings. Attention and linear terms are kept apart. All counts are of
a forward pass; forward and backward together are exactly three times as much (tested).

Closed forms, layer by layer. A linear layer from a to b on n rows: 2nab. Attention of q query rows and k key rows at
width d, all heads together: 2qkd for the scores, 2qkd for the weighted sum, 4qkd in all. M modalities, C classes.

MAGT at width D on conversations of U rows each, which may differ; n = sum(U). The rows are utterances, or frames:
    block   query 2nD^2, key and value 4nD^2, output 2nD^2, feed-forward D -> D -> D 4nD^2: 12nD^2
            attention, conversation by conversation: 4 sum(U^2) D
    anchor  M blocks, M gates 2nD^2, merge MD -> D 2nMD^2: 16M nD^2; attention 4M sum(U^2) D
    model   M anchors, M classifiers 2nDC, inputs of width D: linear 16M^2 nD^2 + 2M nDC, attention 4M^2 sum(U^2) D.
            For M = 3: 144 nD^2 + 6nDC, and 36 sum(U^2) D.

MulT on S utterances of L_m frames, width d, N layers, memories of K layers and width w = (M - 1) d:
    layer   t target rows, s source rows, width d: query 2td^2, key and value 4sd^2, output 2td^2, feed-forward
            d -> 4d -> d 16td^2: (20t + 4s) d^2; attention 4tsd
    cross   N such layers for every target and every other source
    memory  K such layers for every target, t = s = S L_m, at width w: 24 S L_m w^2; attention 4 S L_m^2 w
    head    two linear layers Mw -> Mw and one to C, on S rows: 2S (2 (Mw)^2 + MwC)
            and 2 S L_m d_m d for each modality with d_m != d.
            For M = 3 and all L_m = L: linear (144N + 288K) SLd^2 + S (144d^2 + 12dC), attention (24N + 24K) SL^2 d.
"""

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from bench.mult import MulTConfig
from fusion import FusionConfig

SEED = 0
THREADS = min(2, os.cpu_count() or 1)  # the same on every machine with two cores or more


class Flops(NamedTuple):
    """Of a forward pass."""

    attention: int
    linear: int

    @property
    def total(self) -> int:
        return self.attention + self.linear


def magt_flops(config: FusionConfig, lengths: list[int]) -> Flops:
    """The closed form above, of MAGT on conversations of `lengths` rows."""
    n, D, M = sum(lengths), config.width, len(config.widths)
    linear = 16 * M**2 * n * D**2 + 2 * M * n * D * config.num_classes
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
        linear += config.memory_layers * 24 * S * t * w**2
        attention += config.memory_layers * 4 * S * t * t * w
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
    counts = analysis.by_operator()
    del counts["layer_norm"]  # no matrix product
    attention = counts.pop("scaled_dot_product_attention")
    return Flops(2 * attention, 2 * sum(counts.values()))


class _Flat(nn.Module):
    """Tensors in, tensors out, as fvcore's tracer needs it. Inputs that are no tensors (lengths) are constants."""

    def __init__(self, model: nn.Module, inputs: tuple):
        super().__init__()
        self.model = model
        self.leaves, self.spec = tree_flatten(inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, Tensor) else x for x in self.leaves]
        return tuple(tree_leaves(self.model(*tree_unflatten(leaves, self.spec))))


def bytes_for_backward(model: nn.Module, inputs: tuple) -> int:
    """Bytes that autograd keeps from model(*inputs): each storage once, parameters not counted. Exact.

    The inputs count where a gradient needs them. The model stays in its mode (train or eval). Works on the meta device
    too, where attention is never fused: its weights [S, heads, L, L] count.
    """
    # Storages by their object: data on the meta device has no address.
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
    """The most bytes of tensors that function() has allocated at one time: without weights and inputs, made before.

    On CUDA by the allocator's statistics, on a CPU by the profiler's record of each allocation. Buffers inside MKL or
    oneDNN are not seen.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def synchronize(device: str) -> None:
    """Waits for the device, so that a timed function ends when its work does."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable, device: str) -> float:
    """The time of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def matrix_rates(device: str, dtypes: Iterable[str], rounds: int = 5) -> dict[str, dict[str, float]]:
    """FLOP/s of matrix products: {type: {name: rate}}, the median of `rounds`.

    "4096 x 4096": two square matrices. "layers": 60 different pairs of [768, 768] in turn, the size of a linear layer
    of MAGT on IEMOCAP's batch (some 770 utterances); no operand is in a cache when its turn comes again.
    """
    rates = {dtype: {} for dtype in dtypes}
    for dtype, found in rates.items():
        for name, many, n in (("4096 x 4096", 1, 4096), ("layers", 60, 768)):
            pairs = torch.randn(many, 2, n, n, device=device).to(getattr(torch, dtype))
            times = [seconds(lambda pairs=pairs: [a @ b for a, b in pairs], device) for _ in range(1 + rounds)]
            found[name] = 2 * many * n**3 / statistics.median(times[1:])
    return rates


def bfloat16_is_fast(device: str) -> bool:
    """On a CPU: whether it has AMX or AVX512-BF16. Without them bfloat16 is many times slower than float32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def environment(device: str) -> dict[str, str | int]:
    """Where the numbers come from: device, versions, commit, settings."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
    return {
        "device": device,
        "cpu": _cpu_model(),
        "threads": THREADS,
        "GOMP_SPINCOUNT": os.environ["GOMP_SPINCOUNT"],
        **gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "seed": SEED,
        "commit": _commit(),
    }


def _commit() -> str:
    """The git commit, with "+" if tracked files differ from it; "unknown" without git or a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
