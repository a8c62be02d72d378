"""Padding and our own parts: each loss, a stage-2 step, the latency of one conversation, and what the encoders cost.

Padding is checked where it is timed: a conversation (MAGT) or an utterance (MulT) in a padded batch must get the logits
that it gets alone. Not here: losses.stage2_loss, which adds three scalars.
"""

from functools import partial

import pytest
import torch
import transformers
from torch import Tensor, nn

import losses
from bench.grid import CORPORA, DEVICE, MATCHED, MODALITIES, PUBLISHED, WIDTH, Case, conversations, utterances
from bench.measure import bytes_for_backward, count_with_fvcore, count_with_torch, magt_flops, mult_flops
from fusion import MAGT, TEXT

needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
MODES = ["eager", pytest.param("torch.compile", marks=needs_cuda), pytest.param("CUDA graph", marks=needs_cuda)]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Padding


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "one by one"])
@pytest.mark.parametrize("name", CORPORA)
def test_corpus(row, timed, name, padded):
    """MAGT on the corpus's typical batch, padded to its longest conversation or one conversation after the other."""
    corpus = CORPORA[name]
    batch, epoch = corpus.typical_batch(16 if timed else 2), corpus.batches()
    model, together = MAGT(corpus.config).to(DEVICE), conversations(batch, WIDTH, DEVICE)
    alone = [one_conversation(together, i, length) for i, length in enumerate(batch)]
    calls = [together] if padded else alone

    flops = corpus.padded_flops if padded else corpus.valid_flops
    on_meta = MAGT(corpus.config).to("meta"), conversations(batch, WIDTH, "meta")
    assert count_with_torch(*on_meta) == count_with_fvcore(*on_meta) == corpus.padded_flops([batch])
    kept = sum(bytes_for_backward(model, inputs, model.parameters()) for inputs in calls)
    model.eval()
    outputs = row(
        lambda: [model(*inputs) for inputs in calls],
        3,
        kind="corpus",
        corpus=name,
        padded=padded,
        utterances=sum(batch),
        flops=flops([batch]).total,
        bytes=kept,
        params=params(model),
        epoch_utterances=sum(corpus.lengths),
        epoch_slots=sum(len(batch) * max(batch) for batch in epoch) if padded else sum(corpus.lengths),
        epoch_flops=flops(epoch).total,
        epoch_flops_attention=flops(epoch).attention,
    )
    for i, (one, length) in enumerate(zip(alone, batch)):
        for m, logits in model(*one).logits.items():
            got = outputs[0].logits[m][i, :length] if padded else outputs[i].logits[m][0]
            torch.testing.assert_close(got, logits[0], rtol=1e-4, atol=1e-4)


def one_conversation(inputs: tuple, i: int, length: int) -> tuple:
    """Conversation i of a batch, without its padding: [1, length, ..]."""
    features, speakers, mask, *_ = inputs

    def cut(x: Tensor) -> Tensor:
        return x[i : i + 1, :length].clone()  # a view would keep the whole batch for the backward pass

    return {m: cut(x) for m, x in features.items()}, cut(speakers), cut(mask)


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


@pytest.mark.parametrize("mode", ["at random, padded", "similar lengths, padded", "at random, packed", *MODES])
@pytest.mark.parametrize("name", CORPORA)
def test_stage2_step(row, rates, timed, name, mode):
    """Eq. 25 with the teacher detached, and AdamW, on a typical batch of 16 conversations.

    Of similar length and packed, where the mode does not say otherwise.
    """
    corpus = CORPORA[name]
    batch = corpus.typical_batch(16 if timed else 2, similar=not mode.startswith("at random"))
    model = MAGT(corpus.config).to(DEVICE)
    padded = mode.endswith("padded")
    inputs = conversations(batch, WIDTH, DEVICE, padded)
    valid = inputs[2].flatten().nonzero().squeeze(1)  # indices and not a mask: their number is known to a CUDA graph
    labels = torch.randint(0, corpus.classes, (len(valid),), device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=DEVICE == "cuda")

    def total_loss(*inputs) -> Tensor:
        logits, hidden = ({m: x.flatten(0, 1).index_select(0, valid) for m, x in y.items()} for y in model(*inputs))
        teacher = logits[TEXT].detach(), hidden[TEXT].detach()
        kd = {m: losses.distillation_loss(logits[m], hidden[m], *teacher) for m in ("audio", "video")}
        l_ce = losses.cross_entropy(logits[TEXT], labels)
        return losses.stage2_loss(l_ce, kd["audio"], kd["video"], corpus.alpha, corpus.beta)

    kept = bytes_for_backward(total_loss, inputs, model.parameters())
    forward = torch.compile(total_loss) if mode == "torch.compile" else total_loss

    def step():
        optimizer.zero_grad()
        loss = forward(*inputs)
        loss.backward()
        optimizer.step()
        return loss

    row(
        captured(step) if mode == "CUDA graph" else step,
        5,
        kind="stage2",
        corpus=name,
        mode=mode,
        utterances=sum(batch),
        params=params(model),
        padding=1 - sum(batch) / (len(batch) * max(batch)),
        flops=(magt_flops(corpus.config, *inputs[2].shape) if padded else corpus.padded_flops([batch])).total,
        useful_flops=3 * corpus.valid_flops([batch]).total,  # forward and backward, of the utterances that are there
        gemm_flops_per_s=rates,
        bytes=kept,
    )


def captured(step):
    """step as one CUDA graph; every replay works on the tensors of the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # lazy initialisations must not be captured
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("U", [8, 47, 110])  # IEMOCAP's shortest, median and longest conversation
def test_latency(row, U, mode):
    """One conversation in, its predictions out."""
    config = CORPORA["MELD"].config
    model, inputs = MAGT(config).to(DEVICE).eval(), conversations([U], WIDTH, DEVICE)
    forward = torch.compile(model) if mode == "torch.compile" else model

    @torch.inference_mode()
    def predict(*inputs):
        return forward(*inputs).logits[TEXT].argmax(dim=-1)

    kept = bytes_for_backward(predict, inputs, model.parameters())  # none
    run = partial(predict, *inputs)
    flops = magt_flops(config, 1, U).total
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


# The encoders, which make the utterance vectors that MAGT starts from

ROBERTA_LARGE = {
    "vocab_size": 50265,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
ENCODERS = {  # name: (model of the published size with random weights, shape of one utterance's input)
    "RoBERTa-large, 256 tokens": (
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**ROBERTA_LARGE), add_pooling_layer=False),
        (256,),
    ),
    "Data2Vec-audio-base, 5 s at 16 kHz": (
        # Without what is random: it leaves out layers, and frames.
        lambda: transformers.Data2VecAudioModel(
            transformers.Data2VecAudioConfig(layerdrop=0.0, apply_spec_augment=False)
        ),
        (80_000,),
    ),
    "TimeSformer-base, 8 frames of 224 x 224": (
        lambda: transformers.TimesformerModel(transformers.TimesformerConfig()),
        (8, 3, 224, 224),
    ),
}


def encoder(name: str, device: str) -> tuple[nn.Module, Tensor]:
    """The model, in training mode, and a batch of 4 utterances (Table 1)."""
    build, shape = ENCODERS[name]
    with torch.device(device):
        inputs = torch.full((4, *shape), 5) if "tokens" in name else torch.randn(4, *shape)  # any token will do
        return build().train(), inputs


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
