"""Training: schedule, batches, resuming, what the losses are given, precision, and the trial before it."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from test_features import example
from test_run import interrupt, spy
from torch import nn

import losses
import magtkd
from data import Conversation, Conversations, Corpus, Encoded, InputError, Utterance, read_iemocap, scores
from extras.demo import write_iemocap
from fusion import MAGT
from magtkd import Config, Examples, Run, load_fusion, make_batches, make_optimizer, make_recipe, mixed_precision, train

SMALL = Config(
    width=64, stage1_lr=magtkd.each(1e-3), stage1_epochs=magtkd.each(2), stage1_batch=8, stage2_epochs=3,
    class_weights=True,
)  # fmt: skip


def test_learning_rate():
    """50 conversations, batch 16, 30 epochs: 120 steps, 12 of warm-up. (The released one is in test_variants.py.)"""
    optimizer, schedule = make_optimizer(
        nn.Linear(1, 1), make_recipe(Config(), lr=2.0, batch=16, epochs=30, examples=50)
    )
    rates = []
    for _ in range(120):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert (rates[0], rates[6], rates[60], rates[119]) == pytest.approx((0, 1, 2 * 60 / 108, 2 * 1 / 108))
    assert max(rates) == rates[12] == 2


def test_batches_have_similar_lengths():
    lengths = {f"u{i}": 1 + i % 50 for i in range(203)}

    def padding(batches):
        return sum(max(lengths[n] for n in b) - lengths[n] for b in batches for n in b)

    first, second = make_batches(lengths, 8), make_batches(lengths, 8)
    assert sorted(n for b in first for n in b) == sorted(lengths) and sorted(map(len, first)) == [3, *[8] * 25]
    assert padding(first) < 0.3 * padding(make_batches(dict.fromkeys(lengths, 1), 8)) and first != second
    sizes = [sum(lengths[n] for n in b) for b in first]
    assert sizes != sorted(sizes)


class Toy(nn.Sequential):
    """10 examples of 3 numbers; dropout, so that the random state matters."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 32), nn.Dropout(0.3), nn.Linear(32, 3))
        self.x, self.y = torch.randn(10, 3), torch.arange(10) % 3

    def loss_terms(self, names: list[str]):
        at = [int(n) for n in names]
        return {"loss": losses.cross_entropy(self(self.x[at]), self.y[at])}

    def evaluate(self):
        self.eval()
        with torch.no_grad():
            return {"dev_f1": scores(self.y.tolist(), self(self.x).argmax(1).tolist())["weighted_f1"]}

    def train_on(self, path, precision="float32", loss_terms=None):
        recipe = make_recipe(Config(precision=precision), lr=0.01, batch=4, epochs=8, examples=10)
        lengths = {str(i): 1 for i in range(10)}
        return train(self, lengths, loss_terms or self.loss_terms, self.evaluate, recipe, path, seed=7, key="k")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resuming_is_exact(precision, tmp_path, monkeypatch):
    undisturbed = Toy()
    expected = undisturbed.train_on(tmp_path / "undisturbed", precision)
    for at in (4, 2, 5):  # steps until Ctrl-C; 3 an epoch
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            interrupt(m, at, (magtkd, "optimizer_step"))
            m.setattr(magtkd.time, "monotonic", iter(range(10**6)).__next__)  # as if epochs took long: each is saved
            Toy().train_on(tmp_path / "toy", precision)
    assert len(torch.load(tmp_path / "toy.resume.pt")["history"]) == 2
    toy = Toy()
    assert toy.train_on(tmp_path / "toy", precision) == expected
    assert all(torch.equal(x, toy.state_dict()[name]) for name, x in undisturbed.state_dict().items())
    history, best = expected
    dev = [epoch["dev_f1"] for epoch in history]
    assert best == dev.index(max(dev)) and undisturbed.evaluate()["dev_f1"] == max(dev) and len(dev) == 8


def test_a_loss_that_is_not_finite(tmp_path):
    toy = Toy()

    def broken(names):
        return {"loss": toy.loss_terms(names)["loss"] * (torch.nan if "3" in names else 1)}

    with pytest.raises(
        InputError, match=r"no longer finite, first in step \d of this epoch, on .*\b3\b.*learning rate"
    ):
        toy.train_on(tmp_path / "toy", loss_terms=broken)
    assert not list(tmp_path.iterdir())


# Stage 1


@pytest.fixture(scope="module")
def stage1(tiny, tmp_path_factory):
    """T, A, A_KD of a small corpus: corpus, folder, features, arguments of each loss, first weights of each model."""
    folder, given, first = tmp_path_factory.mktemp("stage1"), [], {}
    write_iemocap(folder / "corpus", seed=2, conversations=2, utterances=(2, 2))
    corpus = read_iemocap(folder / "corpus")
    config = dataclasses.replace(SMALL, modalities=("text", "audio"), **{f"{m}_model": tiny[m] for m in tiny})

    def note_weights(model, *args):
        first[args[4].name] = {name: x.clone() for name, x in model.state_dict().items()}

    with pytest.MonkeyPatch.context() as m:
        spy(m, magtkd, "train", note_weights)
        spy(m, losses, "stage1_loss", lambda *args, **options: given.append((args, options)))
        store = magtkd.open_store(folder / "media", config)
        store.fill(corpus.utterances(), 2)
        run, names = Run(folder, "", None), ["text", "audio", "audio_kd"]
        encoded, _ = magtkd.run_stage1(config, names, corpus, store, run, 0, torch.device("cpu"))
    return corpus, folder, encoded, given, first


