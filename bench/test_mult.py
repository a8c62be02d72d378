"""MulT against a second, plain implementation, and what must hold whatever the weights are."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.grid import utterances
from bench.mult import Encoder, Layer, MulT, MulTConfig

WIDTHS = {"text": 30, "audio": 7, "video": 16}  # video's is the width of the model: no projection
FRAMES = {"text": 5, "audio": 9, "video": 6}


def make(**changes) -> MulT:
    torch.manual_seed(0)
    return MulT(MulTConfig(WIDTHS, num_classes=4, **{"width": 16, "heads": 4, "layers": 2, **changes})).eval()


def plain_embedding(x: Tensor) -> Tensor:
    """Positions written out number by number."""
    _, length, d = x.shape
    table = torch.zeros(length, d)
    for row in range(length):
        for i in range(d // 2):
            angle = (row + 1) * math.exp(-i * math.log(10000) / (d / 2 - 1))
            table[row, i], table[row, d // 2 + i] = math.sin(angle), math.cos(angle)
    return math.sqrt(d) * x + table


def plain_layer(layer: Layer, x: Tensor, source: Tensor) -> Tensor:
    """With torch's own attention module, which holds the packed projection as the authors' does."""
    attention = nn.MultiheadAttention(x.shape[-1], layer.heads, batch_first=True)
    attention.load_state_dict(
        {
            "in_proj_weight": layer.in_proj.weight,
            "in_proj_bias": layer.in_proj.bias,
            "out_proj.weight": layer.out_proj.weight,
            "out_proj.bias": layer.out_proj.bias,
        }
    )
    key = layer.norm1(source)
    x = x + attention(layer.norm1(x), key, key)[0]
    return x + layer.fc2(F.relu(layer.fc1(layer.norm2(x))))


def plain_mult(model: MulT, frames: dict[str, Tensor]) -> Tensor:
    def cross(encoder: Encoder, x: Tensor, source: Tensor) -> Tensor:
        x, source = plain_embedding(x), plain_embedding(source)
        for layer in encoder.layers:
            x = plain_layer(layer, x, source)
        return encoder.norm(x)

    def memory(encoder: Encoder, x: Tensor) -> Tensor:
        x = plain_embedding(x)
        for layer in encoder.layers:
            x = plain_layer(layer, x, x)
        return encoder.norm(x)

    t, a, v = (model.project[m](frames[m]) for m in ("text", "audio", "video"))
    net = model.cross
    t2 = torch.cat([cross(net["text<-audio"], t, a), cross(net["text<-video"], t, v)], dim=2)
    a2 = torch.cat([cross(net["audio<-text"], a, t), cross(net["audio<-video"], a, v)], dim=2)
    v2 = torch.cat([cross(net["video<-text"], v, t), cross(net["video<-audio"], v, a)], dim=2)
    h = torch.cat([memory(model.memory[m], x)[:, -1] for m, x in (("text", t2), ("audio", a2), ("video", v2))], dim=1)
    return model.classifier(h + model.residual2(F.relu(model.residual1(h))))


@pytest.mark.parametrize("changes", [{}, {"layers": 4}, {"layers": 1, "memory_layers": 1}])
def test_equals_the_plain_implementation(changes):
    model = make(**changes)
    frames, masks = utterances([FRAMES] * 3, WIDTHS, "cpu")
    torch.testing.assert_close(model(frames), plain_mult(model, frames), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(frames, masks), plain_mult(model, frames), rtol=1e-5, atol=1e-5)


def test_memories_have_the_layers_of_the_authors_rule():
    for layers, expected in ((1, 3), (3, 3), (5, 5)):
        assert {len(memory.layers) for memory in make(layers=layers).memory.values()} == {expected}
    assert {len(memory.layers) for memory in make(layers=1, memory_layers=1).memory.values()} == {1}


def test_padding_changes_nothing():
    model = make()
    lengths = [dict(text=5, audio=9, video=6), dict(text=1, audio=4, video=8), dict(text=3, audio=1, video=1)]
    frames, masks = utterances(lengths, WIDTHS, "cpu")
    together = model(frames, masks)
    for m in frames:
        frames[m][~masks[m]] = 1e4
    torch.testing.assert_close(model(frames, masks), together)
    for i, many in enumerate(lengths):
        alone = {m: x[i : i + 1, : many[m]] for m, x in frames.items()}
        torch.testing.assert_close(plain_mult(model, alone)[0], together[i], rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    model = make().train()
    model(*utterances([FRAMES] * 3, WIDTHS, "cpu")).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_dropout_is_on_in_training_only():
    model, inputs = make(), utterances([FRAMES] * 3, WIDTHS, "cpu")
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))
