"""A rehearsal of the CUDA side on a machine without a GPU.

In torch's FakeTensorMode a tensor has a shape, a type and a device, and no values: models run on "cuda" that is not
there, and an operation on tensors of two devices raises. Both stages' forward passes and losses go through it in
autocast's types, and so do an evaluation, the encoding, a prediction and a step of the optimiser.

What asks for values is answered from outside (`fake_cuda`). Not rehearsed: the backward pass (autograd asks for the
real device), and whether the numbers are right. Both are the part "correctness" of `python -m bench.gpu`.
"""

import contextlib

import pytest
import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import losses
import magtkd
from data import MODALITIES, Batch, Conversation, Conversations, FeatureFile, read_iemocap
from encoders import ENCODERS
from extras import predict, released
from extras.context import Context
from fusion import MAGT, TEXT, Concat, Dropout, FusionConfig, Past

CUDA = torch.device("cuda", 0)
D, C, LENGTHS = 16, 6, [2, 3]
N = sum(LENGTHS)
CONFIG = magtkd.Config(width=D, heads=2)


@pytest.fixture
def fake_cuda(monkeypatch):
    """FakeTensorMode with a CUDA device that autocast believes in, and answers to all that asks for values.

    tolist gives zeros; nonzero finds two of them; the mean of loss terms is 0; a condition (layer drop's) is false. The
    sound that an example holds is real, and read as such.
    """
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: zeros(x.shape))
    monkeypatch.setattr(FakeTensor, "__bool__", lambda x: False, raising=False)
    monkeypatch.setattr(Tensor, "numpy", real_numpy)
    # A fake tensor of one number keeps that number beside it, and would take it to the real device.
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)
    monkeypatch.setattr(Tensor, "nonzero", lambda x: torch.zeros(2, x.dim(), dtype=torch.int64, device=x.device))
    monkeypatch.setattr(magtkd, "mean_terms", lambda terms: dict.fromkeys(terms[0], 0.0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def no_fake() -> contextlib.AbstractContextManager:
    """What runs in it runs on real tensors."""
    return torch.utils._python_dispatch._disable_current_modes()


def real_numpy(x: Tensor, numpy=Tensor.numpy):
    with no_fake():
        return numpy(x)


def zeros(shape: torch.Size) -> list | int:
    return [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


def to_cuda(model: nn.Module) -> nn.Module:
    """What model.to("cuda") does: parameters and buffers move, whatever else the model keeps stays on the CPU."""
    for module in model.modules():
        for name, x in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(x.shape, device=CUDA)))
        for name, x in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(x.shape, dtype=x.dtype, device=CUDA))
    return model


def features(device=CUDA, n: int = N) -> dict[str, Tensor]:
    return {m: torch.randn(n, D, device=device) for m in MODALITIES}


def batch(missing: bool) -> Batch:
    """Two conversations; with `missing`, three utterances have no sound."""
    speakers = torch.ones(N, dtype=torch.int64, device=CUDA)
    labels = torch.zeros(N, dtype=torch.int64, device=CUDA)
    present = {"audio": torch.ones(N, dtype=torch.bool, device=CUDA)} if missing else {}
    rows = {"audio": torch.zeros(2, dtype=torch.int64, device=CUDA)} if missing else {}
    return Batch((features(), speakers, LENGTHS, present), labels, rows)


def fusion_config(causal: bool = False) -> FusionConfig:
    return FusionConfig(dict.fromkeys(MODALITIES, D), C, 2, D, 2, causal=causal)


RELEASED = released.RELEASED["iemocap"].method()
METHODS = {  # how to build it, its losses, causal
    "MAGT": (MAGT, magtkd.PAPER.losses, False),
    "MAGT, causal": (MAGT, magtkd.PAPER.losses, True),
    "Concat": (Concat, magtkd.PAPER.losses, False),
    "Context": (Context, magtkd.PAPER.losses, False),
    "MAGT, released": (RELEASED.models["MAGT"], RELEASED.losses, False),
}


@pytest.mark.parametrize("missing", [False, True], ids=["whole", "sound missing"])
@pytest.mark.parametrize("name", METHODS)
def test_stage2(fake_cuda, name, missing):
    build, loss_terms, causal = METHODS[name]
    model, given = to_cuda(build(fusion_config(causal))), batch(missing)
    autocast, _ = magtkd.mixed_precision(CUDA, "auto")
    with autocast:
        out = model(*given.inputs)
        terms = loss_terms(out, given, CONFIG, torch.ones(C, device=CUDA))
    assert {x.dtype for x in out.logits.values()} == {torch.bfloat16}  # so autocast was at work
    assert {(x.device, x.dtype, x.shape) for x in terms.values()} == {(CUDA, torch.float32, torch.Size([]))}


@pytest.mark.parametrize("missing", [False, True], ids=["whole", "sound missing"])
def test_evaluation(fake_cuda, missing):
    """From a feature file on the CPU to scores, as after each epoch of stage 2."""
    data = conversations(missing)
    result = magtkd.evaluate_fusion(to_cuda(MAGT(fusion_config())), data, "dev", CONFIG, magtkd.PAPER, None)
    assert len(result["labels"]) == len(result["predictions"]) == N
    assert data.batch(data.splits["train"]).labels.device == CUDA