def test_a_kd_starts_from_a(stage1):
    _, folder, _, _, first = stage1
    audio = magtkd.load_file(folder / "audio.safetensors")
    assert all(torch.equal(first["audio_kd"][name], x) for name, x in audio.items())
    assert not all(torch.equal(first["audio"][name], x) for name, x in audio.items())


def test_what_the_loss_of_stage_1_is_given(stage1):
    corpus, folder, encoded, given, _ = stage1
    train = corpus.utterances("train")
    count = Counter(u.label for u in train)
    weight = torch.tensor([len(train) / (6 * max(1, count[c])) for c in range(6)])
    rows, totals = encoded["text"].features[: len(train)].tolist(), []
    for (logits, labels, features), options in given:
        assert options["weight"].tolist() == pytest.approx(weight.tolist())
        nll = -logits.detach().log_softmax(1)[range(len(labels)), labels]
        total = (nll * weight[labels]).sum() / len(labels)
        if "teacher_logits" in options:
            at = [rows.index(x) for x in options["teacher_features"].tolist()]
            assert [train[i].label for i in at] == labels.tolist()
            total += losses.soft_label_loss(logits.detach(), encoded["text"].logits[at])
            total += losses.feature_loss(features.detach(), encoded["text"].features[at])
        totals.append(float(total))
    assert ["teacher_logits" in options for _, options in given] == [False] * 8 + [True] * 4
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [x["model"] for x in log] == ["text", "text", "audio", "audio", "audio_kd", "audio_kd"]
    assert [x["loss"] for x in log] == pytest.approx([sum(totals[i : i + 2]) / 2 for i in range(0, 12, 2)], rel=1e-5)


def test_one_class_for_all_of_dev_is_noted(stage1, capsys):
    corpus, folder, encoded, *_ = stage1
    logits = torch.eye(6)[[3] * len(corpus.utterances())]
    for noted in (True, False):
        notes = magtkd.stage1_notes({"audio": Encoded(encoded["audio"].features, logits)}, corpus, folder)
        found = [n for n in notes if "one class" in n and "--stage1-lr (audio=..)" in n and "--warmup" in n]
        assert len(found) == ("one class" in capsys.readouterr().err) == noted
        logits[len(corpus.utterances("train")), 0] = 2  # the first of dev


class Fake(nn.Module):
    """An encoder of numbers; with `leak` its features depend on the batch."""

    device = torch.device("cpu")

    def __init__(self, leak: float):
        super().__init__()
        self.classifier, self.leak, self.seen = nn.Linear(1, 3), leak, []

    def forward(self, examples: list[float]):
        self.seen.append(examples)
        x = torch.tensor(examples)[:, None]
        x = x + self.leak * x.mean(dim=0)
        return x, self.classifier(x)


@pytest.mark.parametrize("leak", [0.0, 1.0])
def test_the_trial(leak, capsys):
    utterances = tuple(Utterance(f"u{i}", "a", "", 0, None, None) for i in range(9))
    corpus = Corpus("x", ("a", "b", "c"), {"train": (Conversation("c", utterances),)}, ())
    examples, encoder = (
        Examples(lambda i: float(i[1:]), {f"u{i}": i + 1 for i in range(1, 9)}),
        Fake(leak),
    )  # u0 has none
    magtkd.try_encoder("text", encoder, examples, corpus, Config(stage1_batch=2))
    assert encoder.seen[:2] == [[7.0, 8.0], [1.0, 2.0]]  # a step on the longest, one on the shortest
    assert ("text: a feature of this encoder depends on the other examples" in capsys.readouterr().err) == (leak > 0)
    with pytest.raises(InputError, match="no utterance of train has what the audio encoder needs"):
        magtkd.try_encoder("audio", encoder, Examples(examples.get, {}), corpus, Config())


# Stage 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stage_2(precision, tmp_path):
    """The weights kept are those of the best epoch on dev; options and class weights reach the loss."""
    data, given = Conversations(example(), ("text", "audio_kd"), torch.device("cpu")), []
    data.label[2] = 1  # train has the classes 0, 1, 1

    def loss(*args):
        given.append(args)
        return losses.stage2_loss(*args)

    config = dataclasses.replace(SMALL, width=8, precision=precision, alpha=0.0, beta=0.5)
    result = magtkd.train_fusion("MAGT", MAGT, data, config, tmp_path / "x", 5, Run(tmp_path, "", None), loss=loss)
    logits, _, _, alpha, beta, _, weight = given[0]
    assert weight.tolist() == [1, 0.5, 1] and (alpha, beta) == (0, 0.5)
    assert logits["text"].dtype == getattr(torch, precision)
    model, kinds = load_fusion(tmp_path / "x.safetensors")
    predictions = {}
    for split in ("dev", "test"):
        with torch.no_grad(), mixed_precision(data.device, precision)[0]:
            predictions[split] = model(*data.batch(data.splits[split]).inputs).logits["text"].argmax(1).tolist()
    assert result["predictions"] == predictions["test"] and kinds == ("text", "audio_kd")
    dev = [epoch["dev_f1"] for epoch in result["history"]]
    assert result["epoch"] == 1 + dev.index(max(dev)) and len(dev) == 3
    assert max(dev) == pytest.approx(
        scores(data.batch(data.splits["dev"]).labels.tolist(), predictions["dev"])["weighted_f1"]
    )
