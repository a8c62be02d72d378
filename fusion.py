"""Stage 2's models: the Multi-modal Anchor Gated Transformer (MAGT, Eq. 15-23) and the baseline Concat (Figure 3).

    config = FusionConfig(widths={"text": 768, "audio": 768, "video": 768}, num_classes=6, num_speakers=2)
    logits, hidden = MAGT(config)(features, speakers, lengths)   # copy this file: it needs torch and nothing else

A conversation is a row of utterances; an utterance has one feature (a vector) per modality. In MAGT every modality is
the anchor once: its utterances ask (query), those of a source answer (key, value), and a gate decides how much of each
answer passes. Audio and video are anchors first. Text, the strongest, comes last: it reads itself and the two enriched
sequences. A causal MAGT reads the past and the present alone; `MAGT.step` takes a conversation as it happens.

Shapes: B conversations in a batch, N utterances in all of them, one conversation after the other; U utterances in one
conversation; d_m width of a feature; D width inside; C classes. There is no padding. From padded data [B, U, d_m] with
a mask [B, U], True at utterances: features = x[mask], lengths = mask.sum(1).tolist().

Not here: the losses (losses.py), the training (magtkd.py), the encoders that make the features (encoders.py).
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT = "text"  # the last anchor; its logits are the prediction


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of a fusion model. A modality without an entry in `widths` is not used; text must have one."""

    widths: dict[str, int]  # modality -> d_m
    num_classes: int  # C
    num_speakers: int  # speakers are 1 .. num_speakers; 0 is one never seen in training
    width: int = 768  # D
    heads: int = 8
    dropout: float = 0.5
    # Eq. 18 adds F_m to positions and speakers. Features of length 1, say sentence embeddings, would drown in them.
    # A LayerNorm on F_m makes MAGT indifferent to the scale of its input.
    input_norm: bool = True
    causal: bool = False  # an utterance reads itself and the past, never the future

    def __post_init__(self):
        if TEXT not in self.widths:
            raise ValueError(f"widths needs an entry for {TEXT!r}, the last anchor; got {sorted(self.widths)}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and divide by heads, got width {self.width}, heads {self.heads}")
        if self.num_classes < 2 or self.num_speakers < 1:
            raise ValueError(f"need 2 classes and 1 speaker at least, got {self.num_classes} and {self.num_speakers}")


class FusionOutput(NamedTuple):
    """Per modality. `logits["text"]` is the model's prediction; the other modalities exist for Eq. 24."""

    logits: dict[str, Tensor]  # modality -> [N, C]
    hidden: dict[str, Tensor]  # modality -> [N, D]


class Dropout(nn.Dropout):
    """nn.Dropout. On a CPU with one random byte per element: torch's own masks take a fifth of a training step there.

    p is then rounded to a multiple of 1/256.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training:
            return super().forward(x)
        words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= round(256 * self.p)
        return x * keep / (1 - round(256 * self.p) / 256)


class Past:
    """What a causal MAGT has read of B conversations so far. Empty at first."""

    def __init__(self):
        self.lengths: list[int] = []  # utterances read, per conversation
        # (anchor, source) -> per conversation its keys [T, D], values [T, D] and which of them may be read, [T]
        self.streams: dict[tuple[str, str], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)


class Block(nn.Module):
    """Transformer(Q, K, V) of Eq. 19 and 20: the anchor's utterances (query) read the source's (key and value).

    The paper does not draw it: x = q + MHA(q, kv, kv), then x + FFN(LayerNorm(x)).
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        D = config.width
        self.heads, self.causal = config.heads, config.causal
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, D)
        self.drop = Dropout(config.dropout)
        self.ffn = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), self.drop, nn.Linear(D, D), self.drop)

    def forward(self, anchor: Tensor, source: Tensor, lengths: list[int], readable=None, kept=None) -> Tensor:
        """anchor, source [N, D] -> [N, D].

        readable: [N] bool, False where the source's utterance may not be read. None: all may.
        kept: of Past.streams, what this stream has read before; the new keys and values are added to it.
        """
        k, v = self.key_value(source).chunk(2, dim=-1)
        if kept is not None and readable is None:
            readable = torch.ones(len(k), dtype=torch.bool, device=k.device)
        x = anchor + self.drop(self.out(self.attend(self.query(anchor), k, v, lengths, readable, kept)))
        return x + self.ffn(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], readable: Tensor | None, kept) -> Tensor:
        """Multi-head attention within each conversation by itself: [N, D] each -> [N, D]."""
        flags = [None] * len(lengths) if readable is None else readable.split(lengths)
        answers = []
        for b, (q_b, *new) in enumerate(zip(q.split(lengths), k.split(lengths), v.split(lengths), flags)):
            if kept is not None:  # the past goes before the new rows
                new = [torch.cat(pair) for pair in zip(kept[b], new)] if b < len(kept) else new
                kept[b : b + 1] = [new]
            answers.append(self.attend_one(q_b, *new))
        return torch.cat(answers)

    def attend_one(self, q: Tensor, k: Tensor, v: Tensor, readable: Tensor | None) -> Tensor:
        """q [U, D] reads k, v [T, D], T = U without a past; readable [T]. Returns [U, D].

        An utterance that may read nothing (a conversation without any sound) gets 0, not NaN.
        """
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, U, D/heads]
        U, T = q.shape[2], k.shape[2]
        may_read = None  # [U, T], or [1, T] for all alike
        if readable is not None:
            may_read = readable[None]
            if self.causal:  # the triangle begins where the past ends
                may_read = may_read & torch.ones(U, T, dtype=torch.bool, device=q.device).tril(T - U)
        answer = F.scaled_dot_product_attention(q, k, v, may_read, is_causal=self.causal and readable is None)
        return answer[0].transpose(0, 1).flatten(1)


