"""Training: schedule, batches, resuming, what the losses are given, precision, and the trial before it."""

import copy
import dataclasses
import json

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
from magtkd import Config, Examples, Run, load_fusion, make_batches, make_optimizer, make_recipe, mixed_precision

SMALL = Config(64, magtkd.each(1e-3), 8, magtkd.each(2), stage2_epochs=4, class_weights=True)


def test_learning_rate():
    """50 conversations, batch 16, 30 epochs: 120 steps, 12 of warm-up. (The released one is in test_variants.py.)"""
    recipe = make_recipe(Config(), lr=2.0, batch=16, epochs=30, examples=50)
    optimizer, schedule = make_optimizer(nn.Linear(1, 1), recipe)
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


def test_stage_1(tiny, tmp_path, monkeypatch, capsys):
    """A_KD starts from A; what the loss is given, and its value in log.jsonl; one class for all of dev is noted."""
    write_iemocap(tmp_path / "corpus", seed=2, conversations=2, utterances=(2, 2))
    corpus, given, first = read_iemocap(tmp_path / "corpus"), [], {}
    config = dataclasses.replace(SMALL, modalities=("text", "audio"), **{f"{m}_model": tiny[m] for m in tiny})
    spy(monkeypatch, magtkd, "train", lambda model, *args: first.update({args[4].name: copy.deepcopy(model)}))
    spy(monkeypatch, losses, "stage1_loss", lambda *args, **options: given.append((args, options)))
    store = magtkd.MediaStore(tmp_path / "media", ("audio",))
    store.fill(corpus.utterances(), 2)
    run, names = Run(tmp_path, "", None), ["text", "audio", "audio_kd"]
    encoded, _ = magtkd.run_stage1(config, names, corpus, store, run, 0, torch.device("cpu"))
    assert "depends on the other" not in capsys.readouterr().err

    audio = magtkd.load_file(tmp_path / "audio.safetensors")
    assert all(torch.equal(first["audio_kd"].state_dict()[name], x) for name, x in audio.items())
    train = corpus.utterances("train")
    count = [u.label for u in train].count
    weight = torch.tensor([len(train) / (6 * max(1, count(c))) for c in range(6)])
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
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in log] == pytest.approx([sum(totals[i : i + 2]) / 2 for i in range(0, 12, 2)], rel=1e-5)

    logits = torch.eye(6)[[3] * len(corpus.utterances())]
    for noted in (True, False):
        notes = magtkd.stage1_notes({"audio": Encoded(encoded["audio"].features, logits)}, corpus, tmp_path)
        assert noted == any("one class" in n and "--stage1-lr (audio=..)" in n and "--warmup" in n for n in notes)
        logits[len(train), 0] = 2  # the first of dev


class Leaky(nn.Module):
    """An encoder of numbers whose features depend on the batch."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.classifier, self.seen = nn.Linear(1, 3), []

    def forward(self, examples: list[float]):
        self.seen.append(examples)
        x = torch.tensor(examples)[:, None] + sum(examples)
        return x, self.classifier(x)


def test_the_trial(capsys):
    utterances = tuple(Utterance(f"u{i}", "a", "", 0, None, None) for i in range(9))
    corpus = Corpus("x", ("a", "b", "c"), {"train": (Conversation("c", utterances),)}, ())
    encoder, examples = Leaky(), Examples(lambda i: float(i[1:]), {f"u{i}": i for i in range(1, 9)})  # u0 has none
    magtkd.try_encoder("text", encoder, examples, corpus, Config(stage1_batch=2))
    assert encoder.seen[:2] == [[7.0, 8.0], [1.0, 2.0]]  # a step on the longest, one on the shortest
    assert "text: a feature of this encoder depends on the other examples" in capsys.readouterr().err
    with pytest.raises(InputError, match="no utterance of train has what the audio encoder needs"):
        magtkd.try_encoder("audio", encoder, Examples(examples.get, {}), corpus, Config())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stage_2(precision, tmp_path, monkeypatch):
    """Options and class weights reach the loss; the weights kept are the best on dev; resuming is exact."""
    data, given = Conversations(example(), ("text", "audio_kd"), torch.device("cpu")), []
    data.label[2] = 1  # train has the classes 0, 1, 1
    spy(monkeypatch, losses, "stage2_loss", lambda *args: given.append(args))

    def fuse(name: str, loss=losses.stage2_loss):
        config = dataclasses.replace(SMALL, width=8, precision=precision, alpha=0.0, beta=0.5, stage2_batch=1)
        return magtkd.train_fusion("MAGT", MAGT, data, config, tmp_path / name, 5, Run(tmp_path, "", None), loss)

    result = fuse("x")
    logits, _, _, alpha, beta, _, weight = given[0]
    assert weight.tolist() == [1, 0.5, 1] and (alpha, beta) == (0, 0.5) and precision in str(logits["text"].dtype)
    model, _ = load_fusion(tmp_path / "x.safetensors")
    batch = data.batch(data.splits["dev"] + data.splits["test"])  # two utterances each
    with torch.no_grad(), mixed_precision(data.device, precision)[0]:
        predictions = model(*batch.inputs).logits["text"].argmax(1).tolist()
    dev = [epoch["dev_f1"] for epoch in result["history"]]
    assert result["predictions"] == predictions[2:] and result["epoch"] == 1 + dev.index(max(dev))
    assert max(dev) == pytest.approx(scores(batch.labels[:2].tolist(), predictions[:2])["weighted_f1"])

    for at in (3, 1, 4):  # steps until Ctrl-C; 2 an epoch
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            interrupt(m, at, (magtkd, "optimizer_step"))
            m.setattr(magtkd.time, "monotonic", iter(range(10**6)).__next__)  # as if epochs took long: each is saved
            fuse("resumed")
    assert len(torch.load(tmp_path / "resumed.resume.pt")["history"]) == 2 and fuse("resumed") == result
    resumed = load_fusion(tmp_path / "resumed.safetensors")[0].state_dict()
    assert all(torch.equal(x, resumed[name]) for name, x in model.state_dict().items())

    def broken(*args):
        loss = losses.stage2_loss(*args)["loss"]
        return {"loss": loss * torch.nan if len(given) == 2 else loss}

    given.clear()
    with pytest.raises(InputError, match=r"first in step 1 of this epoch, on c\d\. .*learning rate"):
        fuse("broken", broken)
