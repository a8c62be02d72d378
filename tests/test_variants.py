"""Context by its formula; each field of Released changes what it names and nothing else."""

from dataclasses import replace

import pytest
import torch

import losses
from extras.variants import Context, Released, released
from fusion import MAGT, TEXT, FusionConfig, positions_and_speakers
from magtkd import Recipe, make_optimizer

CONFIG = FusionConfig({TEXT: 32, "audio": 20, "video": 32}, num_classes=5, num_speakers=3, width=32, heads=4)
LENGTHS, PRESENT = [6, 3], {"audio": torch.arange(9) != 2}


def make(build, **changes):
    torch.manual_seed(0)
    model, features = build(replace(CONFIG, **changes)).eval(), {m: torch.randn(9, d) for m, d in CONFIG.widths.items()}
    return model, {"features": features, "speakers": torch.arange(9) % 4, "lengths": LENGTHS, "present": PRESENT}


def test_context_equals_its_formula():
    model, given = make(Context)
    there = {m: PRESENT.get(m, torch.ones(9))[:, None] for m in CONFIG.widths}
    h = model.merge(torch.cat([model.input[m](x) * there[m] for m, x in given["features"].items()], dim=-1))
    h = h + positions_and_speakers(model.speaker, given["speakers"], LENGTHS)
    x = torch.cat([model.block(part, part, [len(part)]) for part in h.split(LENGTHS)])
    torch.testing.assert_close(tuple(model(**given)), ({TEXT: model.classifier(x)}, {TEXT: x}, {}))


@pytest.mark.parametrize("field", ["none", "shared_text_anchor", "relu_gate", "added_twice", "input_norm"])
def test_fields_of_the_model(field):
    """Against the streams written out, over MAGT's own initial weights for this seed."""
    fields = Released(**{} if field == "none" else {field: field != "input_norm"})
    (magt, given), (model, _) = make(MAGT, input_norm=fields.input_norm), make(fields.model)
    h, hidden = magt.inputs(**given), {}
    added = positions_and_speakers(magt.speaker, given["speakers"], LENGTHS) if fields.added_twice else 0
    for m in ("audio", "video", TEXT):
        sources, streams = {n: hidden[n] + added if m == TEXT != n else h[n] for n in h}, []
        for n in h:
            name = TEXT if m == TEXT and fields.shared_text_anchor else n
            x = magt.anchor[m].block[name](h[m], sources[n], LENGTHS, PRESENT.get(n))
            gate = magt.anchor[m].gate[name](x)
            streams.append(x * torch.sigmoid(gate.relu() if fields.relu_gate else gate))
        hidden[m] = magt.anchor[m].merge(torch.cat(streams, dim=-1))
    torch.testing.assert_close(model(**given).hidden, hidden, atol=1e-5, rtol=0)


def test_more_dropout_and_initial_weights():
    """Dropout on both inputs of the cross streams, so that the residual is dropped too, and on attention."""
    model, given = make(Released(more_dropout=True, initial_weights=True).model)
    zeros, block = {}, model.anchor[TEXT].block[TEXT]
    for n, stream in model.anchor[TEXT].block.items():
        stream.register_forward_pre_hook(lambda _, args, n=n: zeros.update({n: torch.cat(args[:2]) == 0}))
    model.train()(**given)
    assert {n: 0.4 < x.float().mean() < 0.6 for n, x in zeros.items()} == {TEXT: False, "audio": True, "video": True}
    assert (block.attention_dropout(), block.eval().attention_dropout()) == (0.5, 0.0)
    for weight in (block.query.weight, *block.key_value.weight.chunk(2)):  # uniform up to sqrt(6 / (32 + 32))
        assert weight.abs().max().item() == pytest.approx((6 / 64) ** 0.5, rel=0.02)
    assert not block.query.bias.any() and not block.key_value.bias.any() and not model.speaker.weight[0].any()
    assert model.speaker.weight[1:].std().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("field", ["branch_cross_entropy", "feature_loss", "detach_teacher"])
def test_fields_of_the_loss(field):
    logits, hidden = ({m: torch.randn(5, 4, requires_grad=True) for m in CONFIG.widths} for _ in range(2))
    labels, weight, audio = torch.tensor([0, 1, 2, 3, 0]), torch.linspace(0.5, 2, 4), torch.tensor([0, 2, 3])
    given = {"alpha": 0.7, "beta": 0.8, "rows": {"audio": audio, "video": audio[:0]}, "weight": weight}
    found = Released(**{field: field == "branch_cross_entropy"}).loss(logits, hidden, labels, **given)["loss"]
    paper = losses.stage2_loss(logits, hidden, labels, **given, detach_teacher=field != "detach_teacher")
    l_ce = losses.cross_entropy(logits["audio"][audio], labels[audio], weight)
    changes = {"branch_cross_entropy": 0.7 * l_ce, "feature_loss": -0.7 * paper["l_f_audio"], "detach_teacher": 0}
    expected = paper["loss"] + changes[field]
    assert found.item() == pytest.approx(expected.item())
    torch.testing.assert_close(*(torch.autograd.grad(x, logits[TEXT])[0] for x in (found, expected)))


def test_the_released_schedule():
    """IEMOCAP, N = 108: 7 batches in each of 30 epochs, while the schedule is made for 3,240 steps, 108 of warm-up."""
    paper = Recipe(lr=1.0, batch=16, epochs=30, warmup_steps=21, total_steps=210, clip=1.0, precision="auto")
    recipe = released("iemocap").recipe(paper, examples=108)
    assert recipe == replace(paper, warmup_steps=108, total_steps=3240, clip=10.0, weight_decay=1e-6)
    _, schedule = make_optimizer(torch.nn.Linear(1, 1), recipe)
    factors = [schedule.lr_lambdas[0](step) for step in (0, 54, 108, 210)]  # before the first step .. after the last
    assert factors == pytest.approx([0, 0.5, 1, 1 - 102 / 3132])
