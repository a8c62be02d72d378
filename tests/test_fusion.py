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
MODELS = ["MAGT", "MAGT, no input norm", "MAGT, causal", "MAGT, released", "Context", "Context, causal", "Concat"]


def make(name, modalities=tuple(WIDTHS)):
    torch.manual_seed(0)
    options = {"causal": "causal" in name, "input_norm": "no input norm" not in name}
    widths = {m: WIDTHS[m] for m in modalities}
    config = FusionConfig(widths, num_classes=5, num_speakers=3, width=32, heads=4, **options)
    if name == "Concat":
        return fusion.Concat(config).eval()
    if "released" in name or "Context" in name:
        from extras import variants  # late: a file of docs/exercise.md, in place of fusion.py, lacks what it imports

        build = variants.Context if "Context" in name else variants.released("iemocap").model
        return build(config).eval()
    return fusion.MAGT(config).eval()


def batch(lengths, modalities=tuple(WIDTHS), missing=False):
    """Arguments of a model's forward, modalities in another order than the model's. With `missing`: no audio in
    conversation 0, no video at the start of each conversation, and one in three of both missing besides."""
    generator, N = torch.Generator().manual_seed(1), sum(lengths)
    present = {m: torch.rand(N, generator=generator) > 0.3 for m in ("audio", "video")}
    present["audio"][: lengths[0]] = False
    present["video"][[sum(lengths[:b]) for b in range(len(lengths))]] = False
    return {
        "features": {m: torch.randn(N, WIDTHS[m], generator=generator) for m in reversed(modalities)},
        "speakers": torch.randint(0, 4, (N,), generator=generator),
        "lengths": lengths,
        "present": {m: x for m, x in present.items() if m in modalities} if missing else {},
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


@pytest.mark.parametrize(
    "causal, present, expected",
    [
        (False, None, [BOTH, BOTH, [3] * 4]),
        (True, None, [FIRST, BOTH, [3] * 4]),
        (False, [True, False, False], [FIRST, FIRST, [0] * 4]),
    ],
)
def test_block_by_hand(causal, present, expected):
    """Head 0 has scores log 3 and 0, so weights 3/4 and 1/4; head 1 has 1/2 and 1/2. The third row is by itself."""
    block = by_hand(fusion.Block(replace(BY_HAND, causal=causal)))
    nn.init.constant_(block.query.bias[0], math.sqrt(2) * math.log(3))
    source = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [3, 3, 3, 3]]).float()
    found = block(torch.zeros(3, 4), source, [2, 1], present and torch.tensor(present))
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


# Eq. 15-23 in NumPy, float64, one conversation at a time.


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w, name, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def numpy_block(w, name, anchor, source, heads, mask):
    """Eq. 19, 20, head by head. mask [U, U]: which keys each query attends to."""
    U, D = anchor.shape
    q, kv = linear(w, f"{name}.query", anchor), linear(w, f"{name}.key_value", source)
    k, v, out = kv[:, :D], kv[:, D:], np.zeros((U, D))
    for head in np.arange(D).reshape(heads, -1):
        for u in range(U):
            keys = np.flatnonzero(mask[u])
            if len(keys):  # else 0
                e = np.exp(k[keys][:, head] @ q[u, head] / math.sqrt(len(head)))
                out[u, head] = e / e.sum() @ v[keys][:, head]
    x = anchor + linear(w, f"{name}.out", out)
    hidden = linear(w, f"{name}.ffn.1", layer_norm(w, f"{name}.ffn.0", x))
    gelu = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    return x + linear(w, f"{name}.ffn.4", gelu)


