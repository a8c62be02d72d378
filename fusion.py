"""Stage 2: the Multi-modal Anchor Gated Transformer (MAGT, Eq. 15-23) and the paper's baseline, Concat (Figure 3).

    config = FusionConfig(widths={"text": 768, "audio": 768, "video": 768}, num_classes=6, num_speakers=2)
    logits, hidden = MAGT(config)(features, speakers, mask)      # copy this file: it needs torch and nothing else

A conversation is U utterances, each one vector per modality. Every modality in turn is the anchor: its utterances ask
(query) and those of a source answer (key, value); a gate decides how much of each answer passes. Audio and video are
anchors first; text, the strongest, comes last, and listens to itself and to the two enriched sequences.

Shapes: B conversations, U utterances in the longest of them, D width, C classes. Not here: losses, training, and the
encoders that make the vectors.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT = "text"  # the last anchor; its logits are the prediction


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of MAGT and Concat. A modality without an entry in `widths` has no part in the model; text needs one."""

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
    """nn.Dropout, with one random byte per element on a CPU: there torch's own masks took a fifth of a training step.

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


class Block(nn.Module):
    """Transformer(Q, K, V) of Eq. 19-20: the anchor's utterances (query) read the source's (key and value)."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.query = nn.Linear(D, D)
        self.key_value = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, D)
        self.drop = Dropout(config.dropout)
        self.ffn = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), self.drop, nn.Linear(D, D), self.drop)

    def forward(self, anchor: Tensor, source: Tensor, key_mask: Tensor) -> Tensor:
        """anchor, source [B, U, D]; key_mask [B, U], True where the source may be read. Returns [B, U, D]."""
        q = self._split(self.query(anchor))  # [B, heads, U, D / heads]
        k, v = map(self._split, self.key_value(source).chunk(2, dim=-1))
        # A row without any key (a conversation whose sound is missing throughout) gives 0, not NaN.
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask[:, None, None, :])
        x = anchor + self.drop(self.out(read.transpose(1, 2).flatten(2)))
        return x + self.ffn(x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, U, D] -> [B, heads, U, D / heads]


class Anchor(nn.Module):
    """One anchor and its gated streams (Eq. 19-22), merged: the anchor's enriched sequence."""

    def __init__(self, config: FusionConfig, sources: list[str], shared: bool = False):
        super().__init__()
        D = config.width
        self.relu_gate = config.relu_gate
        if shared:  # the same modules under every key
            blocks, gates = [Block(config)] * len(sources), [nn.Linear(D, D)] * len(sources)
        else:
            blocks, gates = [Block(config) for _ in sources], [nn.Linear(D, D) for _ in sources]
        self.block = nn.ModuleDict(zip(sources, blocks))
        self.gate = nn.ModuleDict(zip(sources, gates))
        self.merge = nn.Linear(len(sources) * D, D)  # the paper does not say how; concatenate and project

    def forward(self, anchor: Tensor, sources: dict[str, Tensor], key_masks: dict[str, Tensor]) -> Tensor:
        """anchor [B, U, D]; sources {name: [B, U, D]}; key_masks {name: [B, U]}. Returns [B, U, D]."""
        streams = []
        for name, block in self.block.items():
            h = block(anchor, sources[name], key_masks[name])  # Eq. 19, 20
            gate = self.gate[name](h)
            alpha = torch.sigmoid(F.relu(gate) if self.relu_gate else gate)  # Eq. 21
            streams.append(h * alpha)  # Eq. 22
        return self.merge(torch.cat(streams, dim=-1))


class MAGT(nn.Module):
    """The Multi-modal Anchor Gated Transformer, Eq. 15-23."""

    def __init__(self, config: FusionConfig):
        super().__init__()
        self.config = config
        D, modalities = config.width, list(config.widths)
        self.input = nn.ModuleDict({m: self._input(width) for m, width in config.widths.items()})
        self.speaker = nn.Embedding(config.num_speakers + 1, D, padding_idx=0)  # row 0, always zero: speaker -1
        with torch.no_grad():
            self.speaker.weight *= 0.02  # near that zero: an unknown speaker is then nothing strange
        self.anchor = nn.ModuleDict(
            {m: Anchor(config, modalities, shared=config.shared_text_anchor and m == TEXT) for m in modalities}
        )
        self.classifier = nn.ModuleDict({m: nn.Linear(D, config.num_classes) for m in modalities})

    def _input(self, width: int) -> nn.Module:
        """F_m as it comes, or through a linear layer where its width is not D; then the LayerNorm."""
        linear = nn.Identity() if width == self.config.width else nn.Linear(width, self.config.width)
        return nn.Sequential(linear, nn.LayerNorm(self.config.width)) if self.config.input_norm else linear

    def forward(
        self,
        features: dict[str, Tensor],
        speakers: Tensor,
        mask: Tensor,
        present: dict[str, Tensor] | None = None,
    ) -> FusionOutput:
        """Logits and enriched sequences of every modality.

        features: {modality: [B, U, d_m]}, all finite, whatever stands at missing places.
        speakers: [B, U] int64; -1 for a speaker never seen in training, and at padding.
        mask: [B, U] bool, True at utterances, False at padding; each conversation has an utterance.
        present: {modality: [B, U] bool}, False where an utterance lacks its sound or picture: there the feature counts
            as zero and is not read by others. Default: nothing lacks.
        Errors: ValueError for a modality too many or too few, or a shape that does not fit.
        """
        masks = check_inputs(self.config, features, mask, present, speakers)
        positions = sinusoidal_positions(mask.shape[1], self.config.width, mask.device)
        tags = positions + self.speaker(speakers + 1)  # PE + SE, [B, U, D]
        h = {m: self.input[m](features[m]) * masks[m].unsqueeze(-1) + tags for m in features}  # Eq. 18

        hidden = {m: self.anchor[m](h[m], h, masks) for m in h if m != TEXT}
        enriched = {m: x + tags for m, x in hidden.items()} if self.config.tags_twice else hidden
        hidden[TEXT] = self.anchor[TEXT](h[TEXT], {**enriched, TEXT: h[TEXT]}, masks)  # t'
        return FusionOutput({m: self.classifier[m](x) for m, x in hidden.items()}, hidden)  # Eq. 23 before the argmax


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

    def forward(
        self, features: dict[str, Tensor], speakers: Tensor, mask: Tensor, present: dict[str, Tensor] | None = None
    ) -> FusionOutput:
        """See MAGT.forward; the speakers are not used."""
        masks = check_inputs(self.config, features, mask, present, speakers)
        parts = [self.shared(layer(features[m])) * masks[m].unsqueeze(-1) for m, layer in self.input.items()]
        x = torch.cat(parts, dim=-1)  # [B, U, modalities * D]
        return FusionOutput({TEXT: self.classifier(x)}, {TEXT: x})


def sinusoidal_positions(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Eq. 15, 16: PE(p, 2i) = sin(p / 10000^(2i / width)), PE(p, 2i + 1) = cos(the same), p from 0. [length, width]."""
    frequency = 10000 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(length, device=device)[:, None] * frequency  # [length, width / 2]
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
