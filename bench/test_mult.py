"""MulT against a second, plain implementation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.mult import Encoder, Layer, MulT, MulTConfig


def plain_embedding(x: Tensor) -> Tensor:
    """Positions number by number."""
    _, length, d = x.shape
    table = torch.zeros(length, d)
    for row in range(length):
        for i in range(d // 2):
            angle = (row + 1) * math.exp(-i * math.log(10000) / (d / 2 - 1))
            table[row, i], table[row, d // 2 + i] = math.sin(angle), math.cos(angle)
    return math.sqrt(d) * x + table


def plain_layer(layer: Layer, x: Tensor, source: Tensor) -> Tensor:
    """With torch's attention module, which has the authors' packed projection."""
    attention = nn.MultiheadAttention(x.shape[-1], layer.heads, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = layer.in_proj.weight, layer.in_proj.bias
    attention.out_proj.load_state_dict(layer.out_proj.state_dict())
    key = layer.norm1(source)
    x = x + attention(layer.norm1(x), key, key)[0]
    return x + layer.fc2(F.relu(layer.fc1(layer.norm2(x))))


def plain_encoder(encoder: Encoder, x: Tensor, source: Tensor | None = None) -> Tensor:
    x, source = plain_embedding(x), None if source is None else plain_embedding(source)
    for layer in encoder.layers:
        x = plain_layer(layer, x, x if source is None else source)
    return encoder.norm(x)


def plain_mult(model: MulT, frames: dict[str, Tensor]) -> Tensor:
    t, a, v = (model.project[m](frames[m]) for m in ("text", "audio", "video"))
    cross = {name: lambda x, source, e=e: plain_encoder(e, x, source) for name, e in model.cross.items()}
    streams = {
        "text": [cross["text<-audio"](t, a), cross["text<-video"](t, v)],
        "audio": [cross["audio<-text"](a, t), cross["audio<-video"](a, v)],
        "video": [cross["video<-text"](v, t), cross["video<-audio"](v, a)],
    }
    last = [plain_encoder(model.memory[m], torch.cat(pair, dim=2))[:, -1] for m, pair in streams.items()]
    h = torch.cat(last, dim=1)
    return model.classifier(h + model.residual2(F.relu(model.residual1(h))))


@pytest.mark.parametrize("layers", [1, 4])
def test_equals_the_plain_implementation(layers):
    widths = {"text": 30, "audio": 7, "video": 16}  # video's is the width of the model: no projection
    model = MulT(MulTConfig(widths, 4, width=16, heads=4, layers=layers)).eval()
    frames = {m: torch.randn(3, length, widths[m]) for m, length in {"text": 5, "audio": 9, "video": 6}.items()}
    torch.testing.assert_close(model(frames), plain_mult(model, frames), rtol=1e-5, atol=1e-5)
