"""Padding and our own parts: each loss, a stage-2 step, the latency of one conversation, and what the encoders cost.

Padding is checked where it is timed: in a batch, a conversation (MAGT) or an utterance (MulT) must get the logits that
it gets alone. Not here: losses.stage2_loss, which adds three scalars.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import losses
from bench.grid import (
    CORPORA,
    DEVICE,
    ENCODERS,
    MATCHED,
    PUBLISHED,
    WIDTH,
    Case,
    conversations,
    encoder,
    utterances,
)
from bench.measure import bytes_for_backward, count_with_fvcore, count_with_torch, magt_flops, mult_flops
from bench.modes import MODES, STAGE2_MODES, PaddedMAGT, can_run, captured, padded_flops, stage2_loss_of, stage2_step
from data import MODALITIES
from fusion import MAGT, TEXT

needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Padding


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "per conversation"])
@pytest.mark.parametrize("name", CORPORA)
def test_corpus(row, timed, name, padded):
    """MAGT on the corpus's typical batch: attention on the batch padded to its longest, or per conversation."""
    corpus = CORPORA[name]
    batch, epoch = corpus.typical_batch()[: None if timed else 2], corpus.epoch()
    build, closed_form = (PaddedMAGT, padded_flops) if padded else (MAGT, magt_flops)
    model, inputs = build(corpus.fusion()).to(DEVICE), conversations(batch, WIDTH, DEVICE)

    on_meta = build(corpus.fusion()).to("meta"), conversations(batch, WIDTH, "meta")
    assert count_with_torch(*on_meta) == count_with_fvcore(*on_meta) == closed_form(corpus.fusion(), batch)
    kept = bytes_for_backward(model, inputs, model.parameters())
    model.eval()
    of_epoch = [closed_form(corpus.fusion(), one) for one in epoch]
    out = row(
        lambda: model(*inputs),
        3,
        kind="corpus",
        corpus=name,
        padded=padded,
        utterances=sum(batch),
        flops=closed_form(corpus.fusion(), batch).total,
        bytes=kept,
        params=params(model),
        epoch_utterances=sum(corpus.lengths),
        epoch_attention_rows=sum(len(one) * max(one) if padded else sum(one) for one in epoch),
        epoch_flops=sum(flops.total for flops in of_epoch),
        epoch_flops_attention=sum(flops.attention for flops in of_epoch),
    )
    alone = [model(*one).logits for one in one_by_one(inputs)]
    for m, logits in out.logits.items():
        torch.testing.assert_close(logits, torch.cat([one[m] for one in alone]), rtol=1e-4, atol=1e-4)


def one_by_one(inputs: tuple) -> list[tuple]:
    """The conversations of a batch, each as a batch of its own."""
    features, speakers, lengths, _ = inputs
    parts = zip(zip(*(x.split(lengths) for x in features.values())), speakers.split(lengths), lengths)
    return [(dict(zip(features, xs)), s, [length], {}) for xs, s, length in parts]


@pytest.mark.parametrize("case", [Case(MATCHED, 20), Case(PUBLISHED, 20, width=40)], ids=str)
def test_padding(row, case):
    """MulT on utterances of different lengths, in each modality another one the longest."""
    frames = [dict(zip(MODALITIES, lengths)) for lengths in ((20, 7, 3), (5, 20, 11), (12, 1, 20))]
    model = case.model(DEVICE).eval()
    inputs = values, masks = utterances(frames, case.config.widths, DEVICE)
    out = row(
        lambda: model(*inputs),
        3,
        kind="padding",
        variant=case.variant,
        params=params(model),
        flops=mult_flops(case.config, len(frames), case.frames).total,
        bytes=bytes_for_backward(model, inputs, model.parameters()),
    )
    for i, lengths in enumerate(frames):
        alone = model(
            {m: x[i : i + 1, : lengths[m]] for m, x in values.items()},
            {m: x[i : i + 1, : lengths[m]] for m, x in masks.items()},
        )
        torch.testing.assert_close(out[i], alone[0], rtol=1e-4, atol=1e-4)
    model.train()


# The losses

B_SIZES = (64, 512, 4096)
LOSSES = {  # name: of (student logits, student features, teacher logits, teacher features, labels)
    "pearson_distance": lambda p, f, p_t, f_t, y: losses.pearson_distance(p, p_t).mean(),
    "soft_label_loss": lambda p, f, p_t, f_t, y: losses.soft_label_loss(p, p_t),
    "feature_loss": lambda p, f, p_t, f_t, y: losses.feature_loss(f, f_t),
    "distillation_loss": lambda p, f, p_t, f_t, y: losses.distillation_loss(p, f, p_t, f_t),
    "cross_entropy": lambda p, f, p_t, f_t, y: losses.cross_entropy(p, y),
    "stage1_loss": lambda p, f, p_t, f_t, y: losses.stage1_loss(p, y, f, p_t, f_t),
}


