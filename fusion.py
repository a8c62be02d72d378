"""Stage 2's models: the Multi-modal Anchor Gated Transformer (MAGT, Eq. 15-23) and the baseline Concat (Figure 3).

    config = FusionConfig(widths={"text": 768, "audio": 768, "video": 768}, num_classes=6, num_speakers=2)
    logits, hidden, gates = MAGT(config)(features, speakers, lengths)  # copy this file: it needs torch only

Why utterances and not frames. Stage 1 leaves one feature (a vector) per utterance and modality. Attention over the U
utterances of a conversation then costs U^2, whatever the length of the recordings; attention over L frames of each
utterance costs L^2 for each, and sees no other utterance. An emotion depends on what was said before.

Why anchors and gates. In MAGT every modality is the anchor once: its utterances are the queries, those of a source
modality are keys and values, and the result stays in the anchor's sequence. A gate per stream (source -> anchor)
decides how much of that result is kept: noisy video must not overrule clear text. Audio and video are anchors
first. Text, the strongest modality, comes last: it attends to itself and to the two enriched sequences, and predicts.

Shapes: B conversations in a batch; N utterances in all of them, one conversation after the other; U utterances in one
conversation; d_m width of a feature; D width of the model; C classes. There is no padding. From padded data [B, U, d_m]
with a mask [B, U], True at utterances: features = x[mask], lengths = mask.sum(1).tolist().
"""

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
    num_speakers: int  # speakers are 1 .. num_speakers; 0 is a speaker that training never saw
    width: int = 768  # D
    heads: int = 8
    dropout: float = 0.5  # Concat has its own
    # Eq. 18 adds positions and speakers to F_m. Features of length 1, for example sentence embeddings, would vanish
    # beside them. A LayerNorm on F_m makes the model independent of the scale of its input.
    input_norm: bool = True
    causal: bool = False  # an utterance attends to itself and the past, never to the future

    def __post_init__(self):
        if TEXT not in self.widths:
            raise ValueError(f"widths needs an entry for {TEXT!r}, the last anchor; got {sorted(self.widths)}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and divide by heads, got width {self.width}, heads {self.heads}")
        if self.num_classes < 2 or self.num_speakers < 1:
            raise ValueError(f"need 2 classes and 1 speaker at least, got {self.num_classes} and {self.num_speakers}")


class FusionOutput(NamedTuple):
    """`logits["text"]` is the model's prediction; the other modalities exist for Eq. 24."""

    logits: dict[str, Tensor]  # modality -> [N, C]
    hidden: dict[str, Tensor]  # modality -> [N, D], the enriched sequences
    gates: dict[str, dict[str, Tensor]]  # anchor -> source -> [N, D], Eq. 21; empty for a model without gates


