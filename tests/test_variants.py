"""Context by its formula; each field of Released changes what it names and nothing else."""

from dataclasses import make_dataclass, replace

import pytest
import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

import losses
from extras.variants import Context, Released, released
from fusion import MAGT, TEXT, FusionConfig, positions_and_speakers

CONFIG = FusionConfig({TEXT: 32, "audio": 20, "video": 32}, num_classes=5, num_speakers=3, width=32, heads=4)
LENGTHS, PRESENT = [6, 3], {"audio": torch.arange(9) != 2}


def make(build, **changes):
    """A model of seed 0 in eval mode, and the arguments of its forward."""
    torch.manual_seed(0)
    model, features = build(replace(CONFIG, **changes)).eval(), {m: torch.randn(9, d) for m, d in CONFIG.widths.items()}
    return model, {"features": features, "speakers": torch.arange(9) % 4, "lengths": LENGTHS, "present": PRESENT}


def test_context_equals_its_formula():
    model, given = make(Context)
    parts = {m: model.input[m](x) for m, x in given["features"].items()}
    parts["audio"] = parts["audio"] * PRESENT["audio"][:, None]
    h = model.merge(torch.cat(list(parts.values()), dim=-1))
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
    found = model(**given)
    torch.testing.assert_close(found.hidden, hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits[TEXT], magt.classifier[TEXT](hidden[TEXT]), atol=1e-5, rtol=0)


def test_more_dropout_and_xavier():
    """Dropout on both inputs of the six cross streams, so that the residual is dropped too, and on attention."""
    model, given = make(Released(more_dropout=True, xavier=True).model)
    zeros, block = {}, model.anchor[TEXT].block[TEXT]
    for m, anchor in model.anchor.items():
        for n, stream in anchor.block.items():
            stream.register_forward_pre_hook(lambda _, args, at=(m, n): zeros.update({at: torch.cat(args[:2]) == 0}))
    model.train()(**given)
    assert len(zeros) == 9
    assert all(0.4 < x.float().mean() < 0.6 if m != n else not x.any() for (m, n), x in zeros.items())
    block.drop.p, x = 0.0, torch.randn(9, 32)
    for mode in (True, False):
        assert torch.equal(block.train(mode)(x, x, [9]), block(x, x, [9])) != mode
    for weight in (block.query.weight, *block.key_value.weight.chunk(2)):  # uniform up to sqrt(6 / (32 + 32))
        assert weight.abs().max().item() == pytest.approx((6 / 64) ** 0.5, rel=0.02)


@pytest.mark.parametrize("field", ["branch_cross_entropy", "feature_loss", "detach_teacher"])
def test_fields_of_the_loss(field):
    torch.manual_seed(0)
    logits, hidden = ({m: torch.randn(5, 4, requires_grad=True) for m in CONFIG.widths} for _ in range(2))
    labels, weight, audio = torch.tensor([0, 1, 2, 3, 0]), torch.linspace(0.5, 2, 4), torch.tensor([0, 2, 3])
    given = {"alpha": 0.7, "beta": 0.8, "rows": {"audio": audio, "video": audio[:0]}, "weight": weight}
    found = Released(**{field: field == "branch_cross_entropy"}).loss(logits, hidden, labels, **given)["loss"]
    paper = losses.stage2_loss(logits, hidden, labels, **given, detach_teacher=field != "detach_teacher")
    l_ce = losses.cross_entropy(logits["audio"][audio], labels[audio], weight)
    changes = {"branch_cross_entropy": 0.7 * l_ce, "feature_loss": -0.7 * paper["l_f_audio"], "detach_teacher": 0}
    expected = paper["loss"] + changes[field]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits[TEXT])[0] for x in (found, expected)))


def test_the_released_schedule():
    """IEMOCAP, N = 108: 7 batches in each of 30 epochs, while the schedule is made for 3,240 steps, 108 of warm-up."""
    Recipe = make_dataclass("Recipe", ["epochs", "warmup_steps", "total_steps", "clip", "weight_decay"])
    paper = Recipe(epochs=30, warmup_steps=21, total_steps=210, clip=1.0, weight_decay=0.01)
    recipe = released("iemocap").recipe(paper, examples=108)
    assert recipe == Recipe(epochs=30, warmup_steps=108, total_steps=3240, clip=10.0, weight_decay=1e-6)
    assert Released().recipe(paper, examples=108) == paper
    assert all(getattr(released("meld"), name) != value for name, value in vars(Released()).items())
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.total_steps)
    factors = [schedule.lr_lambdas[0](step) for step in (0, 54, 108, 210)]  # before the first step .. after the last
    assert factors == pytest.approx([0, 0.5, 1, 1 - 102 / 3132])
