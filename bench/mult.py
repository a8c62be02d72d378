"""MulT, the frame-level baseline: Tsai et al., "Multimodal Transformer for Unaligned Multimodal Language Sequences".

Every utterance is three sequences of frames. For each target modality there is a cross-modal encoder per source: the
target's frames are the query, the source's are key and value. A self-attention encoder (the memory) runs over the two
results, concatenated; the last frames of the three memories are the utterance's feature. No utterance sees another one.

Attention is F.scaled_dot_product_attention, as in MAGT, so that kernels do not decide the comparison. All utterances of
a call have the same lengths; there is no padding. The structure maps one to one to the authors' code (l, a, v):

    project[m]                        proj_{m}, a 1x1 Conv1d      in_proj       self_attn.in_proj_{weight,bias}
    cross["t<-s"]                     trans_{t}_with_{s}          out_proj      self_attn.out_proj
    memory[t]                         trans_{t}_mem               norm1, norm2  layer_norms.0, layer_norms.1
    residual1, residual2, classifier  proj1, proj2, out_layer     fc1, fc2      fc1, fc2

With the authors' weights and their `attn_mask` False, the logits equal theirs (largest difference 5e-7). Their default
is True, a causal mask on every attention; then the difference is 0.01. The benchmark runs without the mask, and without
their dropout on attention weights, which would force an unfused kernel.

Shapes: S utterances, L_m frames in modality m, d_m their width, d width of the model, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MulTConfig:
    """Sizes of MulT; the defaults are the published ones."""

    widths: dict[str, int]  # modality -> d_m, in the order in which sources and memories are concatenated
    num_classes: int  # C
    width: int = 40  # d
    heads: int = 8
    layers: int = 4  # of each encoder and memory; the authors' memories have max(layers, 3)
    dropout: float = 0.1


class Layer(nn.Module):
    """Pre-norm attention and feed-forward. Query, key and value share one LayerNorm and one packed projection."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)  # query, key, value
        self.out_proj = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor | None) -> Tensor:
        """x [S, L_t, d]; source [S, L_s, d], or None for x itself. Returns [S, L_t, d]."""
        target = self.norm1(x)
        source = target if source is None else self.norm1(source)
        width = x.shape[-1]
        q = F.linear(target, self.in_proj.weight[:width], self.in_proj.bias[:width])
        k, v = F.linear(source, self.in_proj.weight[width:], self.in_proj.bias[width:]).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [S, heads, L, d / heads]
        read = F.scaled_dot_product_attention(q, k, v)
        x = x + self.drop(self.out_proj(read.transpose(1, 2).flatten(2)))
        return x + self.drop(self.fc2(self.drop(F.relu(self.fc1(self.norm2(x))))))


class Encoder(nn.Module):
    """Scaled input plus positions, layers, LayerNorm. The source stays the embedded source in every layer."""

    def __init__(self, width: int, heads: int, layers: int, dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor | None) -> Tensor:
        """As Layer.forward."""
        x, source = (y if y is None else self.drop(y * y.shape[2] ** 0.5 + positions(y)) for y in (x, source))
        for layer in self.layers:
            x = layer(x, source)
        return self.norm(x)


class MulT(nn.Module):
    """The Multimodal Transformer: frames in, one row of logits per utterance out."""

    def __init__(self, config: MulTConfig):
        super().__init__()
        self.config = config
        d, p, modalities = config.width, config.dropout, list(config.widths)
        self.project = nn.ModuleDict(
            {m: nn.Identity() if width == d else nn.Linear(width, d, bias=False) for m, width in config.widths.items()}
        )
        pairs = [(target, source) for target in modalities for source in modalities if source != target]
        self.cross = nn.ModuleDict({f"{t}<-{s}": Encoder(d, config.heads, config.layers, p) for t, s in pairs})
        side = (len(modalities) - 1) * d  # the results of a target's sources, concatenated
        self.memory = nn.ModuleDict({m: Encoder(side, config.heads, config.layers, p) for m in modalities})
        out = len(modalities) * side
        self.residual1, self.residual2 = nn.Linear(out, out), nn.Linear(out, out)
        self.classifier = nn.Linear(out, config.num_classes)
        self.drop = nn.Dropout(p)

    def forward(self, frames: dict[str, Tensor]) -> Tensor:
        """frames {m: [S, L_m, d_m]} -> logits [S, C]."""
        h = {m: layer(frames[m]) for m, layer in self.project.items()}  # [S, L_m, d]
        last = []
        for target, memory in self.memory.items():
            streams = [self.cross[f"{target}<-{s}"](h[target], h[s]) for s in h if s != target]
            last.append(memory(torch.cat(streams, dim=-1), None)[:, -1])  # [S, 2d]
        x = torch.cat(last, dim=-1)  # [S, 6d]
        return self.classifier(x + self.residual2(self.drop(F.relu(self.residual1(x)))))


def positions(x: Tensor) -> Tensor:
    """[length, width] of x [S, length, width]: sines, then cosines; positions count from 1. An even width."""
    length, half = x.shape[1], x.shape[2] // 2
    frequency = 10000 ** (-torch.arange(half, device=x.device) / (half - 1))
    angle = torch.arange(1, length + 1, device=x.device)[:, None] * frequency  # [length, half]
    return torch.cat((angle.sin(), angle.cos()), dim=-1)
