"""The fusion models: the equations in NumPy, and what must hold whatever the weights are."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fusion
from fusion import TEXT, FusionConfig

WIDTHS = {"text": 32, "audio": 20, "video": 32}
SETS = [("text",), ("text", "audio"), ("video", "text"), ("text", "audio", "video")]
MODELS = ["MAGT", "MAGT, causal", "MAGT, released", "Context", "Context, causal", "Concat"]


def make(name, modalities=tuple(WIDTHS)):
    torch.manual_seed(0)
    widths, causal = {m: WIDTHS[m] for m in modalities}, "causal" in name
    config = FusionConfig(widths, num_classes=5, num_speakers=3, width=32, heads=4, causal=causal)
    build = fusion.Concat if name == "Concat" else fusion.MAGT
    if "released" in name or "Context" in name:
        from extras import variants  # late: a file of docs/exercise.md, in place of fusion.py, lacks what it imports

        build = variants.Context if "Context" in name else variants.released("iemocap").model
    return build(config).eval()


def batch(lengths, modalities=tuple(WIDTHS), missing=False):
    """Arguments of a model's forward, modalities in another order than the model's. missing: one in three."""
    N = sum(lengths)
    present = {m: torch.arange(N) % 3 != i for i, m in enumerate(("audio", "video")) if missing and m in modalities}
    return {
        "features": {m: torch.randn(N, WIDTHS[m]) for m in reversed(modalities)},
        "speakers": torch.randint(0, 4, (N,)),
        "lengths": lengths,
        "present": present,
    }


def pick(given, rows, lengths):
    """Some rows of a model's arguments."""
    features, present = ({m: x[rows] for m, x in given[name].items()} for name in ("features", "present"))
    return {"features": features, "speakers": given["speakers"][rows], "lengths": lengths, "present": present}


# Worked by hand, for docs/exercise.md: two heads of width 2, every linear layer the identity (or several side by side).
BY_HAND = FusionConfig({TEXT: 4, "audio": 4}, num_classes=2, num_speakers=2, width=4, heads=2)


def by_hand(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 2:  # not of the LayerNorm
                p.copy_(torch.eye(4).repeat(p.shape[0] // 4, p.shape[1] // 4))
    return module.eval()


def test_positions_and_speakers_by_hand():
    """The angles of position p are p and p / 100. Every conversation starts at position 0."""
    embedding = fusion.speaker_embedding(BY_HAND)
    assert embedding.weight.shape == (3, 4) and not embedding.weight[0].any() and embedding.weight[1:].any()
    nn.init.constant_(embedding.weight[1], 10)
    found = fusion.positions_and_speakers(embedding, torch.tensor([1, 0, 1]), [2, 1])
    expected = torch.tensor([[10, 11, 10, 11], [0.8415, 0.5403, 0.01, 1], [10, 11, 10, 11]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


BOTH, FIRST = [2.0530, 0.1388, 0.5, 0.5], [1.8413, -0.1587, 1.8413, -0.1587]
CASES = [
    (False, None, [BOTH, BOTH, [3] * 4]),
    (True, None, [FIRST, BOTH, [3] * 4]),
    (False, torch.tensor([True, False, False]), [FIRST, FIRST, [0] * 4]),
]


@pytest.mark.parametrize("causal, present, expected", CASES)
def test_block_by_hand(causal, present, expected):
    """Head 0 has scores log 3 and 0, so weights 3/4 and 1/4; head 1 has 1/2 and 1/2. The third row is by itself."""
    block = by_hand(fusion.Block(replace(BY_HAND, causal=causal)))
    nn.init.constant_(block.query.bias[0], math.sqrt(2) * math.log(3))
    source = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [3, 3, 3, 3]]).float()
    found = block(torch.zeros(3, 4), source, [2, 1], present)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)


def test_gate_by_hand():
    found = by_hand(fusion.Anchor(BY_HAND, TEXT)).alpha("audio", torch.tensor([[0, math.log(3), 0, 0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.75, 0.5, 0.5]]))


def test_anchor_by_hand():
    """By uniform attention the streams are 1/2 and 2, their gates sigmoid(1/2) and sigmoid(2), the merge their sum."""
    sources = {"audio": torch.full((2, 4), 2.0), TEXT: torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]).float()}
    hidden, gates = by_hand(fusion.Anchor(BY_HAND, TEXT))(torch.zeros(2, 4), sources, [2], {})
    for found, expected in [(gates[TEXT], 0.6225), (gates["audio"], 0.8808), (hidden, 2.0728)]:
        torch.testing.assert_close(found, torch.full((2, 4), expected), atol=1e-3, rtol=0)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def numpy_block(w, name, anchor, source, heads, mask):
    """Eq. 19, 20, head by head. mask [U, U]: which keys each query attends to; without any, attention gives 0."""
    q, kv, out = linear(w, f"{name}.query", anchor), linear(w, f"{name}.key_value", source), np.zeros_like(anchor)
    k, v = np.split(kv, 2, axis=1)
    for head in np.arange(q.shape[1]).reshape(heads, -1):
        e = np.exp(q[:, head] @ k[:, head].T / math.sqrt(len(head))) * mask
        out[:, head] = e @ v[:, head] / np.maximum(e.sum(axis=1, keepdims=True), 1e-300)
    x = anchor + linear(w, f"{name}.out", out)
    hidden = linear(w, f"{name}.ffn.1", layer_norm(w, f"{name}.ffn.0", x))
    gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    return x + linear(w, f"{name}.ffn.4", gelu)