def numpy_magt(model, features, speakers, present):
    """logits, hidden and gates of one conversation."""
    w, config = {name: x.double().numpy() for name, x in model.state_dict().items()}, model.config
    U, D, modalities = len(speakers), config.width, list(config.widths)
    added = w["speaker.weight"][speakers.numpy()]  # Eq. 17
    angle = np.arange(U)[:, None] / 10000 ** (np.arange(0, D, 2) / D)
    added[:, 0::2] += np.sin(angle)  # Eq. 15
    added[:, 1::2] += np.cos(angle)  # Eq. 16
    h, masks = {}, {}
    for m in modalities:
        x = features[m].double().numpy()
        if config.widths[m] != D:
            x = linear(w, f"input.{m}.0" if config.input_norm else f"input.{m}", x)
        if config.input_norm:
            x = layer_norm(w, f"input.{m}.1", x)
        there = present[m].numpy() if m in present else np.ones(U, dtype=bool)
        h[m] = x * there[:, None] + added  # Eq. 18
        masks[m] = there & (np.tri(U, dtype=bool) if config.causal else True) & np.ones((U, U), dtype=bool)
    hidden, gates = {}, {}
    sources = dict(h)
    for m in sorted(modalities, key=lambda m: m == TEXT):  # text last
        streams, gates[m] = [], {}
        for n in modalities:
            x = numpy_block(w, f"anchor.{m}.block.{n}", h[m], sources[n] if m == TEXT else h[n], config.heads, masks[n])
            gates[m][n] = 1 / (1 + np.exp(-linear(w, f"anchor.{m}.gate.{n}", x)))  # Eq. 21
            streams.append(x * gates[m][n])  # Eq. 22
        hidden[m] = linear(w, f"anchor.{m}.merge", np.concatenate(streams, axis=1))
        if m != TEXT:
            sources[m] = hidden[m]
    return {m: linear(w, f"classifier.{m}", x) for m, x in hidden.items()}, hidden, gates  # Eq. 23


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("modalities", SETS, ids="+".join)
@pytest.mark.parametrize("name", ["MAGT", "MAGT, causal", "MAGT, no input norm"])
def test_magt_equals_numpy(name, modalities, missing):
    lengths = [3, 1, 6]
    model, given = make(name, modalities), batch(lengths, modalities, missing)
    out = model(**given)
    for rows in torch.arange(10).split(lengths):
        one = pick(given, rows, [len(rows)])
        logits, hidden, gates = numpy_magt(model, one["features"], one["speakers"], one["present"])
        for found, expected in [(out.logits, logits), (out.hidden, hidden), *((out.gates[m], gates[m]) for m in gates)]:
            assert found.keys() == expected.keys()
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
    assert np.abs(out.hidden[TEXT].detach().numpy() - hidden).max() < 2e-6
    assert np.abs(out.logits[TEXT].detach().numpy() - linear(w, "classifier", hidden)).max() < 2e-6
    assert w["shared.0.weight"].shape == (96, 32) and out.gates == {} and out.logits.keys() == {TEXT}


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("modalities", SETS, ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_what_holds_for_any_weights(name, modalities, missing):
    """Batching changes nothing, a causal model needs no future, each parameter gets a gradient; dropout, bfloat16."""
    lengths = [7, 1, 4, 12]
    model, given = make(name, modalities), batch(lengths, modalities, missing)
    out = model(**given)
    for conversation in torch.arange(24).split(lengths):
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
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), out.logits[TEXT], atol=0.05, rtol=0.05)
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.1 if name == "Concat" else 0.5}
    assert not torch.equal(model.train()(**given).logits[TEXT], out.logits[TEXT])


@pytest.mark.parametrize("name", MODELS)
def test_what_an_utterance_depends_on(name):
    """On the features, the speakers and the order in its conversation, nothing else; Concat: on its own features."""
    model, given, concat, causal = make(name), batch([6, 3]), name == "Concat", "causal" in name

    def changed_rows(before=given, **changes):
        x, y = (model(**arguments).logits[TEXT] for arguments in (before, before | changes))
        return ((x - y).abs().amax(dim=1) > 1e-5).nonzero().squeeze(1).tolist()

    at, reached = torch.tensor(4), [4, 5] if causal else [0, 1, 2, 3, 4, 5]
    for m, x in given["features"].items():
        features = given["features"] | {m: x.index_fill(0, at, -1.0)}
        assert changed_rows(features=features) == ([4] if concat else reached)
        if m != TEXT:  # a missing utterance is no key
            absent = given | {"present": {m: torch.arange(9) != 4}}
            assert changed_rows(absent, features=features) == [] != changed_rows(absent, present={})
    speakers = given["speakers"].index_fill(0, at, given["speakers"][4] % 3 + 1)
    assert changed_rows(speakers=speakers) == ([] if concat else reached)
    swapped = pick(given, [0, 1, 3, 2, 4, 5, 6, 7, 8], [6, 3])
    assert (5 in changed_rows(**swapped)) != concat
    assert changed_rows(lengths=[2, 4, 3]) == ([] if concat else [2, 3, 4, 5] if causal else reached)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f, s, n: ({"text": f["text"]}, s, n), "made for .*audio.*, got features"),
        (lambda f, s, n: (f | {"audio": f["text"]}, s, n), r"audio features must be \[4, 20\], got \[4, 32\]"),
        (lambda f, s, n: (f, s, [2, 3]), r"speakers must be \[5\], the sum of lengths"),
        (lambda f, s, n: (f, s, [4, 0]), "lengths must be numbers from 1"),
        (lambda f, s, n: (f, s, n, {"audio": torch.ones(4)}), r"present\['audio'\] must be bool \[4\]"),
        (lambda *_: replace(BY_HAND, heads=3), "must be even and divide by heads"),
        (lambda *_: replace(BY_HAND, widths={"audio": 4}), "needs an entry for 'text'"),
    ],
)
@pytest.mark.parametrize("name", ["MAGT", "Concat", "Context"])
def test_inputs_that_do_not_fit(name, change, words):
    given = batch([4])
    with pytest.raises(ValueError, match=words):
        make(name)(*change(given["features"], given["speakers"], given["lengths"]))
