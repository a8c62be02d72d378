"""The bias to the own utterance: the paper's model at zero, causal and streaming, gradients, saving."""

import math

import pytest
import torch
from test_anatomy import WIDTHS, a_study, config, example, inputs

from data import Conversations
from extras.own_utterance import OwnBlock, OwnConfig, OwnMAGT, own_magt
from extras.released import build
from fusion import MAGT, Past
from magtkd import Method, load_fusion, train_fusion


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_at_zero_and_not_trained_it_is_the_papers_to_the_last_digit(causal, missing):
    torch.manual_seed(0)
    paper = MAGT(config(causal=causal)).eval()
    torch.manual_seed(0)
    own = own_magt(0.0)(config(causal=causal)).eval()  # a seed begins both alike
    for name, x in own.named_parameters():
        x.requires_grad_(not name.endswith(".own"))
    expected, found = paper(*inputs(missing)), own(*inputs(missing))
    for m in WIDTHS:
        assert torch.equal(found.logits[m], expected.logits[m])
        assert torch.equal(found.hidden[m], expected.hidden[m])
    at_six = own_magt()(config(causal=causal)).eval()
    at_six.load_state_dict(own.state_dict() | {k: x for k, x in at_six.state_dict().items() if k.endswith(".own")})
    assert (at_six(*inputs(missing)).logits["text"] - expected.logits["text"]).abs().max() > 1e-3


def test_only_streams_between_two_modalities_have_it():
    model = own_magt(2.5)(config())
    owned = {name.split(".")[1] + name.split(".")[3] for name, _ in model.named_parameters() if name.endswith(".own")}
    assert owned == {a + s for a in WIDTHS for s in WIDTHS if a != s}
    assert all(x.tolist() == [2.5, 2.5] for name, x in model.named_parameters() if name.endswith(".own"))


def test_the_attention_by_hand():
    """Keys of zero: only the number speaks. Of five rows, the own one gets e^own / (e^own + 4), in each head."""
    block = OwnBlock(OwnConfig(**vars(config()), own=0.0)).requires_grad_(False)
    block.own[:] = torch.tensor([2.0, -1.0])
    values = torch.eye(5).repeat(1, 2)
    weights = block.attend_one(torch.randn(5, 8), torch.zeros(5, 8), values, None).unflatten(1, (2, 5))
    for head, number in enumerate((2.0, -1.0)):
        share = math.exp(number) / (math.exp(number) + 4)
        expected = torch.full((5, 5), (1 - share) / 4).fill_diagonal_(share)
        assert torch.allclose(weights[:, head], expected, atol=1e-6)
    # After a past of two, the first of three new utterances has its own row third.
    weights = block.attend_one(torch.randn(3, 8), torch.zeros(5, 8), values, None).unflatten(1, (2, 5))
    assert weights[:, 0].argmax(dim=1).tolist() == [2, 3, 4]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_causal_and_streaming_equal_the_whole(missing, step):
    torch.manual_seed(1)
    model = own_magt()(config(causal=True)).eval()
    features, speakers, lengths, present = inputs(missing)
    whole = model(features, speakers, lengths, present).logits["text"].split(lengths)
    starts = [0, 7, 8]
    for b, (start, length) in enumerate(zip(starts, lengths)):
        past, answers = Past(), []
        for at in range(0, length, step):
            rows = slice(start + at, start + min(at + step, length))
            heard = {m: x[rows] for m, x in present.items()} if missing else None
            piece = {m: x[rows] for m, x in features.items()}
            answers.append(model(piece, speakers[rows], [len(speakers[rows])], heard, past).logits["text"])
        assert torch.allclose(torch.cat(answers), whole[b], atol=1e-5)
    changed = {m: torch.cat([x[:5], torch.randn(2, x.shape[1]), x[7:]]) for m, x in features.items()}
    again = model(changed, speakers, lengths, present).logits["text"]
    assert torch.equal(again[:5], whole[0][:5])  # the future changes nothing
    assert not torch.allclose(again[5], whole[0][5])


def test_an_utterance_that_may_read_nothing_gets_zero_and_finite_gradients():
    torch.manual_seed(0)
    for causal in (False, True):
        model = own_magt()(config(causal=causal)).train()
        block = model.anchor["text"].block["audio"]
        nothing = block.attend_one(*torch.randn(3, 4, 8), torch.zeros(4, dtype=torch.bool))
        assert torch.equal(nothing, torch.zeros(4, 8))
        out = model(*inputs(missing=True))
        sum(x.square().sum() for x in out.logits.values()).backward()
        assert all(x.isfinite().all() for x in out.logits.values())
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = own_magt()(config()).train()
    sum(x.square().sum() for x in model(*inputs()).logits.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_half_precision():
    model = own_magt()(config()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(*inputs(missing=True)).logits["text"]
    assert half.dtype == torch.bfloat16
    assert (half.float() - model(*inputs(missing=True)).logits["text"]).abs().max() < 0.1


def test_a_saved_model_is_loaded_again(tmp_path):
    data = Conversations(example(), ("text", "audio_kd", "video"), torch.device("cpu"))
    train_fusion("MAGT", data, 3, a_study(tmp_path).config, tmp_path / "m", 0, Method({"MAGT": own_magt(4.0)}))
    model, kinds = load_fusion(tmp_path / "m.safetensors", build)
    assert isinstance(model, OwnMAGT) and model.config.own == 4.0 and kinds == ("text", "audio_kd", "video")
    number = model.anchor["text"].block["video"].own
    assert (number - 4).abs().max() < 0.1 and (number != 4).all()  # it was trained
