"""Stage 2 on a GPU: the ways to attend over conversations of many lengths, and the ways to run a step and an epoch.

    per conversation   fusion.MAGT as it stands: a call of attention per conversation
    padded             one call per block, on the batch padded to its longest conversation; the linear layers do not pad
    nested             one call on torch's jagged NestedTensor
    varlen             one call of torch.nn.attention.varlen (FlashAttention: CUDA and half precision)

    field code         the base of the ratios: a plain loop as one finds it in the field's repositories. Batches at
                       random, padded everywhere, collated on the CPU in every step, float32, AdamW as it comes, and
                       loss.item() in every step

Not here: what a step is worth (verdicts are drawn in docs/gpu.md), and stage 1 (gpu_parts.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import lengths
from bench.bare import fusion_losses, make_optimizer, optimizer_step
from data import MODALITIES, SPLITS, Batch, Conversations, FeatureFile
from fusion import MAGT, Block, FusionConfig

BATCH, LR, CLIP = 16, 1e-4, 1.0


@dataclass(frozen=True)
class Corpus:
    """The lengths of a corpus's conversations and its row of Table 1."""

    name: str
    lengths: dict[str, list[int]]  # split -> a length per conversation
    classes: int
    alpha: float
    beta: float

    def utterances(self) -> dict[str, int]:
        return {split: sum(self.lengths[split]) for split in SPLITS}

    def conversations(self, width: int, device: torch.device) -> Conversations:
        """Random features of the training conversations, on the device as stage 2 has them."""
        each = torch.tensor(self.lengths["train"])
        n, B = int(each.sum()), len(each)
        present = {m: torch.ones(n, dtype=torch.bool) for m in MODALITIES}
        names = {"label_names": ["?"] * self.classes, "speaker_names": ["a", "b"]}
        names |= {"conversation_names": [str(i) for i in range(B)], "utterance_names": [str(i) for i in range(n)]}
        rows = {"label": torch.randint(0, self.classes, (n,)), "speaker": torch.randint(0, 2, (n,))}
        rows |= {"conversation": torch.arange(B).repeat_interleave(each), "split": torch.zeros(n, dtype=torch.int64)}
        features = {m: torch.randn(n, width) for m in MODALITIES}
        return Conversations(FeatureFile(features, present, **rows, **names), MODALITIES, device)


CORPORA = (
    Corpus("IEMOCAP", lengths.IEMOCAP, 6, 0.7, 0.8),
    Corpus("MELD", lengths.MELD, 7, 0.01, 0.09),
)
TOY = Corpus("toy", {"train": [3, 1, 4, 2], "dev": [2], "test": [2]}, 4, 0.7, 0.8)


def epoch(names: list[str], size: int = BATCH) -> list[list[str]]:
    """Conversations in random batches."""
    order = [names[i] for i in torch.randperm(len(names)).tolist()]
    return [order[i : i + size] for i in range(0, len(order), size)]


