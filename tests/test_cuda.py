"""CUDA against the CPU where there is a GPU; without one in torch's FakeTensorMode, where tensors have a device but no
values, and an operation on tensors of two devices raises. `backward` needs the real device."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import losses
from data import NAMES, ROWS, Conversations, check_features
from extras.variants import released
from fusion import MAGT, Concat, FusionConfig

WIDTHS, CUDA = dict.fromkeys(("text", "audio", "video"), 16), torch.device("cuda", 0)
MODELS = {
    "MAGT": (MAGT, losses.stage2_loss),
    "MAGT, released, causal": (released("iemocap").model, released("iemocap").loss),
    "Concat": (Concat, losses.stage2_loss),
}


def make(name, device="cpu"):
    torch.manual_seed(0)
    config = FusionConfig(WIDTHS, num_classes=6, num_speakers=6, width=16, heads=2, causal="causal" in name)
    columns = {m: torch.randn(6, 16) for m in WIDTHS} | dict.fromkeys(ROWS, torch.tensor([0, 0, 1, 1, 2, 2]))
    columns["audio"][0], names = torch.nan, dict.fromkeys(NAMES, list("abcdef"))
    data = Conversations(check_features("x", columns, names), tuple(WIDTHS), torch.device(device))
    return MODELS[name][0](config).eval().to(device), data


def step(name, model, weights, data):
    batch = data.batch(list(data.slices))
    out = torch.func.functional_call(model, weights, batch.inputs)
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
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4, check_device=False)


@pytest.mark.parametrize("name", MODELS)
def test_stage2_without_a_gpu(name, monkeypatch):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # for autocast
    model, data = make(name)  # with values, so before the mode
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda x: torch.zeros(2, 1, dtype=torch.int64))  # wants values
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cuda", dtype=torch.float16):
        weights = {name: torch.empty_like(p, device=CUDA) for name, p in model.named_parameters()}
        data.device, data.features = CUDA, {m: x.to(CUDA) for m, x in data.features.items()}
        data.label, data.speaker = data.label.to(CUDA), data.speaker.to(CUDA)
        terms = step(name, model, weights, data)[-1].values()
        assert {(x.device, x.dtype, x.dim()) for x in terms} == {(CUDA, torch.float32, 0)}
