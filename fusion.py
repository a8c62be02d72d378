"""Stage 2: the Multi-modal Anchor Gated Transformer (MAGT, Eq. 15-23), the paper's baseline Concat (Figure 3), and
Context, a baseline of our own that sees the conversation but has no anchors and no gates.

    config = FusionConfig(widths={"text": 768, "audio": 768, "video": 768}, num_classes=6, num_speakers=2)
    logits, hidden = MAGT(config)(features, speakers, mask)      # copy this file: it needs torch and nothing else

A conversation is U utterances, each one vector per modality. Every modality in turn is the anchor: its utterances ask
(query) and those of a source answer (key, value); a gate decides how much of each answer passes. Audio and video are
anchors first; text, the strongest, comes last, and listens to itself and to the two enriched sequences.

A causal MAGT reads the past and the present alone, and takes a conversation as it happens: `MAGT.step`.

Shapes: B conversations, U utterances in the longest of them, N in all of them, D width, C classes. Inside, all layers
but attention work on [N, D]: no time goes into padding. Not here: losses, training, and the encoders that make the
vectors.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT = "text"  # the last anchor; its logits are the prediction


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of a fusion model. A modality without an entry in `widths` has no part in the model; text needs one."""

    widths: dict[str, int]  # modality -> width d_m of its features
    num_classes: int  # C
    num_speakers: int  # speakers are 0 .. num_speakers - 1, and -1
    width: int = 768  # D
    heads: int = 8
    dropout: float = 0.5
    # Eq. 18 adds F_m to positions and speakers. Vectors of unit length, say sentence embeddings, would drown in them:
    # a LayerNorm first makes MAGT indifferent to the scale of its input.
    input_norm: bool = True
    # What the authors' released code does differently from the paper's text: RELEASED below.
    shared_text_anchor: bool = False  # the text anchor's streams share one block and one gate
    relu_gate: bool = False  # a ReLU inside the gate, which is then never below 0.5
    tags_twice: bool = False  # positions and speakers are added once more to the enriched sequences
    causal: bool = False  # an utterance reads itself and the past, never the future

    def __post_init__(self):
        if TEXT not in self.widths:
            raise ValueError(f"widths needs an entry for {TEXT!r}, the last anchor; got {sorted(self.widths)}")
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and divide by heads, got width {self.width}, heads {self.heads}")
        if self.num_classes < 2 or self.num_speakers < 1:
            raise ValueError(f"need 2 classes and 1 speaker at least, got {self.num_classes} and {self.num_speakers}")


RELEASED = {"input_norm": False, "shared_text_anchor": True, "relu_gate": True, "tags_twice": True}


class FusionOutput(NamedTuple):
    """Per modality. `logits["text"]` is the model's prediction; the others exist for the losses (Eq. 24)."""

    logits: dict[str, Tensor]  # modality -> [B, U, C]
    hidden: dict[str, Tensor]  # modality -> [B, U, D]


class Dropout(nn.Module):
    """nn.Dropout, with one random byte per element on a CPU: there torch's own masks took a tenth of a training step.

    p is rounded to a multiple of 1/256.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training or not self.p:
            return F.dropout(x, self.p, self.training)
        eights = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        keep = eights.view(torch.uint8)[: x.numel()].view(x.shape) >= round(256 * self.p)
        return x * keep / (1 - round(256 * self.p) / 256)


class Packing:
    """The N utterances of a batch in a row, [N, ..], and back to their places in the padded batch, [B, U, ..].

    places: [N] int64, where in mask.flatten() the utterances stand, which is not checked. If it is not given they are
    looked up, for which the CPU waits for the GPU.
    """

    def __init__(self, mask: Tensor, places: Tensor | None = None):
        self.shape = mask.shape
        if places is not None and (places.dim() != 1 or len(places) > mask.numel()):
            raise ValueError(
                f"places must be [N] for N utterances of mask {list(mask.shape)}, got {list(places.shape)}"
            )
        places = mask.flatten().nonzero().squeeze(1) if places is None else places
        self.places = places if len(places) < mask.numel() else None  # None: nothing is padded

    def pack(self, x: Tensor) -> Tensor:
        """[B, U, ..] -> [N, ..]"""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def pad(self, x: Tensor) -> Tensor:
        """[N, D] -> [B, U, D], zero at padding."""
        if self.places is not None:
            x = x.new_zeros(self.shape.numel(), x.shape[1]).index_copy(0, self.places, x)
        return x.unflatten(0, self.shape)


class Past:
    """What a causal MAGT has read of B conversations so far: the keys and values of every stream. Empty at first."""

    def __init__(self):
        self.length = 0  # utterances
        self._streams: dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]] = {}

    def extend(self, stream: tuple[str, str], k: Tensor, v: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Appends one utterance to a stream (anchor, source); returns all of it so far.

        k, v: [B, heads, 1, D / heads] in, [B, heads, U, D / heads] out; key_mask: [B, 1] in, [B, U] out.
        """
        if stream in self._streams:
            before = self._streams[stream]
            k, v, key_mask = (torch.cat(pair, dim=d) for pair, d in zip(zip(before, (k, v, key_mask)), (2, 2, 1)))
        self._streams[stream] = k, v, key_mask
        return k, v, key_mask