class Block(nn.Module):
    """Transformer(Q, K, V) of Eq. 19 and 20: the anchor's utterances are the query, the source's are key and value.

    The paper does not draw it: x = q + MHA(q, kv, kv), then x + FFN(LayerNorm(x)).
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        D = config.width
        self.config, self.heads = config, config.heads
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, D)
        self.drop = nn.Dropout(config.dropout)
        self.ffn = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), self.drop, nn.Linear(D, D), self.drop)

    def forward(self, anchor: Tensor, source: Tensor, lengths: list[int], present: Tensor | None = None) -> Tensor:
        """anchor, source [N, D] -> [N, D].

        present: [N] bool, False where the source lacks the utterance: it is masked as a key. None: all are present.
        """
        q, (k, v) = self.query(anchor), self.key_value(source).chunk(2, dim=-1)
        x = anchor + self.drop(self.out(self.attend(q, k, v, lengths, present)))
        return x + self.ffn(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], present: Tensor | None) -> Tensor:
        """Multi-head attention within each conversation: [N, D] each -> [N, D]."""
        masks = [None] * len(lengths) if present is None else present.split(lengths)
        conversations = zip(q.split(lengths), k.split(lengths), v.split(lengths), masks)
        return torch.cat([self.attend_one(*conversation) for conversation in conversations])

    def attend_one(self, q: Tensor, k: Tensor, v: Tensor, present: Tensor | None) -> Tensor:
        """One conversation: q [U, D], k and v [U, D], present [U] -> [U, D].

        A query without any key (a conversation without audio) gets 0, not NaN.
        """
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, U, D/heads]
        mask = None if present is None else present[None]  # [1, U] for all queries alike, or [U, U]
        if self.config.causal:
            past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = past if mask is None else mask & past
        x = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.attention_dropout())
        return x[0].transpose(0, 1).flatten(1)

    def attention_dropout(self) -> float:
        """Dropout on the attention weights: none here; the released code has it (extras/variants.py)."""
        return 0.0


class Anchor(nn.Module):
    """One anchor's gated streams (Eq. 19-22), merged into its enriched sequence."""

    block_class = Block

    def __init__(self, config: FusionConfig, name: str):
        super().__init__()
        D, sources, self.name = config.width, list(config.widths), name
        self.block = nn.ModuleDict({source: self.block_class(config) for source in sources})
        self.gate = nn.ModuleDict({source: nn.Linear(D, D) for source in sources})
        self.merge = nn.Linear(len(sources) * D, D)  # the paper does not say how; concatenate and project

    def forward(
        self, anchor: Tensor, sources: dict[str, Tensor], lengths: list[int], present: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """anchor [N, D]; sources {modality: [N, D]}; present {modality: [N] bool}.

        Returns the enriched sequence [N, D] and the gates {source: [N, D]}.
        """
        streams, gates = [], {}
        for source in self.block:
            h = self.stream(source, anchor, sources[source], lengths, present.get(source))  # Eq. 19, 20
            gates[source] = self.alpha(source, h)  # Eq. 21
            streams.append(h * gates[source])  # Eq. 22
        return self.merge(torch.cat(streams, dim=-1)), gates

    def stream(self, source: str, anchor: Tensor, x: Tensor, lengths: list[int], present: Tensor | None) -> Tensor:
        """Eq. 19, 20: H_{source->anchor}, [N, D], before its gate. x: the source's sequence, [N, D]."""
        return self.block[source](anchor, x, lengths, present)

    def alpha(self, source: str, h: Tensor) -> Tensor:
        """Eq. 21: sigmoid(W h + b), [N, D], the gate of stream h: from 0 (nothing of it is kept) to 1 (all of it)."""
        return torch.sigmoid(self.gate[source](h))


class MAGT(nn.Module):
    """The Multi-modal Anchor Gated Transformer, Eq. 15-23."""

    anchor_class = Anchor

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        self.input = input_layers(config)
        self.speaker = speaker_embedding(config)
        self.anchor = nn.ModuleDict({m: self.anchor_class(config, m) for m in config.widths})
        self.classifier = nn.ModuleDict({m: nn.Linear(config.width, config.num_classes) for m in config.widths})

    def forward(
        self,
        features: dict[str, Tensor],
        speakers: Tensor,
        lengths: list[int],
        present: dict[str, Tensor] | None = None,
    ) -> FusionOutput:
        """Logits, enriched sequences and gates of every modality.

        features: {modality: [N, d_m]}, all finite, whatever stands where a modality is missing.
        speakers: [N] int64; 0 for a speaker that training never saw.
        lengths: utterances of each conversation, B numbers with sum N.
        present: {modality: [N] bool}, False where an utterance lacks its audio or video: the feature counts as zero
            there, and is masked as a key. A modality without an entry is complete.
        Errors: ValueError for a modality too many or too few, or a shape that does not fit.
        """
        present = present or {}
        h = self.inputs(features, speakers, lengths, present)  # Eq. 15-18
        hidden, gates = {}, {}
        for m in h:
            if m != TEXT:
                hidden[m], gates[m] = self.anchor[m](h[m], h, lengths, present)
        sources = {**self.enriched(hidden, speakers, lengths), TEXT: h[TEXT]}
        hidden[TEXT], gates[TEXT] = self.anchor[TEXT](h[TEXT], sources, lengths, present)  # t'
        logits = {m: self.classifier[m](x) for m, x in hidden.items()}  # Eq. 23, before softmax and argmax
        return FusionOutput(logits, hidden, gates)

    def inputs(self, features, speakers, lengths, present) -> dict[str, Tensor]:
        """Eq. 18: H_m = F_m + PE + SE, {modality: [N, D]}. Arguments as in `forward`."""
        parts = read_inputs(self.input, self.config, features, speakers, lengths, present)
        added = positions_and_speakers(self.speaker, speakers, lengths)  # Eq. 15-17
        return {m: x + added for m, x in parts.items()}

    def enriched(self, hidden: dict[str, Tensor], speakers: Tensor, lengths: list[int]) -> dict[str, Tensor]:
        """What the text anchor attends to: the enriched audio and video as they are."""
        return hidden


class Concat(nn.Module):
    """The baseline of Figure 3: each utterance separately, without its conversation.

    Per modality linear, LayerNorm, dropout; then one module with shared weights; concatenation; a linear classifier.
    Where the figure is silent, as the released code: the shared module is d -> 3d -> d with ReLU, a layer with ReLU
    brings the concatenation to d, and dropout is 0.1. Input and output as MAGT's, all of it under "text", no gates.
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        D, drop = config.width, nn.Dropout(0.1)
        self.input = nn.ModuleDict(
            {m: nn.Sequential(nn.Linear(width, D), nn.LayerNorm(D), drop) for m, width in config.widths.items()}
        )
        self.shared = nn.Sequential(nn.Linear(D, 3 * D), nn.ReLU(), drop, nn.Linear(3 * D, D))
        self.merge = nn.Sequential(nn.Linear(len(config.widths) * D, D), nn.ReLU(), drop)
        self.classifier = nn.Linear(D, config.num_classes)

    def forward(self, features: dict[str, Tensor], speakers, lengths: list[int], present=None) -> FusionOutput:
        """See MAGT.forward; the speakers are not used, and the lengths only checked."""
        layers = {m: nn.Sequential(layer, self.shared) for m, layer in self.input.items()}
        parts = read_inputs(layers, self.config, features, speakers, lengths, present or {})
        x = self.merge(torch.cat(list(parts.values()), dim=-1))  # [N, D]
        return FusionOutput({TEXT: self.classifier(x)}, {TEXT: x}, {})


def read_inputs(layers, config, features, speakers, lengths, present) -> dict[str, Tensor]:
    """Checks a model's inputs, and applies each modality's layer; zero where missing. {modality: [N, D]}"""
    N = sum(lengths)
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
    """Per modality: a linear layer where d_m is not D, then the LayerNorm."""

    def layer(width: int) -> nn.Module:
        linear = nn.Identity() if width == config.width else nn.Linear(width, config.width)
        return nn.Sequential(linear, nn.LayerNorm(config.width)) if config.input_norm else linear

    return nn.ModuleDict({m: layer(width) for m, width in config.widths.items()})


def speaker_embedding(config: FusionConfig) -> nn.Embedding:
    """Eq. 17. Row 0, a speaker that training never saw, is always zero; the others start near zero."""
    embedding = nn.Embedding(config.num_speakers + 1, config.width, padding_idx=0)
    with torch.no_grad():
        embedding.weight *= 0.02
    return embedding


def positions_and_speakers(embedding: nn.Embedding, speakers: Tensor, lengths: list[int]) -> Tensor:
    """PE + SE, [N, D]: Eq. 15-17. The first utterance of a conversation has position 0."""
    table = sinusoidal_positions(max(lengths), embedding.embedding_dim, speakers.device)
    positions = torch.cat([table[:length] for length in lengths])
    return positions.to(embedding.weight.dtype) + embedding(speakers)


def sinusoidal_positions(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Eq. 15, 16: PE(p, 2i) = sin(p / 10000^(2i / width)), PE(p, 2i + 1) = cos(the same), p from 0. [length, width]"""
    frequency = 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * frequency  # [length, width / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)  # interleaved