def conversations(missing: bool) -> Conversations:
    """Three splits of two conversations each, on the device."""
    with no_fake():  # reading a file asks for values
        conversation = torch.arange(6).repeat_interleave(torch.tensor(LENGTHS * 3))
        split = torch.arange(3).repeat_interleave(N)
        present = {m: torch.ones(3 * N, dtype=torch.bool) for m in MODALITIES}
        present["audio"][::2] = not missing
        names = {"label_names": ["a"] * C, "speaker_names": ["s"], "utterance_names": ["u"] * 3 * N}
        names["conversation_names"] = list("abcdef")
        label, speaker = torch.zeros(3 * N, dtype=torch.int64), torch.zeros(3 * N, dtype=torch.int64)
        file = FeatureFile(features("cpu", 3 * N), present, label, speaker, conversation, split, **names)
        data = Conversations(file, MODALITIES, torch.device("cpu"))
    assert bool(data.present) == missing
    data.device = CUDA
    data.features = {m: x.to(CUDA) for m, x in data.features.items()}
    data.label, data.speaker = data.label.to(CUDA), data.speaker.to(CUDA)
    return data


def test_step(fake_cuda):
    """A causal model takes three utterances of two conversations, one after the other."""
    model, past = to_cuda(MAGT(fusion_config(causal=True))).eval(), Past()
    autocast, _ = magtkd.mixed_precision(CUDA, "auto")
    for _ in range(3):
        present = {"video": torch.ones(2, dtype=torch.bool, device=CUDA)}
        with autocast:
            out = model.step(past, features(n=2), torch.ones(2, dtype=torch.int64, device=CUDA), present)
    assert past.lengths == [3, 3] and out.logits[TEXT].device == CUDA


def test_optimizer_step(fake_cuda, monkeypatch):
    """All of it but the backward pass, which leaves gradients here without being run."""
    model = to_cuda(MAGT(fusion_config()))

    def backward(loss: Tensor) -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    monkeypatch.setattr(Tensor, "backward", backward)
    optimizer, schedule = magtkd.make_optimizer(model, 1e-4, steps=10, warmup=0.1)
    _, scaler = magtkd.mixed_precision(CUDA, "auto")
    loss = torch.ones((), device=CUDA)
    for _ in range(2):
        magtkd.optimizer_step(loss, model, optimizer, schedule, scaler, clip=1.0)
    assert schedule.last_epoch == 2
    assert {x.device for state in optimizer.state.values() for x in state.values()} == {CUDA}


# Stage 1

EXAMPLES = {
    "text": [[0, 5, 4, 2], [0, 5, 6, 7, 4, 2]],  # 4: the mask
    "audio": [torch.rand(6_000), torch.rand(16_000)],
    "video": [torch.zeros(8, 3, 48, 48, dtype=torch.uint8)] * 2,
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_stage1(tiny, modality, checkpointing, request):
    encoder = ENCODERS[modality](tiny[modality], C, D).train()  # before the mode: a checkpoint has values
    if checkpointing:
        encoder.backbone.gradient_checkpointing_enable()
    request.getfixturevalue("fake_cuda")
    to_cuda(encoder)
    autocast, _ = magtkd.mixed_precision(CUDA, "auto")
    with autocast:
        got, logits = encoder(EXAMPLES[modality])
        labels, teacher = torch.tensor([0, 1], device=CUDA), torch.randn(2, D, device=CUDA)
        loss = losses.stage1_loss(logits, labels, got, torch.randn(2, C, device=CUDA), teacher)
    assert (loss.device, loss.dtype, got.shape, logits.shape) == (CUDA, torch.float32, (2, D), (2, C))
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("modality", MODALITIES)
def test_encoding(tiny, modality, request):
    """The answers for all utterances, on the CPU, NaN where there is nothing to encode."""
    encoder = ENCODERS[modality](tiny[modality], C, D)
    request.getfixturevalue("fake_cuda")
    given = dict(zip("ab", EXAMPLES[modality]))
    examples = magtkd.Examples(given.get, {name: len(x) for name, x in given.items()})
    answers = magtkd.encode(to_cuda(encoder), examples, ["a", "b", "missing"])
    assert {x.device.type for x in answers} == {"cpu"} and answers.features.shape == (3, D)


@pytest.mark.parametrize("causal", [False, True], ids=["whole conversation", "stream"])
def test_prediction(tiny, iemocap, causal, request):
    conversation = read_iemocap(iemocap).splits["train"][0]
    conversation = Conversation("c", conversation.utterances[:2])
    encoders = {m: ENCODERS[m](tiny[m], C, D) for m in MODALITIES}
    fusion = MAGT(fusion_config(causal)).eval()
    request.getfixturevalue("fake_cuda")
    encoders, fusion = {m: to_cuda(x) for m, x in encoders.items()}, to_cuda(fusion)
    model = predict.Model(encoders, fusion, ["x"] * C, {"first": 1, "second": 2}, (8, 48))
    if causal:
        stream = predict.Stream(model)
        answers = [stream.add(u) for u in conversation.utterances]
    else:
        answers = predict.predict(model, conversation)
    assert [len(a.probabilities) for a in answers] == [C, C]


# That it catches what it is for


def test_a_tensor_left_on_the_cpu_is_caught(fake_cuda):
    model, given = to_cuda(MAGT(fusion_config())), batch(missing=True)
    given.inputs[3]["audio"] = torch.ones(N, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="two different devices"):
        model(*given.inputs)


def test_a_constant_that_is_no_buffer_is_caught(tiny, request):
    encoder = ENCODERS["video"](tiny["video"], C, D)
    mean = encoder.mean
    del encoder.mean
    encoder.mean = mean  # an attribute like any other now, which .to() leaves behind
    request.getfixturevalue("fake_cuda")
    with pytest.raises(RuntimeError, match="two different devices"):
        to_cuda(encoder)(EXAMPLES["video"])


def test_dropout_on_cuda_is_torchs_own(fake_cuda, monkeypatch):
    monkeypatch.setattr(Tensor, "random_", None)  # what the CPU's path draws from
    assert Dropout(0.5).train()(torch.ones(4, device=CUDA)).device == CUDA