def loss_inputs(B: int, device: str) -> tuple[Tensor, ...]:
    """Logits and features of a student, which want gradients, and of a teacher; labels."""
    student = [torch.randn(B, width, device=device, requires_grad=True) for width in (6, WIDTH)]
    teacher = [torch.randn(B, width, device=device) for width in (6, WIDTH)]
    return *student, *teacher, torch.randint(0, 6, (B,), device=device)


@pytest.mark.parametrize("B", B_SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(row, timed, name, B):
    loss, inputs = LOSSES[name], loss_inputs(B if timed else min(B_SIZES), DEVICE)

    def forward_backward():
        value = loss(*inputs)
        value.backward()
        gradients = [x.grad for x in inputs[:2] if x.grad is not None]
        for x in inputs[:2]:
            x.grad = None
        return value, gradients

    flops = count_with_torch(loss, inputs).total
    row(forward_backward, 5, kind="loss", loss=name, B=B, flops=flops, bytes=bytes_for_backward(loss, inputs), params=0)


# Stage 2


@pytest.mark.parametrize("mode", [mode for mode in STAGE2_MODES if can_run(mode, DEVICE)])
@pytest.mark.parametrize("name", CORPORA)
def test_stage2_step(row, rates, timed, name, mode):
    """Eq. 25 with the teacher detached, clipping and AdamW, on a typical batch of 16 conversations."""
    corpus = CORPORA[name]
    lengths = corpus.typical_batch()[: None if timed else 2]
    build, closed_form = (PaddedMAGT, padded_flops) if mode == "padded" else (MAGT, magt_flops)
    model, batch = build(corpus.fusion()).to(DEVICE), corpus.batch(lengths, DEVICE)
    loss = stage2_loss_of(model, batch, corpus.config, mode)
    kept = bytes_for_backward(loss, batch.inputs, model.parameters())
    row(
        stage2_step(model, batch, corpus.config, mode),
        5,
        kind="stage2",
        corpus=name,
        mode=mode,
        utterances=sum(lengths),
        params=params(model),
        padding=1 - sum(lengths) / (len(lengths) * max(lengths)) if mode == "padded" else 0.0,
        flops=closed_form(corpus.fusion(), lengths).total,
        useful_flops=3 * magt_flops(corpus.fusion(), lengths).total,  # forward and backward, without padding
        gemm_flops_per_s=rates,
        bytes=kept,
    )


@pytest.mark.parametrize("mode", [mode for mode in MODES if can_run(mode, DEVICE)])
@pytest.mark.parametrize("U", [8, 47, 110])  # IEMOCAP's shortest, median and longest conversation
def test_latency(row, U, mode):
    """One conversation in, its predictions out."""
    config = CORPORA["MELD"].fusion()
    model, inputs = MAGT(config).to(DEVICE).eval(), conversations([U], WIDTH, DEVICE)
    forward = torch.compile(model) if mode == "torch.compile" else model

    @torch.inference_mode()
    def predict(*inputs):
        return forward(*inputs).logits[TEXT].argmax(dim=-1)

    kept = bytes_for_backward(predict, inputs, model.parameters())  # none
    run = partial(predict, *inputs)
    flops = magt_flops(config, [U]).total
    row(
        captured(run) if mode == "CUDA graph" else run,
        20,
        kind="latency",
        U=U,
        mode=mode,
        params=params(model),
        flops=flops,
        bytes=kept,
    )


# The encoders, whose features MAGT starts from


def encoder_facts(name: str) -> dict:
    """Counted on the meta device, so the bytes are those of attention spelled out."""
    model, inputs = encoder(name, "meta")
    flops, kept = count_with_torch(model, (inputs,)).total, bytes_for_backward(model, (inputs,), model.parameters())
    return {"encoder": name, "samples": 4, "flops": flops, "bytes": kept, "params": params(model)}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_count(row, name):
    model, inputs = encoder(name, "meta")
    facts = encoder_facts(name)
    again = row(lambda: count_with_torch(model, (inputs,)), 1, kind="encoder count", **facts)
    assert again.total == facts["flops"]  # nothing random in it


@needs_cuda
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_step(row, name):
    model, inputs = encoder(name, DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        optimizer.zero_grad()
        loss = model(inputs).last_hidden_state.mean(dim=1).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    row(step, 5, kind="encoder step", **encoder_facts(name))
