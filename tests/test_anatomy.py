"""The bias to the own utterance, the study of what the anchors hear, and its page."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import magtkd
from data import Conversations, FeatureFile, write_features
from extras import anatomy, anatomy_page
from extras.experiments import Study
from extras.own_utterance import own_magt
from extras.runs import OWN
from fusion import MAGT, FusionConfig
from magtkd import CONFIGS, PAPER

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
    options = ["demo", "--features", str(tmp_path / "f.safetensors"), "--out", str(out), "--anatomy", "--seeds", "2"]
    options += ["--stage2-epochs", "1", "--device", "cpu"]
    assert magtkd.main(options) == 0
    result, text = json.loads((out / "anatomy.json").read_text()), (out / "anatomy.md").read_text()
    assert anatomy.table(result) in text and anatomy.table(result) in capsys.readouterr().out
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
    assert magtkd.main(options) == 0
    assert json.loads((out / "anatomy.json").read_text()) == result
    monkeypatch.undo()
    kept = next((out / "anatomy").glob("*.heard.json"))
    kept.write_text("{")
    assert magtkd.main(options) == 2 and f"{kept}: damaged" in capsys.readouterr().err
    made = [p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.name != ".lock"]
    assert [name for name in made if not OWN.fullmatch(name)] == []  # --fresh knows every file


def test_distillation_off_has_no_weight_in_the_loss(tmp_path):
    about = a_study(tmp_path)
    (tmp_path / "anatomy").mkdir()
    (cell,) = [c for c in anatomy.cells(about.kinds) if not c.distil]
    for run in anatomy.train_cell(about, cell)[0]:
        assert all(epoch["train"]["loss"] == epoch["train"]["l_ce"] for epoch in run["history"])


def test_text_alone_has_a_table_and_no_figure(tmp_path):
    file = example(missing=False)
    about = dataclasses.replace(a_study(tmp_path), file=file, kinds=("text",), seeds=range(1), made_up=True)
    lines = anatomy.study(about).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]][:3] == ["Concat", "Context", "MAGT"]
    assert not (tmp_path / "figures" / "anatomy.png").exists()
    text = (tmp_path / "anatomy.md").read_text()
    assert "![" not in text and "made up" in text


# The page


def stored(own=(1.0, 0.5, 2.0)) -> dict:
    """A result of two modalities. own: difference, low, high of MAGT with the bias."""
    names = [("Concat", "T"), ("MAGT", "T"), ("Concat", "T+A"), ("Context", "T+A"), ("MAGT", "T+A")]
    names += [(anatomy.BIASED, "T+A"), ("MAGT, no gates", "T+A")]
    rows = [
        {"model": m, "features": f, **{k: [50.0 + i, 1.0] for k in ("dev", "weighted_f1", "macro_f1")}}
        for i, (m, f) in enumerate(names)
    ]
    for row in rows:
        numbers = own if row["model"] == anatomy.BIASED else (-0.3, -1.0, 0.5)
        change = {**dict(zip(("difference", "low", "high"), numbers)), "std": 0.25}
        row |= {"against MAGT": change} if row["model"] != "MAGT" else {}
        row |= {"added": change} if row["features"] == "T+A" and "no gates" not in row["model"] else {}
    shares = {"text -> text": 0.4, "audio -> text": 0.1, "text -> audio": 0.3, "audio -> audio": 0.6}
    streams = {name: {"own": x, "thirds": [x] * 3, "near": [None, 0.1, x, 0.1, 0.0]} for name, x in shares.items()}
    one = {"features": "T+A", "before": streams, "after": streams, "gates": [[0.25, 0.5], [0.5, 0.75]]}
    heard = [{"model": "MAGT", **one, "numbers": []}, {"model": anatomy.BIASED, **one, "numbers": [5.5, 6.25]}]
    about = {"made_up": True, "machine": "a machine", "seeds": 3, "width": 8, "own": 6.0}
    return {**about, "rows": rows, "heard": heard}


def test_the_sentences_follow_the_numbers():
    text = "\n".join(anatomy_page.learned(stored()))
    assert f"{anatomy.BIASED}, against MAGT, over T+A: +1.00 ± 0.25 (+0.50 to +2.00), better" in text
    assert f"What A adds to T: Concat -0.30, Context -0.30, MAGT -0.30, {anatomy.BIASED} +1.00*." in text
    assert "Against MAGT, over T+A: Concat -0.30, Context -0.30." in text
    assert "one thing changed, against MAGT, over T+A: no gates -0.30." in text
    assert "20.0 % before training" in text and "after training: 50.0 %" in text  # (10 + 30) / 2, (40 + 60) / 2
    assert "between 0.25 and 0.75" in text and "between 5.50 and 6.25" in text
    assert "worse" in anatomy_page.learned(stored((-1.0, -2.0, -0.5)))[0]
    assert "holds 0" in anatomy_page.learned(stored((1.0, -0.1, 2.0)))[0]


def test_the_page_is_what_the_stored_results_say():
    page = (DOCS / "anatomy.md").read_text(encoding="utf-8")
    assert anatomy.fill(page, DOCS / "figures") == page
    for name in ("anatomy-demo", "anatomy-mosi"):
        assert f"<!-- {name} -->\n" in page
        path = DOCS / "figures" / f"{name}.json"
        assert path.exists() == (f"(figures/{name}.png)" in page) == path.with_suffix(".png").exists()
        if path.exists():
            result = json.loads(path.read_text())
            assert result["made_up"] == (name == "anatomy-demo") and result["seeds"] == 3


def test_fill_writes_what_is_between_the_marks(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "anatomy-demo.json").write_text(json.dumps(stored()))
    page, mark = tmp_path / "page.md", "<!-- end -->"
    page.write_text(f"before\n<!-- anatomy-demo -->\nold\n{mark}\nbetween\n<!-- anatomy-x -->\nold\n{mark}\nafter\n")
    assert anatomy.main(["--fill", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- anatomy-demo -->\n") and text.endswith(f"\nNot measured.\n{mark}\nafter\n")
    assert "old" not in text.split() and anatomy.table(stored()) in text and "\nbetween\n" in text
    assert (tmp_path / "figures" / "anatomy-demo.png").stat().st_size > 10_000
