"""The fusion models: what must hold whatever the weights are, and the equations written out once more by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from extras.anatomy import OpenAnchor, OtherAnchor
from extras.context import Context
from extras.released import RELEASED, Differences, ReleasedAnchor, ReleasedConfig, swap_anchors
from fusion import MAGT, TEXT, Anchor, Block, Concat, Dropout, FusionConfig, Past, sinusoidal_positions

WIDTHS = {"text": 32, "audio": 20, "video": 32}
SETS = [("text",), ("text", "audio"), ("video", "text"), ("text", "audio", "video")]


def released(config):
    """The authors' MAGT, as `--preset released` makes it."""
    return RELEASED["iemocap"].method().models["MAGT"](config)


OF_THE_AUTHORS = {"input_norm": RELEASED["iemocap"].input_norm}
MAGTS = [(MAGT, {}), (released, OF_THE_AUTHORS)]
MODELS = [*MAGTS, (Concat, {}), (Concat, OF_THE_AUTHORS), (Context, {}), (Context, OF_THE_AUTHORS)]
CAUSAL = [(model, changes | {"causal": True}) for model, changes in MODELS if model is not Concat]


def make(model=MAGT, modalities=tuple(WIDTHS), seed=0, **changes):
    torch.manual_seed(seed)
    widths = {m: WIDTHS[m] for m in modalities}
    return model(FusionConfig(widths, num_classes=5, num_speakers=3, width=32, heads=4, **changes)).eval()


def batch(lengths, modalities=tuple(WIDTHS), seed=1):
    """features {m: [N, d_m]}, speakers [N], lengths."""
    generator = torch.Generator().manual_seed(seed)
    features = {m: torch.randn(sum(lengths), WIDTHS[m], generator=generator) for m in modalities}
    return features, torch.randint(1, 4, (sum(lengths),), generator=generator), lengths


def here_and_there(lengths, modalities=("audio", "video"), seed=2):
    """present {m: [N]}: no sound in conversation 0, no picture at any beginning, and one in three missing besides."""
    generator = torch.Generator().manual_seed(seed)
    present = {m: torch.rand(sum(lengths), generator=generator) > 0.3 for m in ("audio", "video")}
    present["audio"][: lengths[0]] = False
    present["video"][[sum(lengths[:b]) for b in range(len(lengths))]] = False
    return {m: x for m, x in present.items() if m in modalities}


def pick(rows, features, speakers, present):
    """Some rows of a model's inputs."""
    return {m: x[rows] for m, x in features.items()}, speakers[rows], {m: x[rows] for m, x in present.items()}


def rows_of(lengths):
    """The rows of each conversation."""
    return list(torch.arange(sum(lengths)).split(lengths))


