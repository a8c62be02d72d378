"""The ways to run MAGT: padded attention gives the logits of ours; a step is the one that magtkd.train takes."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import magtkd
from bench.grid import CORPORA, conversations
from bench.measure import Flops, count_with_fvcore, count_with_torch, magt_flops
from bench.modes import (
    PaddedMAGT,
    bfloat16_is_fast,
    can_run,
    padded_flops,
    stage2_loss_of,
    stage2_step,
)
from data import MODALITIES, Batch
from fusion import MAGT, FusionConfig, Past

CONFIG = FusionConfig(dict.fromkeys(MODALITIES, 16), num_classes=6, num_speakers=2, width=16, heads=4, dropout=0.0)
LENGTHS = [3, 7, 1, 4]
TABLE1 = CORPORA["IEMOCAP"].config


def both(missing: bool = False) -> tuple[MAGT, PaddedMAGT, tuple]:
    """Our model, the padded one with the same weights, and inputs; with `missing`, the third utterance has no sound,
    the last conversation no picture at all."""
    torch.manual_seed(0)
    ours, padded = MAGT(CONFIG), PaddedMAGT(CONFIG)
    padded.load_state_dict(ours.state_dict())
    features, speakers, lengths, present = conversations(LENGTHS, 16, "cpu")
    if missing:
        rows = torch.arange(15)
        present = {"audio": rows != 2, "video": rows < 11}
    return ours, padded, (features, speakers, lengths, present)


def batch(inputs: tuple) -> Batch:
    return Batch(inputs, torch.arange(15) % 6, rows={})


@pytest.mark.parametrize("missing", [False, True])
def test_padded_attention_gives_our_logits_and_gradients(missing):
    ours, padded, inputs = both(missing)
    expected, got = ours(*inputs), padded(*inputs)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for out in (expected, got):
        sum(x.square().mean() for x in out.logits.values()).backward()
    for (name, p), q in zip(ours.named_parameters(), padded.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_padded_attention_is_one_call_per_block():
    ours, padded, inputs = both()
    plain, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q: Tensor, *arguments, **options) -> Tensor:
        shapes.append(tuple(q.shape))
        return plain(q, *arguments, **options)

    with patch("torch.nn.functional.scaled_dot_product_attention", spy):
        padded(*inputs)
        assert shapes == [(4, 4, 7, 4)] * 9  # B, heads, the longest conversation, D / heads
        shapes.clear()
        ours(*inputs)
        assert shapes == [(1, 4, U, 4) for U in LENGTHS] * 9


def test_padding_follows_the_batch():
    """The mask of a batch is kept for its blocks, and must not outlive it."""
    ours, padded, _ = both()
    for lengths in ([2, 5], [5, 2], [2, 5]):
        inputs = conversations(lengths, 16, "cpu")
        torch.testing.assert_close(padded(*inputs).logits, ours(*inputs).logits, rtol=1e-5, atol=1e-5)


def test_three_counts_of_padded_attention_agree():
    with torch.device("meta"):
        model = PaddedMAGT(CONFIG)
    inputs = conversations(LENGTHS, 16, "meta")
    expected = padded_flops(CONFIG, LENGTHS)
    assert count_with_torch(model, inputs) == count_with_fvcore(model, inputs) == expected
    ours = magt_flops(CONFIG, LENGTHS)
    assert expected == Flops(ours.attention * 4 * 7**2 // (3**2 + 7**2 + 1 + 4**2), ours.linear)


def test_padded_attention_refuses_a_causal_model():
    model = PaddedMAGT(dataclasses.replace(CONFIG, causal=True))
    with pytest.raises(ValueError, match="no causal form"):
        model(*conversations([2], 16, "cpu"))
    with pytest.raises(ValueError, match="no causal form"):
        model(*conversations([2], 16, "cpu"), Past())


def test_a_step_is_that_of_the_training_loop(tmp_path):
    """One step here, and one epoch of one batch in magtkd.train: the same loss and the same weights after it."""
    model, _, inputs = both()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    one = batch(inputs)
    steps = 1000  # the schedule of stage2_step: its first learning rate is a hundredth of the peak
    loss = stage2_step(model, one, TABLE1, "eager")()
    after = {name: x.clone() for name, x in model.state_dict().items()}
    assert any(not torch.equal(after[name], start[name]) for name in start)

    model.load_state_dict(start)
    recipe = magtkd.Recipe(TABLE1.stage2_lr / (0.1 * steps), batch=1, epochs=1, clip=TABLE1.clip, precision="float32")
    terms = magtkd.train(
        model,
        {"one": 1},
        lambda names: magtkd.fusion_losses(model(*one.inputs), one, TABLE1),
        lambda: {"dev_f1": 0.0},
        recipe,
        tmp_path / "model",
        0,
    )
    assert terms[0]["train"]["loss"] == pytest.approx(float(loss))
    torch.testing.assert_close(dict(model.state_dict()), after, rtol=0, atol=1e-9)


def test_a_step_in_bfloat16_is_near_that_in_float32():
    model, _, inputs = both()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    found = {}
    for mode in ("eager", "bfloat16"):
        model.load_state_dict(start)
        assert model(*inputs).logits["text"].dtype == torch.float32
        found[mode] = stage2_step(model, batch(inputs), TABLE1, mode)()
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert found["bfloat16"] == pytest.approx(float(found["eager"]), rel=0.02)
    assert found["bfloat16"] != found["eager"]  # another precision was used


def test_what_is_compiled_is_one_graph():
    """Traced as for CUDA, but run without a compiler. In eval mode: CUDA has another dropout than the CPU."""
    model, _, inputs = both()
    loss = stage2_loss_of(model.eval(), batch(inputs), TABLE1, "torch.compile")
    traced = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(*inputs), loss(*inputs))


@pytest.mark.parametrize(
    "found, fast", [({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)]
)
def test_which_modes_a_cpu_can_run(monkeypatch, found, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert bfloat16_is_fast("cpu") is can_run("bfloat16", "cpu") is fast
    assert can_run("eager", "cpu") and can_run("padded", "cpu")
    assert not can_run("torch.compile", "cpu") and not can_run("CUDA graph", "cpu")
    assert can_run("torch.compile", "cuda") and can_run("CUDA graph", "cuda")