class Anchor(nn.Module):
    """One anchor's gated streams (Eq. 19-22), merged into its enriched sequence."""

    def __init__(self, config: FusionConfig, name: str):
        super().__init__()
        D, sources, self.name = config.width, list(config.widths), name
        self.block = nn.ModuleDict({source: Block(config) for source in sources})
        self.gate = nn.ModuleDict({source: nn.Linear(D, D) for source in sources})
        self.merge = nn.Linear(len(sources) * D, D)  # the paper does not say how; concatenate and project

    def forward(self, anchor: Tensor, sources: dict[str, Tensor], lengths: list[int], present, past=None) -> Tensor:
        """anchor [N, D]; sources {modality: [N, D]}; present {modality: [N] bool}. Returns [N, D]."""
        streams = []
        for source, block in self.block.items():
            kept = None if past is None else past.streams[self.name, source]
            h = block(anchor, sources[source], lengths, present.get(source), kept)  # Eq. 19, 20
            streams.append(h * self.alpha(source, h))  # Eq. 22
        return self.merge(torch.cat(streams, dim=-1))

    def alpha(self, source: str, h: Tensor) -> Tensor:
        """Eq. 21: the gate of a stream, [N, D], from 0 (nothing of the answer passes) to 1 (all of it)."""
        return torch.sigmoid(self.gate[source](h))


class MAGT(nn.Module):
    """The Multi-modal Anchor Gated Transformer, Eq. 15-23."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        self.input = input_layers(config)
        self.speaker = speaker_embedding(config)
        self.anchor = nn.ModuleDict({m: Anchor(config, m) for m in config.widths})
        self.classifier = nn.ModuleDict({m: nn.Linear(config.width, config.num_classes) for m in config.widths})

    def forward(
        self,
        features: dict[str, Tensor],
        speakers: Tensor,
        lengths: list[int],
        present: dict[str, Tensor] | None = None,
        past: Past | None = None,
    ) -> FusionOutput:
        """Logits and enriched sequences of every modality.

        features: {modality: [N, d_m]}, all finite, whatever stands where a modality is missing.
        speakers: [N] int64; 0 for a speaker never seen in training.
        lengths: utterances of each conversation, B numbers with sum N.
        present: {modality: [N] bool}, False where an utterance lacks its sound or picture: there the feature counts as
            zero and is not read by other utterances. A modality without an entry is there throughout.
        past: what was said before; the conversations go on from there, and it is extended. For a causal model.
        Errors: ValueError for a modality too many or too few, or a shape that does not fit.
        """
        h, tags = self.tag(features, speakers, lengths, present, past)  # Eq. 15-18
        present = present or {}
        hidden = {m: self.anchor[m](h[m], h, lengths, present, past) for m in h if m != TEXT}
        hidden[TEXT] = self.anchor[TEXT](h[TEXT], {**hidden, TEXT: h[TEXT]}, lengths, present, past)  # t'
        return self.answer(hidden, lengths, past)

    def tag(self, features, speakers, lengths, present, past) -> tuple[dict[str, Tensor], Tensor]:
        """Eq. 18: H_m = F_m + PE + SE per modality, and PE + SE alone; [N, D] each."""
        if past is not None and not self.config.causal:
            raise ValueError("a past needs a model with causal=True: this one was trained to read the future")
        parts = read_inputs(self.input, self.config, features, speakers, lengths, present)
        starts = past.lengths if past is not None and past.lengths else [0] * len(lengths)
        if len(starts) != len(lengths):
            raise ValueError(f"the past is of {len(starts)} conversations, lengths is of {len(lengths)}")
        tags = positions_and_speakers(self.speaker, speakers, lengths, starts)  # Eq. 15-17
        return {m: x + tags for m, x in parts.items()}, tags

    def answer(self, hidden: dict[str, Tensor], lengths: list[int], past: Past | None) -> FusionOutput:
        """Eq. 23 before the softmax and the argmax, for every modality."""
        if past is not None:
            past.lengths = [n + before for n, before in zip(lengths, past.lengths or [0] * len(lengths))]
        return FusionOutput({m: self.classifier[m](x) for m, x in hidden.items()}, hidden)

    def step(self, past: Past, features: dict[str, Tensor], speakers: Tensor, present=None) -> FusionOutput:
        """The next utterance of B conversations: `forward` with a past and lengths of 1. past: Past() at first."""
        return self(features, speakers, [1] * len(speakers), present, past)


class Concat(nn.Module):
    """The baseline of Figure 3: one utterance at a time, with no view of its conversation.

    Per modality linear, LayerNorm, dropout; then one module with shared weights (linear, GELU, dropout: the paper does
    not say what is in it); concatenation; a linear classifier. Input and output as MAGT's, all of it under "text".
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        D, drop = config.width, Dropout(config.dropout)
        self.input = nn.ModuleDict(
            {m: nn.Sequential(nn.Linear(width, D), nn.LayerNorm(D), drop) for m, width in config.widths.items()}
        )
        self.shared = nn.Sequential(nn.Linear(D, D), nn.GELU(), drop)
        self.classifier = nn.Linear(len(config.widths) * D, config.num_classes)

    def forward(self, features: dict[str, Tensor], speakers, lengths: list[int], present=None) -> FusionOutput:
        """See MAGT.forward; the speakers are not used, and the lengths only checked."""
        layers = {m: nn.Sequential(layer, self.shared) for m, layer in self.input.items()}
        x = torch.cat(list(read_inputs(layers, self.config, features, speakers, lengths, present).values()), dim=-1)
        return FusionOutput({TEXT: self.classifier(x)}, {TEXT: x})  # x: [N, modalities * D]


