"""Prediction on your own conversation: as in training, whatever is missing; one utterance at a time; errors."""

import csv
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from corpora import write_rows

import magtkd
from data import FIELDS, Conversation, Conversations, InputError, Utterance, read_conversation, read_meld
from extras import predict
from fusion import MAGT

OPTIONS = "--causal --stage1-epochs 1 --stage2-epochs 1 --seeds 1 --encoders tiny --workers 2".split()


@pytest.fixture(scope="module")
def run(meld, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "causal"
    assert magtkd.main(["meld", "--root", str(meld), "--out", str(out), *OPTIONS]) == 0
    return out


@pytest.fixture(scope="module")
def model(run):
    return predict.load_run(run, torch.device("cpu"))


@torch.inference_mode()
def test_predictions_of_the_corpus_are_those_of_training(meld, model, tmp_path):
    """For every conversation, with its missing clips: of a csv at once, and of its utterances one at a time."""
    data = Conversations(model.file, model.kinds, torch.device("cpu"))
    for conversation in (c for split in read_meld(meld).splits.values() for c in split):
        rows = [[u.speaker, u.text, u.audio, u.video] for u in conversation.utterances]
        utterances = read_conversation(write_rows(tmp_path / "c.csv", FIELDS[:4], rows)).utterances
        stream = predict.Stream(model)
        one_at_a_time = [row for u in utterances for row in stream.add(u)]
        expected = model.fusion(*data.batch([conversation.id]).inputs).logits["text"].softmax(dim=-1)
        for predicted in (predict.Stream(model).add(*utterances), one_at_a_time):
            got = torch.tensor([list(row["probabilities"].values()) for row in predicted])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_the_command_line(run, meld, tmp_path, capsys):
    clip = next(u.video for u in read_meld(meld).utterances("test") if u.video)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    rows = [
        ["Monica", "=1+1, you \x1b[31mand you", "", clip, "", ""],
        ["@stranger", "", "nothing.wav", "broken.mp4", "", ""],
        ["Monica", "Too late", "", clip, "900", "901"],
    ]
    command = ["--run", str(run), "--input", str(write_rows(tmp_path / "talk.csv", FIELDS, rows))]
    assert predict.main(command) == 0
    assert "Monica" in (said := capsys.readouterr().out) and "\x1b" not in said
    with open(tmp_path / "talk.emotions.csv", newline="", encoding="utf-8") as f:
        table = list(csv.DictReader(f))
    assert table[0]["text"] == "'=1+1, you  [31mand you" and table[1]["speaker"] == "'@stranger"
    assert table[1]["notes"] == "no text (missing); no audio (missing); no video (broken, 8 bytes (InvalidDataError))"
    assert table[0]["notes"] == "" and table[2]["notes"].startswith("no audio (ends at ")
    os.mkfifo(tmp_path / "pipe")
    for name in ("talk.csv", "talk.emotions.csv", "pipe", "nowhere/x"):  # nothing is overwritten
        assert predict.main([*command, "--out", str(tmp_path / name)]) == 2
        assert ("does not exist" if "/" in name else "exists already") in capsys.readouterr().err


def test_a_stream_does_not_wait(model, capsys):
    """A line is not read before the last one is predicted. Lines that are not utterances change nothing."""

    def lines():
        yield '\ufeff{"speaker": "Ross", "text": "hi"}\n'
        assert json.loads(capsys.readouterr().out)["speaker"] == "Ross"
        yield from ("\n", "{torn", "[1]", '{"text": "nobody says this"}', '{"speaker": "Joey", "text": "hey"}')

    with pytest.raises(InputError, match="3 lines were not utterances"):
        predict.predict_lines(model, lines())
    *errors, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [x["error"].split(":")[0] for x in errors] == ["line 3", "line 4", "line 5"]
    said = [Utterance(name, name, text, -1, None, None) for name, text in (("Ross", "hi"), ("Joey", "hey"))]
    assert last == predict.Stream(model).add(*said)[1]
    fusion = MAGT(replace(model.fusion.config, causal=False))
    with pytest.raises(InputError, match="--causal"):
        predict.predict_lines(replace(model, fusion=fusion), lines())


@pytest.mark.parametrize("seen, expected", [(["Eve", "Joey"], [2, 1, 2, 0]), (["first", "second"], [1, 2, 1, 0])])
def test_speakers(seen, expected, model):
    """By name, or by the order of speaking where the run's are called so; 0 for an unknown one."""
    said = tuple(Utterance(name, name, "", -1, None, None) for name in ("Joey", "Eve", "Joey", "Ann"))
    file = replace(model.file, speaker_names=seen, speaker=torch.arange(2), split=torch.zeros(2))
    assert predict.speaker_indices(replace(model, file=file), Conversation("c", said)).tolist() == expected


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("config.json", b'"features": false', b'"features": true', "it has no encoders"),
        ("metrics.json", None, None, "not a finished run: no metrics.json"),
        ("text.safetensors", b'"key"', b'"kez"', "features.safetensors was not made from today's text.safetensors"),
        ("features.safetensors", b"sadness", b"Sadness", "seed0.safetensors was not made from today's features"),
        ("magtkd-run.json", b'"salt": ""', b'"salt": "1"', "seed0.safetensors was not made from today's magtkd-run"),
        ("tiny/text/tokenizer.json", b"{", b" {", "tokenizer have changed"),
    ],
)
def test_parts_that_do_not_belong_together(name, old, new, words, run, tmp_path, capsys):
    path = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("media")) / name
    content = path.read_bytes()
    path.unlink()
    if old:
        path.write_bytes(content.replace(old, new, 1))
    source = write_rows(tmp_path / "c.csv", FIELDS[:2], [["A", "b"]])
    assert predict.main(["--run", str(tmp_path / "copy"), "--input", str(source)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