def typical(batches: list[list[str]], lengths: dict[str, int]) -> list[str]:
    """The batch of an epoch with the median number of utterances (the upper of two), among the full ones."""
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    return sorted(full, key=lambda batch: sum(lengths[name] for name in batch))[len(full) // 2]


def useful_flops(config: FusionConfig, lengths: list[int]) -> int:
    """Of a step, forward and backward, without padding: three times 144 n D^2 + 6 n D C + 36 D sum(U^2)."""
    n, D = sum(lengths), config.width
    return 3 * (144 * n * D**2 + 6 * n * D * config.num_classes + 36 * D * sum(U**2 for U in lengths))


# Attention


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def padding(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a padded batch, flattened to [B * U]: the indices of the utterances, [N]; and True where there is one."""
    U = max(lengths)
    cells = torch.tensor([b * U + i for b, length in enumerate(lengths) for i in range(length)], device=device)
    there = torch.zeros(len(lengths) * U, dtype=torch.bool, device=device)
    return cells, there.index_fill(0, cells, True)


def padded(block: Block, q, k, v, lengths, readable, kept, at=None) -> Tensor:
    """As Block.attend, [N, D] each -> [N, D]. Not causal. at: what `padding` gives, where only one batch will come."""
    B, U = len(lengths), max(lengths)
    cells, there = at or padding(tuple(lengths), q.device)
    if readable is not None:
        there = torch.zeros_like(there).index_copy(0, cells, readable)

    def pad(x: Tensor) -> Tensor:  # [N, D] -> [B, heads, U, D / heads]
        x = x.new_zeros(B * U, x.shape[1]).index_copy(0, cells, x)
        return x.view(B, U, block.heads, -1).transpose(1, 2)

    answer = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), there.view(B, 1, 1, U))
    return answer.transpose(1, 2).reshape(B * U, -1).index_select(0, cells)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def offsets(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[B + 1]: where each conversation begins, and the end."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def nested(block: Block, q, k, v, lengths, readable, kept) -> Tensor:
    """As Block.attend. Nothing may be missing."""
    at = offsets(tuple(lengths), q.device, torch.int64)

    def jagged(x: Tensor) -> Tensor:  # [N, D] -> [B, heads, (U), D / heads]
        x = x if x.is_cuda else x.contiguous()  # the CPU's kernel takes no half of a tensor, as k and v are
        x = x.unflatten(-1, (block.heads, -1))
        x = torch.nested.nested_tensor_from_jagged(x, at, min_seqlen=min(lengths), max_seqlen=max(lengths))
        return x.transpose(1, 2)

    return F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v)).transpose(1, 2).values().flatten(1)


def varlen(block: Block, q, k, v, lengths, readable, kept) -> Tensor:
    """As Block.attend. Nothing may be missing; CUDA, half precision."""
    from torch.nn.attention.varlen import varlen_attn  # newer torch only

    at, longest = offsets(tuple(lengths), q.device, torch.int32), max(lengths)
    q, k, v = (x.unflatten(-1, (block.heads, -1)) for x in (q, k, v))
    return varlen_attn(q, k, v, at, at, longest, longest).flatten(1)


ATTENTION = {"per conversation": None, "padded": padded, "nested": nested, "varlen": varlen}


def make_model(corpus: Corpus, width: int, heads: int, attention: str, device: torch.device, only=None) -> MAGT:
    """In training mode; the same weights whatever the attention.

    only: the lengths of the one batch that it will get, for torch.compile: padded attention alone.
    """
    options = {"at": padding(tuple(only), device)} if only else {}
    torch.manual_seed(0)
    model = MAGT(FusionConfig(dict.fromkeys(MODALITIES, width), corpus.classes, 2, width, heads)).to(device)
    if attend := ATTENTION[attention]:
        for block in model.modules():
            if isinstance(block, Block):
                block.attend = partial(attend, block, **options)
    return model


# Steps


def make_step(
    model: nn.Module, corpus: Corpus, dtype: torch.dtype, compiled: str = "", graph: bool = False
) -> Callable:
    """step(batch) -> loss: Eq. 25, backward, clipping, AdamW, as magtkd.train takes it.

    compiled: a backend of torch.compile for the forward pass and the losses. graph: the step is going to be captured.
    """
    device = next(model.parameters()).device
    optimizer, schedule = make_optimizer(model, LR, 10_000, 0.1)
    for group in optimizer.param_groups:
        group["capturable"] = graph
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def loss_of(inputs: tuple, labels: Tensor) -> Tensor:
        return fusion_losses(model(*inputs), Batch(inputs, labels, {}), corpus)["loss"]

    forward = torch.compile(loss_of, backend=compiled) if compiled else loss_of

    def step(batch: Batch) -> Tensor:
        with autocast:
            loss = forward(batch.inputs, batch.labels)
        optimizer_step(loss, model, optimizer, schedule, scaler, CLIP)
        return loss.detach()

    return step


def captured(step: Callable, batch: Batch) -> Callable[[], Tensor]:
    """step(batch) as one CUDA graph, replayed on the tensors of the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is initialised on first use must not be captured
            step(batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(batch)

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def field_step(model: nn.Module, corpus: Corpus, data: Conversations) -> Callable[[list[str]], float]:
    """step(names) -> loss, of a plain loop; see the top of this file. The model's attention must be "padded"."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    features = {m: x.cpu() for m, x in data.features.items()}
    speaker, label = data.speaker.cpu(), data.label.cpu()

    def step(names: list[str]) -> float:
        at = [data.slices[name] for name in names]

        def collate(x: Tensor) -> Tensor:  # [N, ..] -> [B * U, ..], zero where padded
            return nn.utils.rnn.pad_sequence([x[rows] for rows in at], batch_first=True).flatten(0, 1).to(device)

        mask = collate(torch.ones(len(speaker), dtype=torch.bool))
        U = max(data.lengths[name] for name in names)
        inputs = ({m: collate(x) for m, x in features.items()}, collate(speaker), [U] * len(at))
        out = model(*inputs, dict.fromkeys(MODALITIES, mask))
        valid = type(out)(*({m: x[mask] for m, x in part.items()} for part in out))
        loss = fusion_losses(valid, Batch(inputs, collate(label)[mask], {}), corpus)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


# The part of the benchmark

WAYS = {  # way: (attention, type, compiled, CUDA graph)
    "as it stands": ("per conversation", torch.bfloat16, False, False),
    "float32": ("per conversation", torch.float32, False, False),
    "padded attention": ("padded", torch.bfloat16, False, False),
    "nested attention": ("nested", torch.bfloat16, False, False),
    "varlen attention": ("varlen", torch.bfloat16, False, False),
    "CUDA graph": ("per conversation", torch.bfloat16, False, True),
    "CUDA graph, padded attention": ("padded", torch.bfloat16, False, True),
    "torch.compile, padded attention": ("padded", torch.bfloat16, True, False),
}


def matrix_rates(bench) -> dict[torch.dtype, float | str]:
    """FLOP/s of products of two n x n matrices on this card, n = 8192 (toy: 64)."""
    n, rates = 64 if bench.toy else 8192, {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, n, n, device=bench.device).to(dtype)
        seconds = bench.seconds(lambda a=a, b=b: a @ b)
        rates[dtype] = seconds if isinstance(seconds, str) else 2 * n**3 / seconds
        bench.row("matrix rate", type=str(dtype), n=n, **{"FLOP/s": rates[dtype]})
    return rates


def measure(bench) -> None:
    """The step on a typical batch and the epoch, every way; the ratio to the field's plain loop."""
    width, heads = (16, 2) if bench.toy else (768, 8)
    rates = matrix_rates(bench)
    for corpus in (TOY,) if bench.toy else CORPORA:
        measure_corpus(bench, corpus, width, heads, rates)


def measure_corpus(bench, corpus: Corpus, width: int, heads: int, rates: dict) -> None:
    torch.manual_seed(0)
    data = corpus.conversations(width, bench.device)
    batches = epoch(data.splits["train"], 2 if bench.toy else BATCH)
    names = typical(batches, data.lengths)
    sizes = [data.lengths[name] for name in names]
    config = FusionConfig(dict.fromkeys(MODALITIES, width), corpus.classes, 2, width, heads)
    about = {"corpus": corpus.name, "utterances": sum(sizes)}

    field = field_step(make_model(corpus, width, heads, "padded", bench.device), corpus, data)
    base = bench.seconds(lambda: field(names))
    whole = bench.seconds(lambda: [field(batch) for batch in batches], rounds=3, warmup=1)
    bench.row("step", way="field code", **about, **{"seconds of a step": base, "seconds of an epoch": whole})

    def measure_way(attention: str, dtype: torch.dtype, compiled: bool, graph: bool) -> dict:
        model = make_model(corpus, width, heads, attention, bench.device, sizes if compiled else None)
        backend = ("eager" if bench.toy else "inductor") if compiled else ""
        step, batch = make_step(model, corpus, dtype, backend, graph), data.batch(names)
        run = captured(step, batch) if graph else partial(step, batch)
        seconds, (peak, _) = bench.seconds(run), bench.peak(run)
        whole = "one batch alone"  # a graph, a compiled step: the lengths are part of it
        if not (graph or compiled):
            whole = bench.seconds(lambda: [step(data.batch(b)) for b in batches], rounds=3, warmup=1)
        facts = {"seconds of a step": seconds, "seconds of an epoch": whole, "peak bytes": peak}
        if isinstance(seconds, float):
            rate = useful_flops(config, sizes) / seconds
            facts |= {"share of the matrix rate": rate / rates[dtype], "times the field": base / seconds}
        return facts

    for way, (attention, dtype, compiled, graph) in WAYS.items():
        facts = {"why": "needs CUDA", "seconds of a step": "not measured"}
        if bench.cuda or not (graph or attention in ("nested", "varlen")):
            try:
                facts = measure_way(attention, dtype, compiled, graph)
            except (RuntimeError, NotImplementedError, ImportError, torch._dynamo.exc.TorchDynamoException) as e:
                facts["why"] = f"{type(e).__name__}: {str(e).splitlines()[0]}"[:200]  # this torch does not offer it
        bench.row("step", way=way, type=str(dtype), attention=attention, **about, **facts)
