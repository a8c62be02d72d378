"""MAGT and Concat: what must hold whatever the weights are, and the equations written out once more by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from fusion import (
    MAGT,
    RELEASED,
    TEXT,
    Anchor,
    Block,
    Concat,
    Context,
    Dropout,
    FusionConfig,
    Packing,
    Past,
    sinusoidal_positions,
)

WIDTHS = {"text": 32, "audio": 20, "video": 32}
SETS = [("text",), ("text", "audio"), ("video", "text"), ("text", "audio", "video")]


def make(model=MAGT, modalities=tuple(WIDTHS), seed=0, **changes):
    torch.manual_seed(seed)
    widths = {m: WIDTHS[m] for m in modalities}
    return model(FusionConfig(widths, num_classes=5, num_speakers=3, width=32, heads=4, **changes)).eval()


def batch(lengths, modalities=tuple(WIDTHS), seed=1):
    generator = torch.Generator().manual_seed(seed)
    B, U = len(lengths), max(lengths)
    features = {m: torch.randn(B, U, WIDTHS[m], generator=generator) for m in modalities}
    speakers = torch.randint(0, 3, (B, U), generator=generator)
    return features, speakers, torch.arange(U) < torch.tensor(lengths)[:, None]


def rows(inputs, i, length):
    features, speakers, mask = inputs
    return (
        {m: x[i : i + 1, :length] for m, x in features.items()},
        speakers[i : i + 1, :length],
        mask[i : i + 1, :length],
    )


@pytest.mark.parametrize("changes", [{}, RELEASED, {"causal": True}])
@pytest.mark.parametrize("modalities", SETS)
@pytest.mark.parametrize("model", [MAGT, Concat, Context])
def test_padding_and_batching_change_nothing(model, modalities, changes):
    lengths = [7, 1, 4, 12]
    net, inputs = make(model, modalities, **changes), batch(lengths, modalities)
    together = net(*inputs)
    inputs[0]["text"][~inputs[2]] = 1e3  # whatever stands in the padding
    inputs[1][~inputs[2]] = -1
    other_padding = net(*inputs)
    for i, length in enumerate(lengths):
        alone = net(*rows(inputs, i, length))
        for m in alone.logits:
            torch.testing.assert_close(together.logits[m][i, :length], alone.logits[m][0], atol=1e-6, rtol=0)
            torch.testing.assert_close(other_padding.logits[m][i, :length], alone.logits[m][0], atol=1e-6, rtol=0)
            torch.testing.assert_close(together.hidden[m][i, :length], alone.hidden[m][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", [MAGT, Concat, Context])
def test_packing_changes_nothing(model):
    net, inputs = make(model), batch([7, 1, 4])
    mask = inputs[2]
    found = net(*inputs)
    given = net(*inputs, None, mask.flatten().nonzero().squeeze(1))
    padded = net(*inputs, None, torch.arange(mask.numel()))  # every place counts: the layers work on padding, too
    for part in ("logits", "hidden"):
        for m, x in getattr(found, part).items():
            assert torch.equal(x, getattr(given, part)[m]) and not x[~mask].any()
            torch.testing.assert_close(x[mask], getattr(padded, part)[m][mask], atol=1e-6, rtol=0)
    packing, x = Packing(mask), torch.randn(12, 5)
    assert torch.equal(packing.pack(packing.pad(x)), x) and packing.pad(x).shape == (3, 7, 5)


def test_permuting_the_batch_permutes_the_output():
    net, (features, speakers, mask) = make(), batch([7, 1, 4])
    order = torch.tensor([2, 0, 1])
    permuted = net({m: x[order] for m, x in features.items()}, speakers[order], mask[order])
    torch.testing.assert_close(net(features, speakers, mask).logits[TEXT][order], permuted.logits[TEXT])


def test_order_speakers_and_the_rest_of_the_conversation_matter():
    net, (features, speakers, mask) = make(), batch([6])
    logits = net(features, speakers, mask).logits[TEXT]
    flipped = net({m: x.flip(1) for m, x in features.items()}, speakers.flip(1), mask).logits[TEXT].flip(1)
    assert (logits - flipped).abs().max() > 1e-3
    assert (logits - net(features, (speakers + 1) % 3, mask).logits[TEXT]).abs().max() > 1e-3
    for m in features:
        changed = {n: x.clone() for n, x in features.items()}
        changed[m][0, 5] *= -1
        assert (logits - net(changed, speakers, mask).logits[TEXT])[0, 0].abs().max() > 1e-5, m
    concat = make(Concat)
    before = concat(features, speakers, mask).logits[TEXT]
    torch.testing.assert_close(before[0, :5], concat(changed, speakers, mask).logits[TEXT][0, :5])
    assert (before - concat(changed, speakers, mask).logits[TEXT])[0, 5].abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, RELEASED])
@pytest.mark.parametrize("modalities", SETS)
@pytest.mark.parametrize("model", [MAGT, Concat, Context])
def test_every_parameter_gets_a_gradient(model, modalities, changes):
    net = make(model, modalities, **changes).train()
    out = net(*batch([9, 5], modalities))
    sum(x.square().mean() for x in out.logits.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_missing_sound_is_read_by_nobody():
    net, (features, speakers, mask) = make(), batch([6, 3])
    present = {"audio": mask.clone()}
    present["audio"][0, 2] = False
    before = net(features, speakers, mask, present)
    features["audio"][0, 2] = 1e3
    after = net(features, speakers, mask, present)
    for m in before.logits:
        assert torch.equal(before.logits[m], after.logits[m])
    assert not torch.equal(after.logits[TEXT], net(features, speakers, mask).logits[TEXT])


@pytest.mark.parametrize("model", [MAGT, Concat, Context])
def test_a_conversation_without_any_sound(model):
    net, (features, speakers, mask) = make(model).train(), batch([6, 3])
    present = {"audio": mask & torch.tensor([[False], [True]])}
    out = net(features, speakers, mask, present)
    out.logits[TEXT].square().mean().backward()
    assert all(x.isfinite().all() for x in [*out.logits.values(), *out.hidden.values()])
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("width", [20, 32])
def test_the_scale_of_the_input_does_not_matter(width):
    net = MAGT(FusionConfig({"text": width}, num_classes=5, num_speakers=3, width=32, heads=4)).eval()
    with torch.no_grad():
        for layer in net.input["text"]:
            if isinstance(layer, torch.nn.Linear):
                layer.bias.zero_()
    x, speakers, mask = (
        torch.randn(2, 6, width),
        torch.zeros(2, 6, dtype=torch.long),
        torch.ones(2, 6, dtype=torch.bool),
    )
    small, large = (net({"text": scale * x}, speakers, mask).logits[TEXT] for scale in (0.1, 10))
    torch.testing.assert_close(small, large, atol=1e-2, rtol=0)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_the_share(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 103, requires_grad=True)
    y = Dropout(p)(x)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.005)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert (y == 0).float().mean(0).std() < 0.03  # no column is dropped more than another: each byte is as random
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert torch.equal(Dropout(p).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)


def test_an_unknown_speaker_adds_nothing():
    net = make()
    assert not net.speaker(torch.tensor(0)).any()
    net.train()(*(lambda f, s, m: (f, torch.full_like(s, -1), m))(*batch([4]))).logits[TEXT].sum().backward()
    assert not net.speaker.weight.grad.any()


def missing_places(mask, seed=2):
    """Where sound and picture lack: here and there; sound in all of conversation 0, pictures at every beginning."""
    generator = torch.Generator().manual_seed(seed)
    present = {m: mask & (torch.rand(mask.shape, generator=generator) > 0.3) for m in ("audio", "video")}
    present["audio"][0] = False
    present["video"][:, 0] = False
    return present


@pytest.mark.parametrize("model", [MAGT, Context])
def test_a_causal_model_sees_no_future(model):
    net, (features, speakers, mask) = make(model, causal=True), batch([9, 9])
    present = missing_places(mask)
    before = net(features, speakers, mask, present)
    for m in features:
        features[m][:, 5:] *= -1
    after = net(features, (speakers + (torch.arange(9) >= 5)) % 3, mask, present)
    for m in before.logits:
        assert torch.equal(before.logits[m][:, :5], after.logits[m][:, :5])
        assert (before.logits[m][:, 5:] - after.logits[m][:, 5:]).abs().amax(dim=-1).min() > 1e-3
    features["text"][:, 0] *= -1  # the past, on the other hand, counts
    assert not torch.equal(after.logits[TEXT][:, 4], net(features, speakers, mask, present).logits[TEXT][:, 4])


@pytest.mark.parametrize("changes", [{}, RELEASED])
@pytest.mark.parametrize("modalities", SETS)
def test_one_utterance_at_a_time_equals_the_whole(modalities, changes):
    """The cache, over 40 utterances, with sound and picture missing and speakers unknown."""
    net, (features, speakers, mask) = make(MAGT, modalities, causal=True, **changes), batch([40, 40, 40], modalities)
    speakers[1] = speakers[:, 7] = -1
    present = {m: x for m, x in missing_places(mask).items() if m in modalities}
    whole, past = net(features, speakers, mask, present), Past()
    for u in range(40):
        at = {m: x[:, u] for m, x in present.items()}
        out = net.step(past, {m: x[:, u] for m, x in features.items()}, speakers[:, u], at)
        for m in whole.logits:
            torch.testing.assert_close(out.logits[m], whole.logits[m][:, u], atol=1e-5, rtol=0)
            torch.testing.assert_close(out.hidden[m], whole.hidden[m][:, u], atol=1e-5, rtol=0)
    assert past.length == 40


def test_only_a_causal_model_steps():
    features, speakers, _ = batch([1])
    with pytest.raises(ValueError, match="causal=True"):
        make().step(Past(), {m: x[:, 0] for m, x in features.items()}, speakers[:, 0])


def test_context_equals_the_formula():
    net, (features, speakers, mask) = make(Context), batch([6])
    present = {"audio": mask.clone()}
    present["audio"][0, 2] = False
    normed = {m: net.input[m](x) for m, x in features.items()}
    normed["audio"][0, 2] = 0
    h = net.merge(torch.cat([normed[m] for m in WIDTHS], dim=-1)) + sinusoidal_positions(6, 32)
    h = h + net.speaker.weight[speakers + 1]
    out = net(features, speakers, mask, present)
    torch.testing.assert_close(out.logits[TEXT], net.classifier(net.block(h[0], h[0], mask, Packing(mask)))[None])
    flipped = net({m: x.flip(1) for m, x in features.items()}, speakers.flip(1), mask).logits[TEXT].flip(1)
    assert (net(features, speakers, mask).logits[TEXT] - flipped).abs().max() > 1e-3


def test_block_equals_the_formula():
    """Eq. 19-20 head by head: x = q + MHA(q, kv, kv); x + FFN(LN(x))."""
    config = FusionConfig({"text": 8}, 2, 1, width=8, heads=2)
    torch.manual_seed(0)
    block = Block(config).eval()
    anchor, source = torch.randn(2, 5, 8)
    mask = torch.tensor([[True, True, False, True, False]])
    q, (k, v) = block.query(anchor), block.key_value(source).chunk(2, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        score = q[:, h] @ k[:, h].T / math.sqrt(4)
        score[:, ~mask[0]] = -math.inf
        heads.append(score.softmax(-1) @ v[:, h])
    x = anchor + block.out(torch.cat(heads, dim=-1))
    norm, up, _, _, down, _ = block.ffn
    expected = x + down(F.gelu(up(norm(x))))
    everyone = Packing(torch.ones_like(mask))
    torch.testing.assert_close(block(anchor, source, mask, everyone), expected)


@pytest.mark.parametrize("relu", [False, True])
def test_gate_equals_the_formula(relu):
    """Eq. 21-22, one stream: merge(h * sigmoid(W h + b)); the released gate has a ReLU inside and is at least 0.5."""
    torch.manual_seed(0)
    anchor = Anchor(FusionConfig({"text": 8}, 2, 1, width=8, heads=2, relu_gate=relu), ["text"]).eval()
    x, mask = torch.randn(5, 8), torch.ones(1, 5, dtype=torch.bool)
    h = anchor.block["text"](x, x, mask, Packing(mask))
    z = anchor.gate["text"](h)
    alpha = 1 / (1 + torch.exp(-(z.clamp(min=0) if relu else z)))
    out = anchor(x, {"text": x}, {"text": mask}, Packing(mask))
    torch.testing.assert_close(out, anchor.merge(h * alpha))
    assert (alpha >= 0.5).all() == relu


def test_released_shares_the_text_anchor_and_adds_the_tags_twice():
    paper, released = make(input_norm=False), make(**RELEASED)
    counts = [sum(p.numel() for p in net.parameters()) for net in (paper, released)]
    block, gate = 6 * 32 * 32 + 6 * 32 + 2 * 32, 32 * 32 + 32
    assert counts[0] - counts[1] == 2 * (block + gate)
    text = released.anchor[TEXT]
    assert text.block["audio"] is text.block["video"] is text.block["text"] and text.gate["audio"] is text.gate["text"]
    assert released.anchor["audio"].block["audio"] is not released.anchor["audio"].block["video"]

    inputs = batch([6])
    out = released(*inputs)
    tags = sinusoidal_positions(6, 32) + released.speaker(inputs[1] + 1)
    masks = dict.fromkeys(WIDTHS, inputs[2])
    sources = {
        "audio": out.hidden["audio"] + tags,
        "video": out.hidden["video"] + tags,
        "text": inputs[0]["text"] + tags,
    }
    sources = {m: x[0] for m, x in sources.items()}
    torch.testing.assert_close(text(sources["text"], sources, masks, Packing(inputs[2])), out.hidden[TEXT][0])


def test_positions_equal_the_formula():
    table = sinusoidal_positions(40, 16)
    for p in (0, 1, 39):
        for i in range(8):
            angle = p / 10000 ** (2 * i / 16)
            assert table[p, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert table[p, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_the_papers_size():
    """42.5 M at D = 768: nine blocks, nine gates, three merges. (Released: 44.57 M, 10.06 M of them unused.)"""
    net = MAGT(FusionConfig(dict.fromkeys(WIDTHS, 768), num_classes=6, num_speakers=2))
    D = 768
    block, gate, merge = 6 * D * D + 6 * D + 2 * D, D * D + D, 3 * D * D + D
    norms, classifiers, speakers = 3 * 2 * D, 3 * (6 * D + 6), 3 * D
    total = 9 * (block + gate) + 3 * merge + norms + classifiers + speakers
    assert sum(p.numel() for p in net.parameters()) == total


@pytest.mark.parametrize("model", [MAGT, Concat, Context])
def test_half_precision_under_autocast(model):
    net, inputs = make(model), batch([9, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(*inputs).logits[TEXT]
    torch.testing.assert_close(low.float(), net(*inputs).logits[TEXT], atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f, s, m: (f | {"smell": f["text"]}, s, m), "made for .*audio.*, got features .*smell"),
        (lambda f, s, m: ({"text": f["text"]}, s, m), "got features"),
        (lambda f, s, m: (f | {"audio": f["text"]}, s, m), r"audio features must be \[1, 4, 20\], got \[1, 4, 32\]"),
        (lambda f, s, m: (f, s, m.float()), "mask must be bool"),
        (lambda f, s, m: (f, s[:, :2], m), r"speakers must be \[1, 4\]"),
        (lambda f, s, m: (f, s, m, {"audio": m[:, :2]}), r"present\['audio'\] must be"),
        (lambda f, s, m: (f, s, m, None, torch.arange(9)), r"places must be \[N\]"),
    ],
)
@pytest.mark.parametrize("model", [MAGT, Concat, Context])
def test_inputs_that_do_not_fit(model, change, words):
    with pytest.raises(ValueError, match=words):
        make(model)(*change(*batch([4])))


@pytest.mark.parametrize(
    "changes, words",
    [({"heads": 5}, "divide by heads"), ({"num_classes": 1}, "2 classes"), ({"widths": {"audio": 3}}, "'text'")],
)
def test_configs_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        FusionConfig(**{"widths": WIDTHS, "num_classes": 5, "num_speakers": 3, "width": 32} | changes)
