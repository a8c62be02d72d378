"""CUDA against the CPU where there is a GPU; without one in torch's FakeTensorMode, where tensors have a device but no
values, and an operation on tensors of two devices raises. `backward` needs the real device."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

import losses
from data import NAMES, Conversations, FeatureFile
from extras.variants import Context, Released, released
from fusion import MAGT, Concat, FusionConfig

WIDTHS, CUDA = dict.fromkeys(("text", "audio", "video"), 16), torch.device("cuda", 0)
MODELS = {  # class, loss, causal
    "MAGT": (MAGT, losses.stage2_loss, False),
    "MAGT, causal": (MAGT, losses.stage2_loss, True),
    "MAGT, released": (released("iemocap").model, released("iemocap").loss, False),
    "Context": (Context, Released().loss, False),
    "Concat": (Concat, losses.stage2_loss, False),
}


def make(name, device="cpu"):
    """A model, and two conversations, the first of which lacks the audio of an utterance."""
    torch.manual_seed(0)
    build, _, causal = MODELS[name]
    model = build(FusionConfig(WIDTHS, num_classes=6, num_speakers=2, width=16, heads=2, causal=causal)).eval()
    file = FeatureFile(
        features={m: torch.randn(5, 16) for m in WIDTHS},
        present={m: torch.arange(5) >= (m == "audio") for m in WIDTHS},
        label=torch.arange(5),
        speaker=torch.arange(5) % 2,
        conversation=torch.tensor([0, 0, 1, 1, 1]),
        split=torch.zeros(5, dtype=torch.int64),
        **dict.fromkeys(NAMES, list("abcdef")),
    )
    return model.to(device), Conversations(file, tuple(WIDTHS), torch.device(device))


def step(name, model, weights, data):
    """A batch, the model's output for it and the terms of stage 2's loss."""
    batch = data.batch(data.splits["train"])
    out = functional_call(model, weights, batch.inputs)
    return batch, out, MODELS[name][1](out.logits, out.hidden, batch.labels, alpha=0.7, beta=0.8, rows=batch.rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_cuda_equals_the_cpu(name):
    results = []
    for device in ("cpu", CUDA):
        model, data = make(name, device)
        batch, out, terms = step(name, model, dict(model.named_parameters()), data)
        terms["loss"].backward()
        results.append((*batch, *out, terms, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4, check_device=False)


@pytest.mark.parametrize("name", MODELS)
def test_stage2_without_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # for autocast
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(Tensor, "nonzero", lambda x: torch.zeros(2, 1, dtype=torch.int64))  # wants values: two rows
    model, data = make(name)  # with values too, so before the mode
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cuda", dtype=torch.bfloat16):
        weights = {name: torch.empty_like(p, device=CUDA) for name, p in model.named_parameters()}
        data.device, data.features = CUDA, {m: x.to(CUDA) for m, x in data.features.items()}
        data.label, data.speaker = data.label.to(CUDA), data.speaker.to(CUDA)
        batch, out, terms = step(name, model, weights, data)
        assert {(x.device, x.dtype, x.dim()) for x in terms.values()} == {(CUDA, torch.float32, 0)}
        batch.inputs[3]["audio"] = torch.ones(5, dtype=torch.bool)  # and this finds what was left on the CPU
        with pytest.raises(RuntimeError, match="two different devices"):
            functional_call(model, weights, batch.inputs)