class Block(nn.Module):
    """Transformer(Q, K, V) of Eq. 19-20: the anchor's utterances (query) read the source's (key and value)."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        D = config.width
        self.heads, self.causal = config.heads, config.causal
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, D)
        self.drop = Dropout(config.dropout)
        self.ffn = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), self.drop, nn.Linear(D, D), self.drop)

    def forward(
        self,
        anchor: Tensor,
        source: Tensor,
        key_mask: Tensor,
        packing: Packing,
        past: Past | None = None,
        stream: tuple[str, str] = (TEXT, TEXT),
    ) -> Tensor:
        """anchor, source [N, D]; key_mask [B, U], True where the source may be read. Returns [N, D].

        past: U is 1, and this utterance reads what `stream` has kept there, too.
        """
        q = self._split(packing.pad(self.query(anchor)))  # [B, heads, U, D / heads]
        k, v = map(self._split, packing.pad(self.key_value(source)).chunk(2, dim=-1))
        if past is not None:
            k, v, key_mask = past.extend(stream, k, v, key_mask)
        may_read = key_mask[:, None, None, :]  # [B, 1, 1, U]
        if self.causal and past is None:
            U = key_mask.shape[1]
            may_read = may_read & torch.ones(U, U, dtype=torch.bool, device=key_mask.device).tril()  # [B, 1, U, U]
        # A row without any key (a conversation whose sound is missing throughout) gives 0, not NaN.
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=may_read)
        x = anchor + self.drop(self.out(packing.pack(read.transpose(1, 2).flatten(2))))
        return x + self.ffn(x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, U, D] -> [B, heads, U, D / heads]


class Anchor(nn.Module):
    """One anchor and its gated streams (Eq. 19-22), merged: the anchor's enriched sequence."""

    def __init__(self, config: FusionConfig, sources: list[str], shared: bool = False, name: str = TEXT):
        super().__init__()
        D, self.name = config.width, name
        self.relu_gate = config.relu_gate
        if shared:  # the same modules under every key
            blocks, gates = [Block(config)] * len(sources), [nn.Linear(D, D)] * len(sources)
        else:
            blocks, gates = [Block(config) for _ in sources], [nn.Linear(D, D) for _ in sources]
        self.block = nn.ModuleDict(zip(sources, blocks))
        self.gate = nn.ModuleDict(zip(sources, gates))
        self.merge = nn.Linear(len(sources) * D, D)  # the paper does not say how; concatenate and project

    def forward(
        self,
        anchor: Tensor,
        sources: dict[str, Tensor],
        key_masks: dict[str, Tensor],
        packing: Packing,
        past: Past | None = None,
    ) -> Tensor:
        """anchor [N, D]; sources {name: [N, D]}; key_masks {name: [B, U]}. Returns [N, D]."""
        streams = []
        for name, block in self.block.items():
            h = block(anchor, sources[name], key_masks[name], packing, past, (self.name, name))  # Eq. 19, 20
            gate = self.gate[name](h)
            alpha = torch.sigmoid(F.relu(gate) if self.relu_gate else gate)  # Eq. 21
            streams.append(h * alpha)  # Eq. 22
        return self.merge(torch.cat(streams, dim=-1))


