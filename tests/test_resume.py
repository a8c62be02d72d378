"""Nothing computed twice, nothing lost: SIGKILL at any moment, the caches, and the batches' padding."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_features import example

import encoders
import magtkd
from data import Conversations, read_iemocap
from encoders import TextEncoder
from extras import demo
from losses import distillation_loss
from magtkd import make_batches

PROJECT = Path(__file__).parent.parent
OPTIONS = ["--encoders", "tiny", "--stage1-epochs", "3", "--stage2-epochs", "8", "--seeds", "1", "--workers", "1"]
# A child per attempt, forked from a process that has imported everything: a start then costs no time. It kills itself
# by a timer, so that the moment does not depend on how busy the parent is.
SERVER = """
import json, os, signal, sys
import extras.cli, magtkd
for line in sys.stdin:
    delay, options = json.loads(line)
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")
        if delay:
            signal.setitimer(signal.ITIMER_REAL, delay)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(magtkd.main(options))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A corpus of seconds: 10 conversations of 4 utterances."""
    root = tmp_path_factory.mktemp("small") / "iemocap"
    demo.write_iemocap(root, seed=2, conversations=2, utterances=(4, 4))
    return root


def assert_same_tensors(a, b):
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_sigkill_at_ten_moments_changes_no_digit(small, tmp_path):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def attempt(out, delay=0.0):
        options = ["iemocap", "--root", str(small), "--out", str(out), *OPTIONS]
        server.stdin.write(json.dumps([delay, options]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    start = time.monotonic()
    assert attempt(tmp_path / "whole") == 0
    seconds = time.monotonic() - start
    draw, kills, left = random.Random(0), 0, set()
    for _ in range(10):
        code = attempt(tmp_path / "killed", delay=seconds * draw.uniform(0.02, 0.15))
        assert code in (0, -9)
        kills += code == -9
        left |= {p.name for p in (tmp_path / "killed").rglob("*") if ".features." in p.name or p.suffix == ".pt"}
    assert kills >= 5 and left
    assert attempt(tmp_path / "killed") == 0
    server.stdin.close()
    server.wait()
    assert (tmp_path / "killed" / "metrics.json").read_bytes() == (tmp_path / "whole" / "metrics.json").read_bytes()
    for name in ("features.safetensors", "fusion.safetensors", "audio_kd.safetensors"):
        assert_same_tensors(tmp_path / "killed" / name, tmp_path / "whole" / name)


def test_a_resumed_fusion_is_bit_for_bit_the_undisturbed_one(tmp_path, monkeypatch):
    """Stopped after every single epoch."""
    config = magtkd.CONFIGS["demo"]
    data = Conversations(example(), ("text", "audio_kd"), torch.device("cpu"))

    def train(name):
        return magtkd.train_fusion("MAGT", data, 3, config, tmp_path / name, 0)

    whole = train("whole")
    save, epochs = magtkd.save_state, []

    def save_and_stop(path, parts, history, best):
        save(path, parts, history, best)
        epochs.append(len(history))
        raise KeyboardInterrupt

    monkeypatch.setattr(magtkd, "save_state", save_and_stop)
    for _ in range(config.stage2_epochs):
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    assert epochs == list(range(1, config.stage2_epochs + 1))
    assert train("stopped") == whole
    assert_same_tensors(tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors")
    assert not list(tmp_path.glob("*.resume.pt"))


def test_each_file_is_decoded_once_and_the_teacher_runs_once(small, tmp_path, monkeypatch):
    """Over a whole run, all five encoders and all epochs."""
    decoded, encoded = [], []
    load_audio, load_frames, forward = encoders.load_audio, encoders.load_frames, TextEncoder.forward

    def count(load, kind):
        return lambda path, *window: decoded.append((kind, str(path), window)) or load(path, *window)

    monkeypatch.setattr(encoders, "load_audio", count(load_audio, "sound"))
    monkeypatch.setattr(encoders, "load_frames", count(load_frames, "picture"))
    encode = magtkd.encode

    def watch(encoder, examples, ids, *how):
        if isinstance(encoder, TextEncoder):
            encoded.append(list(ids))
        return encode(encoder, examples, ids, *how)

    def only_in_its_own_training(self, examples):
        assert not (tmp_path / "run" / "text.features.safetensors").exists()
        return forward(self, examples)

    monkeypatch.setattr(magtkd, "encode", watch)
    monkeypatch.setattr(TextEncoder, "forward", only_in_its_own_training)
    options = ["iemocap", "--root", str(small), "--out", str(tmp_path / "run"), *OPTIONS, "--stage2-epochs", "1"]
    assert magtkd.main([*options, "--ablation"]) == 0
    corpus = read_iemocap(small)
    everyone, dev = ([u.id for u in some] for some in (corpus.utterances(), corpus.utterances("dev")))
    assert len(decoded) == len(set(decoded)) == 2 * len(everyone)
    assert encoded == [dev, dev, dev, everyone]  # each epoch's choice, then the answers that teach


def test_the_stored_teacher_equals_one_run_for_every_batch(small, tiny):
    corpus = read_iemocap(small)
    torch.manual_seed(0)
    teacher = TextEncoder(tiny["text"], 6, 64)
    examples = magtkd.make_examples(teacher, "text", corpus, None)
    ids = [u.id for u in corpus.utterances()]
    row = {name: i for i, name in enumerate(ids)}
    stored = magtkd.encode(teacher, examples, ids)
    student = torch.randn(len(ids), 64), torch.randn(len(ids), 6)
    for batch in make_batches(examples.lengths, 16):
        with torch.inference_mode():
            features, logits = teacher.eval()([examples.get(name) for name in batch])
        rows = [row[name] for name in batch]
        torch.testing.assert_close(stored.features[rows], features, atol=1e-5, rtol=0)
        torch.testing.assert_close(stored.logits[rows], logits, atol=1e-5, rtol=0)
        x, p = student[0][rows], student[1][rows]
        once = distillation_loss(p, x, stored.logits[rows], stored.features[rows])
        torch.testing.assert_close(once, distillation_loss(p, x, logits, features), atol=1e-5, rtol=0)


def padding(lengths, batches):
    """The share of padding in batches that are padded to their longest example."""
    return 1 - sum(lengths.values()) / sum(len(b) * max(lengths[i] for i in b) for b in batches)


def test_batches_of_similar_length():
    draw = random.Random(0)
    lengths = {f"u{i}": draw.randint(8, 110) for i in range(400)}
    torch.manual_seed(0)
    first, second = make_batches(lengths, 16), make_batches(lengths, 16)
    for batches in (first, second):
        assert sorted(i for b in batches for i in b) == sorted(lengths)
        assert [len(b) for b in sorted(batches, key=len)] == [16] * 25
    again = {frozenset(b) for b in first} & {frozenset(b) for b in second}
    assert len(again) <= 2  # the shortest and the longest can hardly change
    assert [max(lengths[i] for i in b) for b in first] != sorted(max(lengths[i] for i in b) for b in first)
    at_random = make_batches(dict.fromkeys(lengths, 1), 16)
    assert padding(lengths, first) < 0.12 < 0.35 < padding(lengths, at_random)
    torch.manual_seed(0)
    assert make_batches(lengths, 16) == first


def test_the_log_has_a_line_per_epoch(small, tmp_path):
    options = ["iemocap", "--root", str(small), "--out", str(tmp_path / "run"), *OPTIONS, "--log-steps"]
    assert magtkd.main(options) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step" in line]
    assert [x["step"] for x in steps if x["model"] == "text" and x["epoch"] == 2] == [0, 1] and steps[0]["loss"] > 0
    lines = [line for line in lines if "step" not in line]
    assert [(x["model"], x["epoch"]) for x in lines] == [
        (m, e) for m in ("text", "audio_kd", "video") for e in (1, 2, 3)
    ]
    for line in lines:
        assert line["seconds"] > 0 and line["process_bytes"] > 10**6 and line["lr"] >= 0 and 0 <= line["dev_f1"] <= 100
        of_this_epoch = [x["loss"] for x in steps if (x["model"], x["epoch"]) == (line["model"], line["epoch"])]
        assert line["loss"] == pytest.approx(sum(of_this_epoch) / len(of_this_epoch))
        if line["model"] == "audio_kd":  # the terms of Eq. 14 apart
            assert line["loss"] == pytest.approx(line["l_ce"] + line["l_s"] + line["l_f"], rel=1e-5)
    fusion = [json.loads(x) for x in (tmp_path / "run" / "fusion" / "log.jsonl").read_text().splitlines()]
    epochs = [x for x in fusion if "step" not in x]
    assert len(epochs) == 2 * 8 and all(x["kd_audio"] > 0 for x in epochs if x["model"].startswith("MAGT"))
