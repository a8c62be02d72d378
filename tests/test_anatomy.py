"""The bias to the own utterance, the study of what the anchors hear, and its page."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from data import Conversations, FeatureFile, write_features
from extras import anatomy
from extras.experiments import Study
from extras.own_utterance import OwnBlock, OwnConfig, OwnMAGT, own_magt
from extras.released import build
from fusion import MAGT, FusionConfig, Past
from magtkd import CONFIGS, PAPER, Method, load_fusion, train_fusion

DOCS = Path(__file__).parent.parent / "docs"
WIDTHS = {"text": 8, "audio": 5, "video": 8}
LENGTHS = [7, 1, 4]


def config(**more):
    return FusionConfig(WIDTHS, num_classes=3, num_speakers=2, width=8, heads=2, dropout=0.1, **more)


def inputs(missing=False):
    """With `missing`, nobody in the first conversation has sound, nor has the last utterance of the third."""
    generator, N = torch.Generator().manual_seed(0), sum(LENGTHS)
    features = {m: torch.randn(N, d, generator=generator) for m, d in WIDTHS.items()}
    present = {"audio": torch.tensor([False] * 7 + [True] * 4 + [False])} if missing else None
    return features, torch.randint(0, 3, (N,), generator=generator), LENGTHS, present


def example(conversations=(8, 3, 4), utterances=6, classes=3, missing=True):
    """A feature file with text, audio_kd and video. Some sounds are missing."""
    generator, C = torch.Generator().manual_seed(0), sum(conversations)
    N = C * utterances
    label = torch.randint(0, classes, (N,), generator=generator)
    label[:classes] = torch.arange(classes)
    features = {k: torch.randn(N, 6, generator=generator) for k in ("text", "audio_kd", "video")}
    for x in features.values():
        x[torch.arange(N), label] += 2
    present = {k: torch.ones(N, dtype=torch.bool) for k in features}
    if missing:
        present["audio_kd"][::5] = False
    return FeatureFile(
        features={k: x * present[k][:, None] for k, x in features.items()},
        present=present,
        label=label,
        speaker=torch.arange(N) % 2,
        conversation=torch.arange(C).repeat_interleave(utterances),
        split=torch.arange(3).repeat_interleave(torch.tensor(conversations)).repeat_interleave(utterances),
        label_names=["sad", "glad", "mad"],
        speaker_names=["first", "second"],
        conversation_names=[f"c{i}" for i in range(C)],
        utterance_names=[f"u{i}" for i in range(N)],
    )


def a_study(tmp_path, **changes):
    small = dataclasses.replace(CONFIGS["demo"], width=8, heads=2, stage2_epochs=2, stage2_batch=4, **changes)
    kinds = ("text", "audio_kd", "video")
    return Study(small, PAPER, example(), kinds, range(2), tmp_path, torch.device("cpu"), False)


# The bias to the own utterance


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


# What the anchors hear


def test_attention_equals_the_formula():
    """Against a softmax written out, in a stream with sounds missing and a number for the own row."""
    torch.manual_seed(0)
    file, kinds = example(), ("text", "audio_kd")
    model = own_magt(1.5)(FusionConfig({"text": 6, "audio": 6}, 3, 2, width=8, heads=2)).eval()
    found = anatomy.attention(model, kinds, file)
    assert list(found) == ["text -> text", "audio -> text", "text -> audio", "audio -> audio"]
    assert not any("attend_one" in vars(m) for m in model.modules())  # nothing stays on the model

    data = Conversations(file, kinds, torch.device("cpu"))
    batch = data.batch(data.splits["test"])
    h, _ = model.tag(*batch.inputs, None)
    block, heard = model.anchor["text"].block["audio"], batch.inputs[3]["audio"]
    lengths = batch.inputs[2]
    enriched = model.anchor["audio"](h["audio"], h, lengths, batch.inputs[3])
    q, k = block.query(h["text"]).detach(), block.key_value(enriched).detach()[:, :8]
    own, before = [], []
    for at in range(0, sum(lengths), 6):
        for u in range(at, at + 6):
            for j, where in ((u, own), (u - 1, before)):
                if j < at or not heard[j]:
                    continue
                shares = []
                for head in (slice(0, 4), slice(4, 8)):
                    scores = [float(q[u, head] @ k[t, head]) / 2 + 1.5 * (t == u) for t in range(at, at + 6)]
                    total = sum(math.exp(s) for s, t in zip(scores, range(at, at + 6)) if heard[t])
                    shares.append(math.exp(scores[j - at]) / total)
                where.append(sum(shares) / 2)
    stream = found["audio -> text"]
    assert stream["own"] == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert stream["near"][anatomy.REACH] == stream["own"]
    assert stream["near"][anatomy.REACH - 1] == pytest.approx(sum(before) / len(before), rel=1e-4)
    assert stream["near"][0] is None  # no conversation is longer than 6


def test_describe_by_hand():
    first = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0.0, 0.5, 0.5]])
    second = torch.tensor([[0.1, math.nan], [0.9, math.nan]])  # its second row has no sound
    found = anatomy.describe([first, second])
    assert found["own"] == pytest.approx((0.7 + 0.3 + 0.5 + 0.1) / 4)
    assert found["thirds"] == pytest.approx([(0.7 + 0.1) / 2, 0.3, 0.5])
    assert found["near"][anatomy.REACH + 1] == pytest.approx((0.2 + 0.4) / 2)  # (0, 1) of the second may not be read
    assert found["near"][anatomy.REACH - 1] == pytest.approx((0.3 + 0.5 + 0.9) / 3)
    assert found["near"][anatomy.REACH + 2] == pytest.approx(0.1) and found["near"][-1] is None


def test_parts_taken_out():
    torch.manual_seed(0)
    features, speakers, lengths, _ = inputs()
    model = anatomy.NoPositions(config()).eval()
    order = torch.tensor([6, 0, 5, 1, 4, 2, 3, *range(7, 12)])  # the first conversation in another order
    there = model(features, speakers, lengths).logits["text"]
    mixed = model({m: x[order] for m, x in features.items()}, speakers[order], lengths).logits["text"]
    assert torch.allclose(mixed, there[order], atol=1e-5)
    paper = MAGT(config()).eval()
    there = paper(features, speakers, lengths).logits["text"]
    mixed = paper({m: x[order] for m, x in features.items()}, speakers[order], lengths).logits["text"]
    assert not torch.allclose(mixed, there[order], atol=1e-3)

    model = anatomy.with_anchors(anatomy.OpenAnchor)(config()).eval()
    shut = MAGT(config()).eval()
    shut.load_state_dict(model.state_dict(), strict=False)
    for name, x in shut.named_parameters():
        if ".gate." in name:  # W = 0 and a large b: the sigmoid is 1
            x.data.fill_(30.0 if name.endswith("bias") else 0.0)
    assert torch.equal(model(*inputs()).logits["text"], shut(*inputs()).logits["text"])

    model = anatomy.with_anchors(anatomy.OtherAnchor)(config())
    assert {(a, s) for a, x in model.anchor.items() for s in x.block} == {
        (a, s) for a in WIDTHS for s in WIDTHS if a != s
    }
    sum(x.square().sum() for x in model(*inputs()).logits.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_before_training_is_what_training_began_with(tmp_path):
    """At a learning rate of zero both are the same model: the untrained one is built again as train_fusion built it."""
    about = a_study(tmp_path, stage2_lr=0.0)
    (tmp_path / "anatomy").mkdir()
    for cell in anatomy.cells(about.kinds):
        if cell.model in anatomy.LISTENED and len(cell.kinds) == 3:
            for heard in anatomy.train_cell(about, cell)[1]:
                assert heard["before"] == heard["after"]
                assert heard["numbers"] == ([6.0] * 12 if cell.model == anatomy.BIASED else [])


# The command


def test_the_command_and_its_second_start(tmp_path, monkeypatch, capsys):
    write_features(tmp_path / "f.safetensors", example())
    out = tmp_path / "out"
    options = [str(tmp_path / "f.safetensors"), "--out", str(out), "--config", "demo", "--seeds", "2"]
    options += ["--stage2-epochs", "1", "--made-up", "--device", "cpu"]
    assert anatomy.main(options) == 0
    result, text = json.loads((out / "anatomy.json").read_text()), (out / "anatomy.md").read_text()
    assert "made up" in text and anatomy.table(result) in text and anatomy.table(result) in capsys.readouterr().out
    rows = {(r["model"], r["features"]): r for r in result["rows"]}
    assert len(rows) == 3 + 4 + 4 + 5
    paper, biased = rows["MAGT", "T+A_KD+V"], rows[anatomy.BIASED, "T+A_KD+V"]
    difference = biased["weighted_f1"][0] - paper["weighted_f1"][0]
    assert biased["against MAGT"]["difference"] == pytest.approx(difference, abs=1e-3)
    assert biased["against MAGT"]["low"] <= biased["against MAGT"]["difference"] <= biased["against MAGT"]["high"]
    added = rows["MAGT", "T+A_KD"]["weighted_f1"][0] - rows["MAGT", "T"]["weighted_f1"][0]
    assert rows["MAGT", "T+A_KD"]["added"]["difference"] == pytest.approx(added, abs=1e-3)
    assert len({json.dumps(r["dev"]) + json.dumps(r["macro_f1"]) for r in result["rows"]}) > 8  # the rows differ
    heard = {(h["model"], h["features"]): h for h in result["heard"]}
    assert len(heard) == 4
    stream = {k: heard[k, "T+A_KD+V"]["after"]["audio -> text"]["own"] for k in anatomy.LISTENED}
    assert stream[anatomy.BIASED] > 2 * stream["MAGT"]
    assert (out / "figures" / "anatomy.png").stat().st_size > 10_000
    assert not list((out / "anatomy").glob("*.safetensors"))  # weights are not kept

    monkeypatch.setattr(anatomy, "listen", None)  # not called again
    monkeypatch.setattr("magtkd.train", None)
    assert anatomy.main(options) == 0
    assert json.loads((out / "anatomy.json").read_text()) == result


def test_distillation_off_has_no_weight_in_the_loss(tmp_path):
    about = a_study(tmp_path)
    (tmp_path / "anatomy").mkdir()
    (cell,) = [c for c in anatomy.cells(about.kinds) if not c.distil]
    for run in anatomy.train_cell(about, cell)[0]:
        assert all(epoch["train"]["loss"] == epoch["train"]["l_ce"] for epoch in run["history"])


def test_text_alone_has_a_table_and_no_figure(tmp_path):
    file = example(missing=False)
    about = dataclasses.replace(a_study(tmp_path), file=file, kinds=("text",), seeds=range(1))
    lines = anatomy.study(about).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]][:3] == ["Concat", "Context", "MAGT"]
    assert not (tmp_path / "figures" / "anatomy.png").exists()
    assert "![" not in (tmp_path / "anatomy.md").read_text()


def test_what_the_command_says_of_a_wrong_file(tmp_path, capsys):
    (tmp_path / "f.safetensors").write_bytes(b"no features")
    assert anatomy.main([str(tmp_path / "f.safetensors"), "--out", str(tmp_path / "out")]) == 2
    assert "not a readable feature file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        anatomy.main([])


# The page


def test_the_page_is_what_the_stored_results_say():
    page = (DOCS / "anatomy.md").read_text(encoding="utf-8")
    assert anatomy.fill(page, DOCS / "figures") == page
    stored = sorted(p.stem for p in (DOCS / "figures").glob("anatomy-*.json"))
    assert stored == ["anatomy-demo", "anatomy-mosi"]
    for name in stored:
        assert f"<!-- {name} -->\n" in page
        assert f"(figures/{name}.png)" in page and (DOCS / "figures" / f"{name}.png").exists()
        result = json.loads((DOCS / "figures" / f"{name}.json").read_text())
        assert result["made_up"] == (name == "anatomy-demo") and result["seeds"] == 3


def test_fill_writes_what_is_between_the_marks(tmp_path):
    stored = DOCS / "figures" / "anatomy-demo.json"
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "anatomy-demo.json").write_bytes(stored.read_bytes())
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- anatomy-demo -->\nold\n<!-- end -->\nafter\n")
    assert anatomy.main(["--fill", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- anatomy-demo -->\n") and text.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in text.split() and anatomy.table(json.loads(stored.read_text())) in text
    assert (tmp_path / "figures" / "anatomy-demo.png").stat().st_size > 10_000