class MAGT(nn.Module):
    """The Multi-modal Anchor Gated Transformer, Eq. 15-23."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        modalities = list(config.widths)
        self.input = input_layers(config)
        self.speaker = speaker_embedding(config)
        self.anchor = nn.ModuleDict(
            {m: Anchor(config, modalities, config.shared_text_anchor and m == TEXT, m) for m in modalities}
        )
        self.classifier = nn.ModuleDict({m: nn.Linear(config.width, config.num_classes) for m in modalities})

    def forward(
        self,
        features: dict[str, Tensor],
        speakers: Tensor,
        mask: Tensor,
        present: dict[str, Tensor] | None = None,
        places: Tensor | None = None,
        past: Past | None = None,
    ) -> FusionOutput:
        """Logits and enriched sequences of every modality, zero at padding.

        features: {modality: [B, U, d_m]}, all finite, whatever stands at missing places.
        speakers: [B, U] int64; -1 for a speaker never seen in training, and at padding.
        mask: [B, U] bool, True at utterances, False at padding; each conversation has an utterance.
        present: {modality: [B, U] bool}, False where an utterance lacks its sound or picture: there the feature counts
            as zero and is not read by others. Default: nothing lacks.
        places: see Packing; given, nothing waits for the GPU, and a CUDA graph can be captured.
        past: for `step`, which is the way to use it.
        Errors: ValueError for a modality too many or too few, or a shape that does not fit.
        """
        masks = check_inputs(self.config, features, mask, present, speakers)
        packing = Packing(mask, places)
        tags = position_and_speaker(self.speaker, speakers, packing, 0 if past is None else past.length)
        parts = {m: self.input[m](packing.pack(features[m])) * packing.pack(masks[m])[:, None] for m in features}
        h = {m: x + tags for m, x in parts.items()}  # Eq. 18

        hidden = {m: self.anchor[m](h[m], h, masks, packing, past) for m in h if m != TEXT}
        enriched = {m: x + tags for m, x in hidden.items()} if self.config.tags_twice else hidden
        hidden[TEXT] = self.anchor[TEXT](h[TEXT], {**enriched, TEXT: h[TEXT]}, masks, packing, past)  # t'
        logits = {m: packing.pad(self.classifier[m](x)) for m, x in hidden.items()}  # Eq. 23 before the argmax
        return FusionOutput(logits, {m: packing.pad(x) for m, x in hidden.items()})

    def step(
        self, past: Past, features: dict[str, Tensor], speakers: Tensor, present: dict[str, Tensor] | None = None
    ) -> FusionOutput:
        """The next utterance of B conversations, of a causal model: what `forward` says of it in the whole.

        past: Past() at the first utterance; holds this one too afterwards. Cost and size are linear in its length.
        features: {modality: [B, d_m]}; speakers: [B]; present: {modality: [B]}. Returns [B, C] and [B, D].
        Errors: ValueError for a model that is not causal, and as `forward`.
        """
        if not self.config.causal:
            raise ValueError("step needs a model with causal=True: this one was trained to read the future")
        mask = torch.ones_like(speakers, dtype=torch.bool).unsqueeze(1)
        places = torch.arange(len(speakers), device=speakers.device)  # everywhere
        at = {m: x.unsqueeze(1) for m, x in (present or {}).items()}
        out = self({m: x.unsqueeze(1) for m, x in features.items()}, speakers.unsqueeze(1), mask, at, places, past)
        past.length += 1
        return FusionOutput(*({m: x.squeeze(1) for m, x in part.items()} for part in out))


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

    def forward(self, features: dict[str, Tensor], speakers, mask, present=None, places=None) -> FusionOutput:
        """See MAGT.forward; the speakers are not used."""
        masks = check_inputs(self.config, features, mask, present, speakers)
        packing = Packing(mask, places)
        inputs = {m: layer(packing.pack(features[m])) for m, layer in self.input.items()}
        parts = [self.shared(x) * packing.pack(masks[m])[:, None] for m, x in inputs.items()]
        x = torch.cat(parts, dim=-1)  # [N, modalities * D]
        return FusionOutput({TEXT: packing.pad(self.classifier(x))}, {TEXT: packing.pad(x)})


class Context(nn.Module):
    """A baseline of our own: one transformer block over the conversation, each utterance's vectors put side by side.

    The same inputs, positions, speakers and block as MAGT's, and neither anchors nor gates: between Concat, which sees
    one utterance, and MAGT it tells what context brings from what anchors and gates bring. Input and output as MAGT's,
    all of it under "text".
    """

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        self.input = input_layers(config)
        self.speaker = speaker_embedding(config)
        self.merge = nn.Linear(len(config.widths) * config.width, config.width)
        self.block = Block(config)
        self.classifier = nn.Linear(config.width, config.num_classes)

    def forward(self, features: dict[str, Tensor], speakers, mask, present=None, places=None) -> FusionOutput:
        """See MAGT.forward."""
        masks = check_inputs(self.config, features, mask, present, speakers)
        packing = Packing(mask, places)
        parts = [layer(packing.pack(features[m])) * packing.pack(masks[m])[:, None] for m, layer in self.input.items()]
        tags = position_and_speaker(self.speaker, speakers, packing)
        h = self.merge(torch.cat(parts, dim=-1)) + tags  # [N, D]
        x = self.block(h, h, mask, packing)
        return FusionOutput({TEXT: packing.pad(self.classifier(x))}, {TEXT: packing.pad(x)})


def input_layers(config: FusionConfig) -> nn.ModuleDict:
    """Per modality: F_m as it comes, or through a linear layer where its width is not D; then the LayerNorm."""

    def layer(width: int) -> nn.Module:
        linear = nn.Identity() if width == config.width else nn.Linear(width, config.width)
        return nn.Sequential(linear, nn.LayerNorm(config.width)) if config.input_norm else linear

    return nn.ModuleDict({m: layer(width) for m, width in config.widths.items()})


def position_and_speaker(embedding: nn.Embedding, speakers: Tensor, packing: Packing, start: int = 0) -> Tensor:
    """PE + SE of the utterances, [N, D]: Eq. 15-17; the first utterance stands at position `start`."""
    B, U = packing.shape
    positions = sinusoidal_positions(U, embedding.embedding_dim, speakers.device, start)
    return packing.pack(positions.expand(B, -1, -1)) + embedding(packing.pack(speakers) + 1)


def speaker_embedding(config: FusionConfig) -> nn.Embedding:
    """Eq. 17. Row 0 is speaker -1 and always zero; the others begin near it: an unknown one is then nothing strange."""
    embedding = nn.Embedding(config.num_speakers + 1, config.width, padding_idx=0)
    with torch.no_grad():
        embedding.weight *= 0.02
    return embedding


def sinusoidal_positions(length: int, width: int, device: torch.device | None = None, start: int = 0) -> Tensor:
    """Eq. 15, 16: PE(p, 2i) = sin(p / 10000^(2i / width)), PE(p, 2i + 1) = cos(the same), p from `start`.

    Returns [length, width].
    """
    frequency = 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(start, start + length, device=device)[:, None] * frequency  # [length, width / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)  # interleaved


def check_inputs(
    config: FusionConfig, features: dict[str, Tensor], mask: Tensor, present: dict[str, Tensor] | None, speakers: Tensor
) -> dict[str, Tensor]:
    """Checks the shapes of a model's inputs; returns, per modality, where it has something to read: [B, U] bool."""
    if features.keys() != config.widths.keys():
        raise ValueError(f"the model was made for {sorted(config.widths)}, got features {sorted(features)}")
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool [B, U], got {mask.dtype} {list(mask.shape)}")
    if speakers.shape != mask.shape:
        raise ValueError(f"speakers must be {list(mask.shape)} like mask, got {list(speakers.shape)}")
    present = present or {}
    for m, width in config.widths.items():
        if features[m].shape != (*mask.shape, width):
            raise ValueError(f"{m} features must be {[*mask.shape, width]}, got {list(features[m].shape)}")
        if m in present and present[m].shape != mask.shape:
            raise ValueError(f"present[{m!r}] must be {list(mask.shape)} like mask, got {list(present[m].shape)}")
    return {m: mask & present[m] if m in present else mask for m in features}
