"""The bootstrap against known cases; sweeps and comparisons on a small feature file; gates and class weights."""

import itertools
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

import losses
import magtkd
from data import FeatureFile, write_features
from extras import experiments
from extras.experiments import confusions, mean_gates, paired_bootstrap, weighted_f1
from extras.released import RELEASED, Differences, ReleasedConfig, ReleasedMAGT
from fusion import MAGT, FusionConfig
from magtkd import CONFIGS, class_weights, load_fusion


def example(conversations=(6, 3, 4), utterances=4, classes=3):
    """Features that give the label away; the second class is rare."""
    generator = torch.Generator().manual_seed(0)
    C = sum(conversations)
    N = C * utterances
    label = torch.multinomial(torch.tensor([0.5, 0.1, 0.4]), N, replacement=True, generator=generator)
    label[:classes] = torch.arange(classes)
    features = {k: torch.randn(N, 6, generator=generator) for k in ("text", "audio_kd", "video")}
    for x in features.values():
        x[torch.arange(N), label] += 2
    split = torch.arange(3).repeat_interleave(torch.tensor(conversations))
    return FeatureFile(
        features=features,
        present={k: torch.ones(N, dtype=torch.bool) for k in features},
        label=label,
        speaker=torch.arange(N) % 2,
        conversation=torch.arange(C).repeat_interleave(utterances),
        split=split.repeat_interleave(utterances),
        label_names=["sad", "glad", "mad"],
        speaker_names=["first", "second"],
        conversation_names=[f"c{i}" for i in range(C)],
        utterance_names=[f"u{i}" for i in range(N)],
    )


def random_runs(seeds=2, N=60, C=4):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, C, N).tolist()
    return [{"labels": labels, "predictions": generator.integers(0, C, N).tolist()} for _ in range(seeds)]


def test_weighted_f1_of_counts_is_sklearns():
    conversation = torch.arange(60) // 7 + 5
    for run in random_runs():
        counts = confusions([run], conversation, 5)  # the fifth class does not occur
        assert counts.shape == (1, 9, 5, 5) and counts.sum() == 60
        expected = f1_score(run["labels"], run["predictions"], average="weighted", zero_division=0)
        assert weighted_f1(counts.sum(1))[0] == pytest.approx(100 * expected)


def test_the_bootstrap_of_a_known_case():
    """Three conversations: all 27 ways to draw three of them, worked through one by one with scikit-learn."""
    labels = np.array([0, 0, 1, 1, 0, 1])
    a, b = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 1, 1, 0, 0, 1])
    rows = [[0, 1], [2, 3], [4, 5]]

    def f1(predictions, drawn):
        at = [i for c in drawn for i in rows[c]]
        return 100 * f1_score(labels[at], predictions[at], average="weighted", zero_division=0)

    ways = np.array([f1(a, drawn) - f1(b, drawn) for drawn in itertools.product(range(3), repeat=3)])
    conversation = torch.tensor([0, 0, 1, 1, 2, 2])
    runs = [[{"labels": labels.tolist(), "predictions": x.tolist()}] for x in (a, b)]
    counts = [confusions(r, conversation, 2) for r in runs]
    difference, low, high = paired_bootstrap(*counts, samples=20_000)
    assert difference == pytest.approx(f1(a, range(3)) - f1(b, range(3)))
    # 1 of 27 is 3.7 %: more than 2.5 %, so the interval reaches to the extremes
    assert low == pytest.approx(ways.min()) and high == pytest.approx(ways.max())
    assert low < 0 < difference < high


def test_the_bootstrap_is_paired():
    a, b = ([run] for run in random_runs())
    conversation = torch.arange(60) // 6
    same = confusions(a, conversation, 4)
    assert paired_bootstrap(same, same) == (0, 0, 0)
    # One seed's gain is the other's loss: seed by seed they differ, their mean does not.
    x, y = confusions([*a, *b], conversation, 4), confusions([*b, *a], conversation, 4)
    assert paired_bootstrap(x, y) == pytest.approx((0, 0, 0), abs=1e-9)
    difference, low, high = paired_bootstrap(same, confusions(b, conversation, 4))
    assert low < difference < high
    back = paired_bootstrap(confusions(b, conversation, 4), same)
    assert back == pytest.approx((-difference, -high, -low))


def test_one_conversation_leaves_nothing_to_draw():
    a, b = (confusions([run], torch.zeros(60, dtype=torch.long), 4) for run in random_runs())
    difference, low, high = paired_bootstrap(a, b)
    assert difference and (low, high) == pytest.approx((difference, difference))


@pytest.mark.parametrize("released", [False, True])
def test_mean_gates_equal_the_formula(released):
    torch.manual_seed(0)
    sizes = {"widths": dict.fromkeys(("text", "audio", "video"), 6), "num_classes": 3, "num_speakers": 2}
    sizes |= {"width": 8, "heads": 2}
    model = MAGT(FusionConfig(**sizes)).eval()
    if released:
        model = ReleasedMAGT(ReleasedConfig(**sizes, shared_text_anchor=True, relu_gate=True, tags_twice=True)).eval()
    with torch.no_grad():
        for source, bias in (("text", 3.0), ("audio", 0.0), ("video", -3.0)):  # W = 0: the gate is sigmoid(b)
            model.anchor["video"].gate[source].weight.zero_()
            model.anchor["video"].gate[source].bias.fill_(bias)
    gates = mean_gates(model, ("text", "audio_kd", "video"), example())
    low = 0.5 if released else 1 / (1 + np.exp(3))
    assert gates[2] == pytest.approx([1 / (1 + np.exp(-3)), 0.5, low], abs=1e-6)
    assert gates.shape == (3, 3) and (0 < gates).all() and (gates < 1).all()
    assert len(set(gates[0].tolist())) == 3  # the streams of a shared gate are told apart
    assert not any("alpha" in vars(anchor) for anchor in model.anchor.values())  # the model is as it was