# Whatever the weights are.


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("modalities", SETS)
@pytest.mark.parametrize("model, changes", MODELS + CAUSAL)
def test_batching_changes_nothing(model, changes, modalities, missing):
    lengths = [7, 1, 4, 12]
    net, (features, speakers, _) = make(model, modalities, **changes), batch(lengths, modalities)
    present = here_and_there(lengths, modalities) if missing else {}
    together = net(features, speakers, lengths, present)
    assert all(len(x) == 24 for part in together for x in part.values())
    for rows in rows_of(lengths):
        f, s, p = pick(rows, features, speakers, present)
        alone = net(f, s, [len(rows)], p)
        for m in alone.logits:
            torch.testing.assert_close(together.logits[m][rows], alone.logits[m], atol=1e-6, rtol=0)
            torch.testing.assert_close(together.hidden[m][rows], alone.hidden[m], atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", [MAGT, Concat, Context])
def test_the_recipe_for_padded_data(model):
    """As the docstring of the module says; and x[mask] = .. is the way back."""
    net, (features, speakers, lengths) = make(model), batch([7, 1, 4])
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    padded = {m: torch.full((3, 7, d), 1e3) for m, d in WIDTHS.items()}  # 1e3: whatever stands in the padding
    who = torch.full((3, 7), 99)
    for b, rows in enumerate(rows_of(lengths)):
        who[b, : len(rows)] = speakers[rows]
        for m, x in features.items():
            padded[m][b, : len(rows)] = x[rows]
    found = net({m: x[mask] for m, x in padded.items()}, who[mask], mask.sum(1).tolist()).logits[TEXT]
    assert torch.equal(found, net(features, speakers, lengths).logits[TEXT])
    back = torch.zeros(3, 7, 5)
    back[mask] = found
    for b, rows in enumerate(rows_of(lengths)):
        assert torch.equal(back[b, : len(rows)], found[rows]) and not back[b, len(rows) :].any()


@pytest.mark.parametrize("model, changes", MODELS)
def test_permuting_the_conversations_permutes_the_output(model, changes):
    net, (features, speakers, lengths) = make(model, **changes), batch([7, 1, 4])
    order = [2, 0, 1]
    rows = torch.cat([rows_of(lengths)[b] for b in order])
    permuted = net({m: x[rows] for m, x in features.items()}, speakers[rows], [lengths[b] for b in order])
    for m, logits in net(features, speakers, lengths).logits.items():
        torch.testing.assert_close(logits[rows], permuted.logits[m], atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", [MAGT, Concat, Context])
def test_the_order_of_the_modalities_does_not_matter(model):
    net, (features, speakers, lengths) = make(model), batch([7, 1])
    turned = dict(reversed(features.items()))
    assert torch.equal(net(features, speakers, lengths).logits[TEXT], net(turned, speakers, lengths).logits[TEXT])


@pytest.mark.parametrize("model, changes", [*MAGTS, (Context, {})])
def test_order_speakers_and_the_rest_of_the_conversation_matter(model, changes):
    net, (features, speakers, lengths) = make(model, **changes), batch([6])
    logits = net(features, speakers, lengths).logits[TEXT]
    flipped = net({m: x.flip(0) for m, x in features.items()}, speakers.flip(0), lengths).logits[TEXT].flip(0)
    assert (logits - flipped).abs().max() > 1e-3
    assert (logits - net(features, speakers % 3 + 1, lengths).logits[TEXT]).abs().max() > 1e-3
    for m in features:
        changed = {n: x.clone() for n, x in features.items()}
        changed[m][5] *= -1
        assert (logits - net(changed, speakers, lengths).logits[TEXT])[0].abs().max() > 1e-5, m
    apart = net(features, speakers, [3, 3]).logits[TEXT]  # two conversations: the second begins anew, at position 0
    assert (logits - apart).abs().amax(dim=1).min() > 1e-5


def test_concat_sees_one_utterance_alone():
    net, (features, speakers, lengths) = make(Concat), batch([6])
    before = net(features, speakers, lengths).logits[TEXT]
    features["video"][5] *= -1
    after = net(features, speakers % 3 + 1, [2, 4]).logits[TEXT]
    torch.testing.assert_close(before[:5], after[:5])
    assert (before - after)[5].abs().max() > 1e-3


@pytest.mark.parametrize("modalities", SETS)
@pytest.mark.parametrize("model, changes", MODELS + CAUSAL)
def test_every_parameter_gets_a_gradient(model, changes, modalities):
    net = make(model, modalities, **changes).train()
    out = net(*batch([9, 5], modalities))
    sum(x.square().mean() for x in out.logits.values()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("model, changes", MODELS + CAUSAL)
def test_missing_sound_is_read_by_nobody(model, changes):
    net, (features, speakers, lengths) = make(model, **changes), batch([6, 3])
    present = {"audio": torch.arange(9) != 2}
    before = net(features, speakers, lengths, present)
    everyone = net(features, speakers, lengths).logits[TEXT]
    features["audio"][2] = 1e3
    after = net(features, speakers, lengths, present)
    for m in before.logits:
        assert torch.equal(before.logits[m], after.logits[m])
    others = [3, 4, 5] if model is not Concat else []  # who reads it, where it is there
    assert (after.logits[TEXT] - everyone).abs().amax(dim=1)[[2, *others]].min() > 1e-5
    torch.testing.assert_close(after.logits[TEXT][6:], everyone[6:], atol=1e-6, rtol=0)  # another conversation


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("model, changes", MAGTS)
def test_an_anchor_reads_nothing_where_sound_is_missing(model, changes, name, causal):
    """Neither the zero that stands for the sound, nor the position and the speaker that are added to it."""
    anchor = make(model, causal=causal, **changes).anchor[name]
    torch.manual_seed(0)
    h = {m: torch.randn(9, 32) for m in WIDTHS}
    changed = h | {"audio": h["audio"].index_fill(0, torch.tensor([2]), 5.0)}
    present = {"audio": torch.arange(9) != 2}
    assert torch.equal(anchor(h[name], h, [6, 3], present), anchor(h[name], changed, [6, 3], present))
    assert not torch.equal(anchor(h[name], h, [6, 3], {}), anchor(h[name], changed, [6, 3], {}))


@pytest.mark.parametrize("model, changes", MODELS + CAUSAL)
def test_a_conversation_without_any_sound(model, changes):
    net, (features, speakers, lengths) = make(model, **changes).train(), batch([6, 3])
    out = net(features, speakers, lengths, {"audio": torch.arange(9) >= 6})
    sum(x.square().mean() for x in out.logits.values()).backward()
    assert all(x.isfinite().all() for part in out for x in part.values())
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("width", [20, 32])
def test_the_scale_of_the_input_does_not_matter(width):
    torch.manual_seed(0)
    net = MAGT(FusionConfig({"text": width}, num_classes=5, num_speakers=3, width=32, heads=4)).eval()
    with torch.no_grad():
        for layer in net.input["text"]:
            if isinstance(layer, torch.nn.Linear):
                layer.bias.zero_()
    x, speakers = torch.randn(12, width), torch.ones(12, dtype=torch.long)
    small, large = (net({"text": scale * x}, speakers, [6, 6]).logits[TEXT] for scale in (0.1, 10))
    torch.testing.assert_close(small, large, atol=1e-2, rtol=0)
    assert small.std() > 0.1


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
    net, (features, speakers, lengths) = make(), batch([4])
    assert not net.speaker(torch.tensor(0)).any()
    unknown = torch.zeros_like(speakers)
    before = net(features, unknown, lengths).logits[TEXT]
    assert not torch.equal(before, net(features, speakers, lengths).logits[TEXT])
    net.train()(features, unknown, lengths).logits[TEXT].sum().backward()
    assert not net.speaker.weight.grad.any()
    with torch.no_grad():
        net.speaker.weight[1:] = 7.0
    assert torch.equal(before, net.eval()(features, unknown, lengths).logits[TEXT])


# The past and the present alone.


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("model, changes", CAUSAL)
def test_a_causal_model_sees_no_future(model, changes, missing):
    lengths, later = [9, 9], torch.arange(18) % 9 >= 5
    net, (features, speakers, _) = make(model, **changes), batch(lengths)
    present = here_and_there(lengths) if missing else {}
    before = net(features, speakers, lengths, present)
    for x in features.values():
        x[later] *= -1
    after = net(features, torch.where(later, speakers % 3 + 1, speakers), lengths, present)
    for m in before.logits:
        assert torch.equal(before.logits[m][~later], after.logits[m][~later])
        assert (before.logits[m] - after.logits[m])[later].abs().amax(dim=-1).min() > 1e-3
    features["text"][0] *= -1  # the past, on the other hand, counts
    assert not torch.equal(after.logits[TEXT][4], net(features, speakers, lengths, present).logits[TEXT][4])


@pytest.mark.parametrize("modalities", SETS)
@pytest.mark.parametrize("model, changes", MAGTS)
def test_one_utterance_at_a_time_equals_the_whole(model, changes, modalities):
    """The past, over 40 utterances, with sound and picture missing and speakers unknown."""
    lengths = [40, 40, 40]
    net, (features, speakers, _) = make(model, modalities, causal=True, **changes), batch(lengths, modalities)
    speakers[40:80] = 0
    speakers[7::40] = 0
    present = here_and_there(lengths, modalities)
    whole, past = net(features, speakers, lengths, present), Past()
    for u in range(40):
        rows = torch.tensor([u, 40 + u, 80 + u])
        out = net.step(past, *pick(rows, features, speakers, present))
        for m in whole.logits:
            torch.testing.assert_close(out.logits[m], whole.logits[m][rows], atol=1e-5, rtol=0)
            torch.testing.assert_close(out.hidden[m], whole.hidden[m][rows], atol=1e-5, rtol=0)
    assert past.lengths == [40, 40, 40]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("model, changes", MAGTS)
def test_several_utterances_at_a_time_equal_the_whole(model, changes, missing):
    """Conversations of different lengths, each in parts of its own; what is missing is said in some parts alone."""
    lengths, parts = [9, 4, 12], [[3, 1, 2], [1, 1, 9], [5, 2, 1]]
    net, (features, speakers, _) = make(model, causal=True, **changes), batch(lengths)
    present = here_and_there(lengths) if missing else {}
    if missing:
        for b, rows in enumerate(rows_of(lengths)):  # all is there in the second part
            for x in present.values():
                x[rows[parts[0][b] : parts[0][b] + parts[1][b]]] = True
    whole, past, read = net(features, speakers, lengths, present), Past(), [0, 0, 0]
    for number, part in enumerate(parts):
        rows = torch.cat([rows_of(lengths)[b][read[b] : read[b] + n] for b, n in enumerate(part)])
        f, s, p = pick(rows, features, speakers, present)
        out = net(f, s, part, None if number == 1 else p, past)
        read = [n + before for n, before in zip(part, read)]
        assert past.lengths == read
        for m in whole.logits:
            torch.testing.assert_close(out.logits[m], whole.logits[m][rows], atol=1e-5, rtol=0)
            torch.testing.assert_close(out.hidden[m], whole.hidden[m][rows], atol=1e-5, rtol=0)
    assert read == lengths


def test_only_a_causal_model_has_a_past():
    features, speakers, lengths = batch([1])
    with pytest.raises(ValueError, match="causal=True"):
        make().step(Past(), features, speakers)
    with pytest.raises(ValueError, match="causal=True"):
        make()(features, speakers, lengths, None, Past())


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1]])
def test_a_past_of_other_conversations(lengths):
    net, past = make(causal=True), Past()
    net(*batch([3, 2]), None, past)
    with pytest.raises(ValueError, match=f"the past is of 2 conversations, lengths is of {len(lengths)}"):
        net(*batch(lengths), None, past)
    assert past.lengths == [3, 2]


