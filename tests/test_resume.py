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

import checkpoint
import demo
import magtkd
import media
import stage1
import training
from data import SPLITS, read_iemocap
from encoders import TextEncoder
from losses import distillation_loss
from training import make_batches, padding_share

PROJECT = Path(__file__).parent.parent
OPTIONS = ["--encoders", "tiny", "--stage1-epochs", "3", "--stage2-epochs", "8", "--seeds", "1", "--workers", "1"]
# A child per attempt, forked from a process that has imported everything: a start then costs no time. It kills itself
# by a timer, so that the moment does not depend on how busy the parent is.
SERVER = """
import json, os, signal, sys
import magtkd
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
        left |= {p.name for p in (tmp_path / "killed").rglob("*") if "vectors" in p.name or p.suffix == ".pt"}
    assert kills >= 5 and left
    assert attempt(tmp_path / "killed") == 0
    server.stdin.close()
    server.wait()
    assert (tmp_path / "killed" / "metrics.json").read_bytes() == (tmp_path / "whole" / "metrics.json").read_bytes()
    for name in ("features.safetensors", "fusion.safetensors", "audio_kd.safetensors"):
        assert_same_tensors(tmp_path / "killed" / name, tmp_path / "whole" / name)


def test_a_resumed_fusion_is_bit_for_bit_the_undisturbed_one(tmp_path, monkeypatch):
    """Stopped after every single epoch."""
    from test_features import example

    import stage2

    config = training.CONFIGS["demo"]
    data = stage2.Conversations(example(), ("text", "audio_kd"), torch.device("cpu"))
    monkeypatch.setattr(stage2, "SAVE_EVERY", -1.0)

    def train(place):
        return stage2.train_fusion("MAGT", data, 3, config, tmp_path / place, 0, torch.device("cpu"))

    whole = train("whole")
    save, epochs = checkpoint.save, []

    def save_and_stop(path, parts, epoch, best):
        save(path, parts, epoch, best)
        epochs.append(epoch)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    for _ in range(config.stage2_epochs):
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    assert epochs == list(range(1, config.stage2_epochs + 1))
    assert train("stopped") == whole
    assert_same_tensors(tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors")


def test_each_file_is_decoded_once_and_the_teacher_runs_once(small, tmp_path, monkeypatch):
    """Over a whole run, all five encoders and all epochs."""
    decoded, taught = [], []
    load_audio, load_frames, forward = media.load_audio, media.load_frames, TextEncoder.forward

    def count(load, kind):
        return lambda path, *window: decoded.append((kind, str(path), window)) or load(path, *window)

    monkeypatch.setattr(media, "load_audio", count(load_audio, "sound"))
    monkeypatch.setattr(media, "load_frames", count(load_frames, "picture"))
    encode = stage1.encode

    def teach(encoder, examples, ids, **options):
        if isinstance(encoder, TextEncoder) and options:  # the pass that leaves the vectors; others choose the epoch
            taught.extend(ids)
        return encode(encoder, examples, ids, **options)

    def only_in_its_own_training(self, input_ids):
        assert not (tmp_path / "run" / "text.vectors.safetensors").exists()
        return forward(self, input_ids)

    monkeypatch.setattr(stage1, "encode", teach)
    monkeypatch.setattr(TextEncoder, "forward", only_in_its_own_training)
    options = ["iemocap", "--root", str(small), "--out", str(tmp_path / "run"), *OPTIONS, "--ablation"]
    assert magtkd.main(options) == 0
    ids = [u.id for split in SPLITS for u in read_iemocap(small).utterances(split)]
    assert len(decoded) == len(set(decoded)) == 2 * len(ids)
    assert taught == ids


def test_the_stored_teacher_equals_one_run_for_every_batch(small, tiny):
    corpus = read_iemocap(small)
    torch.manual_seed(0)
    teacher = TextEncoder(tiny["text"], 6, 64)
    examples = stage1.make_examples(teacher, "text", corpus, None)
    ids = [u.id for split in SPLITS for u in corpus.utterances(split)]
    stored = stage1.encode(teacher, examples, ids)
    student = torch.randn(len(ids), 64), torch.randn(len(ids), 6)
    for batch in make_batches([examples.length(i) for i in ids], 16):
        with torch.inference_mode():
            features, logits = teacher.eval()(**teacher.collate([examples.get(ids[i]) for i in batch]))
        torch.testing.assert_close(stored.features[batch], features, atol=1e-5, rtol=0)
        torch.testing.assert_close(stored.logits[batch], logits, atol=1e-5, rtol=0)
        x, p = student[0][batch], student[1][batch]
        once = distillation_loss(p, x, stored.logits[batch], stored.features[batch])
        torch.testing.assert_close(once, distillation_loss(p, x, logits, features), atol=1e-5, rtol=0)


def test_batches_of_similar_length():
    draw = random.Random(0)
    lengths = [draw.randint(8, 110) for _ in range(400)]
    torch.manual_seed(0)
    first, second = make_batches(lengths, 16), make_batches(lengths, 16)
    for batches in (first, second):
        assert sorted(i for b in batches for i in b) == list(range(400))
        assert [len(b) for b in sorted(batches, key=len)] == [16] * 25
    again = {frozenset(b) for b in first} & {frozenset(b) for b in second}
    assert len(again) <= 2  # the shortest and the longest can hardly change
    assert [max(lengths[i] for i in b) for b in first] != sorted(max(lengths[i] for i in b) for b in first)
    at_random = make_batches([1] * 400, 16)
    assert padding_share(lengths, first) < 0.12 < 0.35 < padding_share(lengths, at_random)
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
        assert line["utterances_per_second"] > 0 and line["process_bytes"] > 10**6 and 0 <= line["padding"] < 1
        assert line["lr"] >= 0 and line["padding"] <= line["padding_at_random"] + 0.05
    fusion = [x for x in (tmp_path / "run" / "fusion" / "log.jsonl").read_text().splitlines() if "step" not in x]
    assert len(fusion) == 2 * 8