def test_differences_change_one_thing_each():
    paper = vars(Differences())
    for corpus in CONFIGS:
        rows = experiments.differences(corpus)
        assert rows["released"][1] == RELEASED[corpus] and rows["paper"][1] == Differences()
        changed = {name: {k for k, x in vars(row).items() if x != paper[k]} for name, (_, row) in rows.items()}
        loss = {"branch_cross_entropy", "feature_loss"} if corpus == "meld" else {"branch_cross_entropy"}
        assert changed["row14"] == loss and not changed["paper"]
        assert all(len(changed[n]) == 1 for n in rows if n not in ("paper", "row14", "released"))
        assert set().union(*(changed[n] for n in rows if n != "released")) == changed["released"]


@pytest.fixture
def options(tmp_path):
    write_features(tmp_path / "f.safetensors", example())
    options = ["iemocap", "--features", str(tmp_path / "f.safetensors"), "--out", str(tmp_path / "run")]
    return [*options, "--seeds", "2", "--stage2-epochs", "2", "--encoders", "tiny"]


def test_a_sweep_and_its_second_start(options, tmp_path, monkeypatch, capsys):
    assert magtkd.main([*options, "--sweep", "0", "0.5"]) == 0
    text = (tmp_path / "run" / "sweep.md").read_text()
    assert "| W-F1, alpha \\ beta | 0 | 0.5 |" in text and "| M-F1, alpha" in text and "made up" not in text
    assert "| **0.5** |" in capsys.readouterr().out
    assert (tmp_path / "run" / "figures" / "sweep.png").stat().st_size
    cells = sorted(p.name for p in (tmp_path / "run" / "sweep").iterdir() if p.name != "log.jsonl")
    names = ("alpha0-beta0", "alpha0-beta0_5", "alpha0_5-beta0", "alpha0_5-beta0_5")
    assert cells == [f"{name}-seed{seed}.json" for name in names for seed in (0, 1)]  # no weights
    kept = [json.loads((tmp_path / "run" / "sweep" / c).read_text())["history"][-1]["train"] for c in cells]
    assert len({x["loss"] for x in kept}) == 8  # alpha and beta took effect

    (tmp_path / "run" / "sweep" / cells[3]).unlink()
    trained = []
    real = magtkd.FusionConfig
    monkeypatch.setattr(magtkd, "FusionConfig", lambda *a, **k: trained.append(1) or real(*a, **k))
    assert magtkd.main([*options, "--sweep", "0", "0.5"]) == 0
    assert len(trained) == 1 and (tmp_path / "run" / "sweep.md").read_text() == text


def test_presets_compared(options, tmp_path):
    assert magtkd.main([*options, "--compare-presets"]) == 0
    lines = (tmp_path / "run" / "presets.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 9 and rows[0][0] == "| the paper" and rows[0][3] == ""
    assert all(" to " in row[4] for row in rows[1:])


def test_the_ablation_compares_and_draws(options, tmp_path):
    assert magtkd.main([*options, "--ablation"]) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    for pair in ("MAGT T+A_KD+V - Concat", "MAGT T+A_KD+V - Context", "Context T+A_KD+V - Concat"):
        assert f"| {pair} |" in report
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    c = metrics["comparisons"][0]
    a, b = (metrics["rows"][f"{f} T+A_KD+V"]["weighted_f1"]["mean"] for f in ("MAGT", "Concat"))
    assert c["difference"] == pytest.approx(a - b) and c["low"] <= c["difference"] <= c["high"]
    assert all((tmp_path / "run" / "figures" / f"{name}.png").exists() for name in ("gates", "tsne"))
    model, kinds = load_fusion(tmp_path / "run" / "fusion.safetensors")
    assert isinstance(model, MAGT) and kinds == ("text", "audio_kd", "video")


# Class weights


def test_class_weights_by_hand():
    weights = class_weights(torch.tensor([0, 0, 0, 2]), 3)
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 4 / 3])  # the absent one as if it had one
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    assert class_weights(labels, 3)[labels].mean() == pytest.approx(1)


def test_class_weights_take_effect_in_stage_2(options, tmp_path):
    histories = []
    for more in ([], ["--class-weights"]):
        assert magtkd.main([*options, "--fresh", *more]) == 0
        history = json.loads((tmp_path / "run" / "fusion" / "MAGT-T+A_KD+V-seed0.json").read_text())["history"]
        histories.append(history[0]["train"]["loss"])
    assert histories[0] != histories[1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["class_weights"]
    model = load_fusion(tmp_path / "run" / "fusion.safetensors")[0]
    assert not model.config.causal


def test_class_weights_take_effect_in_stage_1(iemocap, tmp_path, monkeypatch):
    seen, cross_entropy = [], losses.cross_entropy

    def watch(logits, labels, weight=None):
        seen.append(weight)
        return cross_entropy(logits, labels, weight)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(losses, "cross_entropy", watch)
    monkeypatch.setattr(magtkd, "run_stage2", stop)
    options = ["iemocap", "--root", str(iemocap), "--out", str(tmp_path / "run"), "--encoders", "tiny"]
    assert magtkd.main([*options, "--stage1-epochs", "1", "--class-weights"]) == 130
    assert len(seen) >= 3 and all(w.shape == (6,) and w.max() > w.min() for w in seen)
    assert all((tmp_path / "run" / f"{name}.safetensors").exists() for name in ("text", "audio_kd", "video"))