# The equations by hand.


def test_context_equals_the_formula():
    net, (features, speakers, lengths) = make(Context), batch([6])
    present = {"audio": torch.arange(6) != 2}
    normed = {m: net.input[m](x) for m, x in features.items()}
    normed["audio"][2] = 0
    h = net.merge(torch.cat([normed[m] for m in WIDTHS], dim=-1)) + sinusoidal_positions(6, 32)
    h = h + net.speaker.weight[speakers]
    out = net(features, speakers, lengths, present)
    torch.testing.assert_close(out.logits[TEXT], net.classifier(net.block(h, h, lengths)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [[5], [3, 2]])
def test_block_equals_the_formula(lengths, causal):
    """Eq. 19-20 head by head: x = q + MHA(q, kv, kv); x + FFN(LN(x)). Nobody reads another conversation."""
    config = FusionConfig({"text": 8}, 2, 1, width=8, heads=2, causal=causal)
    torch.manual_seed(0)
    block = Block(config).eval()
    anchor, source = torch.randn(2, 5, 8)
    readable = torch.tensor([True, True, False, True, False])
    conversation = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    may_read = readable & (conversation[:, None] == conversation)
    if causal:
        may_read &= torch.arange(5) <= torch.arange(5)[:, None]
    q, (k, v) = block.query(anchor), block.key_value(source).chunk(2, dim=-1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        score = (q[:, h] @ k[:, h].T / math.sqrt(4)).masked_fill(~may_read, -math.inf)
        heads.append(score.softmax(-1) @ v[:, h])
    x = anchor + block.out(torch.cat(heads, dim=-1))
    norm, up, _, _, down, _ = block.ffn
    expected = x + down(F.gelu(up(norm(x))))
    torch.testing.assert_close(block(anchor, source, lengths, readable), expected)


@pytest.mark.parametrize("relu", [False, True])
def test_gate_equals_the_formula(relu):
    """Eq. 21-22, one stream: merge(h * sigmoid(W h + b)); the released gate has a ReLU inside and is at least 0.5."""
    torch.manual_seed(0)
    sizes = ({"text": 8}, 2, 1, 8, 2)
    released = ReleasedAnchor(ReleasedConfig(*sizes, relu_gate=True), "text")
    anchor = (released if relu else Anchor(FusionConfig(*sizes), "text")).eval()
    x = torch.randn(5, 8)
    h = anchor.block["text"](x, x, [5])
    z = anchor.gate["text"](h)
    alpha = 1 / (1 + torch.exp(-(z.clamp(min=0) if relu else z)))
    torch.testing.assert_close(anchor(x, {"text": x}, [5], {}), anchor.merge(h * alpha))
    assert (alpha >= 0.5).all() == relu


def test_the_order_of_the_anchors():
    """Audio and video read the raw sequences; text, last, reads itself and the two enriched ones."""
    net, (features, speakers, lengths) = make(), batch([6, 3])
    present = here_and_there(lengths)
    tags = torch.cat([sinusoidal_positions(6, 32), sinusoidal_positions(3, 32)]) + net.speaker.weight[speakers]
    h = {m: net.input[m](x) * present.get(m, torch.ones(9))[:, None] + tags for m, x in features.items()}  # Eq. 18
    expected = {m: net.anchor[m](h[m], h, lengths, present) for m in ("audio", "video")}
    expected[TEXT] = net.anchor[TEXT](h[TEXT], {TEXT: h[TEXT], **expected}, lengths, present)
    out = net(features, speakers, lengths, present)
    for m in WIDTHS:
        torch.testing.assert_close(out.hidden[m], expected[m])
        torch.testing.assert_close(out.logits[m], net.classifier[m](expected[m]))


def test_released_shares_the_text_anchor_and_adds_the_tags_twice():
    paper, theirs = make(input_norm=False), make(released, **OF_THE_AUTHORS)
    counts = [sum(p.numel() for p in net.parameters()) for net in (paper, theirs)]
    block, gate = 6 * 32 * 32 + 6 * 32 + 2 * 32, 32 * 32 + 32
    assert counts[0] - counts[1] == 2 * (block + gate)
    text = theirs.anchor[TEXT]
    assert text.block["audio"] is text.block["video"] is text.block["text"] and text.gate["audio"] is text.gate["text"]
    assert theirs.anchor["audio"].block["audio"] is not theirs.anchor["audio"].block["video"]

    features, speakers, lengths = batch([6])
    out = theirs(features, speakers, lengths)
    tags = sinusoidal_positions(6, 32) + theirs.speaker(speakers)
    sources = {m: out.hidden[m] + tags for m in ("audio", "video")} | {"text": features["text"] + tags}
    torch.testing.assert_close(text(sources["text"], sources, lengths, {}), out.hidden[TEXT])


def test_with_every_switch_off_released_is_the_paper():
    model = Differences().method().models["MAGT"]
    ours, theirs, inputs = make(), make(model), batch([6, 3])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    present = here_and_there([6, 3])
    for m, x in ours(*inputs, present).logits.items():
        assert torch.equal(x, theirs(*inputs, present).logits[m])


@pytest.mark.parametrize("anchor", [ReleasedAnchor, OpenAnchor, OtherAnchor])
def test_other_anchors_begin_with_magts_weights(anchor):
    """So that a row of a table differs from MAGT's by what it changes, and not by another draw."""
    config = ReleasedConfig(WIDTHS, 4, 3, 32, 4)
    torch.manual_seed(0)
    drawn = MAGT(config).state_dict()
    torch.manual_seed(0)
    found = swap_anchors(MAGT(config), anchor).state_dict()
    new = [name for name, x in found.items() if name not in drawn or not torch.equal(x, drawn[name])]
    assert all("merge" in name for name in new) and bool(new) == (anchor is OtherAnchor)  # it merges fewer streams


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


@pytest.mark.parametrize("model, changes", MODELS + CAUSAL)
def test_half_precision_under_autocast(model, changes):
    net, inputs = make(model, **changes), batch([9, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(*inputs).logits[TEXT]
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), net(*inputs).logits[TEXT], atol=0.05, rtol=0.05)


# What does not fit is named.


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f, s, n: (f | {"smell": f["text"]}, s, n), "made for .*audio.*, got features .*smell"),
        (lambda f, s, n: ({"text": f["text"]}, s, n), "got features"),
        (lambda f, s, n: (f | {"audio": f["text"]}, s, n), r"audio features must be \[4, 20\], got \[4, 32\]"),
        (lambda f, s, n: (f | {"text": f["text"][None]}, s, n), r"text features must be \[4, 32\], got \[1, 4, 32\]"),
        (lambda f, s, n: (f, s[:2], n), r"speakers must be \[4\]"),
        (lambda f, s, n: (f, s[None], n), r"speakers must be \[4\]"),
        (lambda f, s, n: (f, s, [2, 3]), r"speakers must be \[5\], the sum of lengths"),
        (lambda f, s, n: (f, s, [4, 0]), "lengths must be numbers from 1"),
        (lambda f, s, n: (f, s, []), "lengths must be numbers from 1"),
        (lambda f, s, n: (f, s, n, {"audio": s[:2] > 0}), r"present\['audio'\] must be bool \[4\]"),
        (lambda f, s, n: (f, s, n, {"audio": torch.ones(4)}), r"present\['audio'\] must be bool \[4\]"),
    ],
)
@pytest.mark.parametrize("model", [MAGT, released, Concat, Context])
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