def numpy_magt(model, features, speakers, lengths, present):
    """Eq. 15-23 in NumPy, float64: logits, hidden and gates of one conversation."""
    w, config = {name: x.double().numpy() for name, x in model.state_dict().items()}, model.config
    (U,), D, modalities = lengths, config.width, list(config.widths)
    added = w["speaker.weight"][speakers.numpy()]  # Eq. 17
    angle = np.arange(U)[:, None] / 10000 ** (np.arange(0, D, 2) / D)
    added += np.stack((np.sin(angle), np.cos(angle)), axis=2).reshape(U, D)  # Eq. 15, 16
    h, masks, hidden, gates = {}, {}, {}, {}
    for m in modalities:
        x = features[m].double().numpy()
        if config.widths[m] != D:
            x = linear(w, f"input.{m}.0", x)
        there = present[m].numpy() if m in present else np.ones(U)
        h[m] = layer_norm(w, f"input.{m}.1", x) * there[:, None] + added  # Eq. 18
        masks[m] = (np.tri(U) if config.causal else np.ones((U, U))) * there
    for m in sorted(modalities, key=lambda m: m == TEXT):  # text last
        streams, gates[m], sources = [], {}, h | hidden if m == TEXT else h
        for n in modalities:
            x = numpy_block(w, f"anchor.{m}.block.{n}", h[m], sources[n], config.heads, masks[n])
            gates[m][n] = 1 / (1 + np.exp(-linear(w, f"anchor.{m}.gate.{n}", x)))  # Eq. 21
            streams.append(x * gates[m][n])  # Eq. 22
        hidden[m] = linear(w, f"anchor.{m}.merge", np.concatenate(streams, axis=1))
    return {m: linear(w, f"classifier.{m}", x) for m, x in hidden.items()}, hidden, gates  # Eq. 23


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("modalities", SETS, ids="+".join)
@pytest.mark.parametrize("name", ["MAGT", "MAGT, causal"])
def test_magt_equals_numpy(name, modalities, missing):
    model, given = make(name, modalities), batch([3, 1, 6], modalities, missing)
    out = model(**given)
    for rows in torch.arange(10).split(given["lengths"]):
        logits, hidden, gates = numpy_magt(model, **pick(given, rows, [len(rows)]))
        for found, expected in [(out.logits, logits), (out.hidden, hidden), *((out.gates[m], gates[m]) for m in gates)]:
            for m, x in expected.items():
                assert np.abs(found[m][rows].detach().numpy() - x).max() < 2e-6


def test_concat_equals_the_figure():
    model, given = make("Concat"), batch([4, 2], missing=True)
    w = {name: x.double().numpy() for name, x in model.state_dict().items()}
    parts = []
    for m in WIDTHS:
        x = layer_norm(w, f"input.{m}.1", linear(w, f"input.{m}.0", given["features"][m].double().numpy()))
        x = linear(w, "shared.3", np.maximum(linear(w, "shared.0", x), 0))
        parts.append(x * given["present"][m].numpy()[:, None] if m in given["present"] else x)
    hidden = np.maximum(linear(w, "merge.0", np.concatenate(parts, axis=1)), 0)
    out = model(**given)
    assert np.abs(out.logits[TEXT].detach().numpy() - linear(w, "classifier", hidden)).max() < 2e-6
    assert w["shared.0.weight"].shape == (96, 32) and out.gates == {} and out.logits.keys() == {TEXT}


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("modalities", SETS, ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_what_holds_for_any_weights(name, modalities, missing):
    """Batching changes nothing, a causal model needs no future, each parameter gets a gradient; dropout, bfloat16."""
    model, given = make(name, modalities), batch([6, 1, 5, 12], modalities, missing)
    out = model(**given)
    for conversation in torch.arange(24).split(given["lengths"]):
        for U in range(1, len(conversation) + 1) if "causal" in name else [len(conversation)]:
            alone = model(**pick(given, conversation[:U], [U]))
            for m in out.logits:
                torch.testing.assert_close(alone.logits[m], out.logits[m][conversation[:U]], atol=2e-6, rtol=0)
    sum(x.square().mean() for x in out.logits.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), parameter_name
    assert name == "Concat" or not model.speaker.weight.grad[0].any()  # an unknown speaker adds 0, also when trained
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(**given).logits[TEXT]
    torch.testing.assert_close(low.float(), out.logits[TEXT], atol=0.05, rtol=0.05)
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.1 if name == "Concat" else 0.5}
    assert not torch.equal(model.train()(**given).logits[TEXT], out.logits[TEXT])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"features": {TEXT: torch.ones(4, 32)}}, "made for .*audio.*, got features"),
        ({"features": dict.fromkeys(WIDTHS, torch.ones(4, 32))}, r"audio features must be \[4, 20\], got \[4, 32\]"),
        ({"lengths": [2, 3]}, r"speakers must be \[5\], the sum of lengths"),
        ({"present": {"audio": torch.ones(4)}}, r"present\['audio'\] must be bool \[4\]"),
    ],
)
@pytest.mark.parametrize("name", ["MAGT", "Concat", "Context"])
def test_inputs_that_do_not_fit(name, change, words):
    with pytest.raises(ValueError, match=words):
        make(name)(**batch([4]) | change)