def read_inputs(layers, config, features, speakers, lengths, present) -> dict[str, Tensor]:
    """Checks a model's inputs, and puts each modality through its layer; zero where missing. {modality: [N, D]}"""
    N, present = sum(lengths), present or {}
    if features.keys() != config.widths.keys():
        raise ValueError(f"the model was made for {sorted(config.widths)}, got features {sorted(features)}")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be numbers from 1, one per conversation, got {lengths}")
    if speakers.shape != (N,):
        raise ValueError(f"speakers must be [{N}], the sum of lengths, got {list(speakers.shape)}")
    for m, width in config.widths.items():
        if features[m].shape != (N, width):
            raise ValueError(f"{m} features must be {[N, width]}, got {list(features[m].shape)}")
        if m in present and (present[m].shape != (N,) or present[m].dtype != torch.bool):
            raise ValueError(f"present[{m!r}] must be bool [{N}], got {present[m].dtype} {list(present[m].shape)}")
    parts = {m: layers[m](features[m]) for m in config.widths}  # in the order of widths, whatever features' order
    return {m: x * present[m][:, None] if m in present else x for m, x in parts.items()}


def input_layers(config: FusionConfig) -> nn.ModuleDict:
    """Per modality: F_m as it comes, or through a linear layer where d_m is not D; then the LayerNorm."""

    def layer(width: int) -> nn.Module:
        linear = nn.Identity() if width == config.width else nn.Linear(width, config.width)
        return nn.Sequential(linear, nn.LayerNorm(config.width)) if config.input_norm else linear

    return nn.ModuleDict({m: layer(width) for m, width in config.widths.items()})


def speaker_embedding(config: FusionConfig) -> nn.Embedding:
    """Eq. 17. Row 0, a speaker never seen in training, is always zero; the others begin near it."""
    embedding = nn.Embedding(config.num_speakers + 1, config.width, padding_idx=0)
    with torch.no_grad():
        embedding.weight *= 0.02
    return embedding


def positions_and_speakers(embedding: nn.Embedding, speakers: Tensor, lengths: list[int], starts: list[int]) -> Tensor:
    """PE + SE of the utterances, [N, D]: Eq. 15-17. The first utterance of conversation b has position starts[b]."""
    ends = [start + length for start, length in zip(starts, lengths)]
    table = sinusoidal_positions(max(ends), embedding.embedding_dim, speakers.device)
    return torch.cat([table[start:end] for start, end in zip(starts, ends)]) + embedding(speakers)


def sinusoidal_positions(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Eq. 15, 16: PE(p, 2i) = sin(p / 10000^(2i / width)), PE(p, 2i + 1) = cos(the same), p from 0. [length, width]"""
    frequency = 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * frequency  # [length, width / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)  # interleaved
