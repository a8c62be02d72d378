"""Prediction on your own conversation: as in training, one utterance at a time, errors. The tour of the same run."""

import csv
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from corpora import write_rows
from safetensors.torch import load_file

import losses
import magtkd
from data import FIELDS, Conversation, Conversations, InputError, Utterance, read_conversation, read_meld
from extras import predict, tour
from fusion import MAGT


@pytest.fixture(scope="module")
def run(meld, tmp_path_factory):
    options = "--causal --stage1-epochs 1 --stage2-epochs 1 --seeds 1 --encoders tiny --workers 2".split()
    out = tmp_path_factory.mktemp("runs") / "causal"
    assert magtkd.main(["meld", "--root", str(meld), "--out", str(out), *options]) == 0
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
        ["Monica", "=1+1, you \x1b[31mand you", "", clip],
        ["@stranger", "", "nothing.wav", "broken.mp4"],
    ]
    command = ["--run", str(run), "--input", str(write_rows(tmp_path / "talk.csv", FIELDS[:4], rows))]
    assert predict.main(command) == 0
    assert "Monica" in (said := capsys.readouterr().out) and "\x1b" not in said
    with open(tmp_path / "talk.emotions.csv", newline="", encoding="utf-8") as f:
        table = list(csv.DictReader(f))
    assert table[0]["text"] == "'=1+1, you  [31mand you" and table[1]["speaker"] == "'@stranger"
    assert table[1]["notes"] == "no text (missing); no audio (missing); no video (broken, 8 bytes (InvalidDataError))"
    shutil.copy(run / "config.json", tmp_path)
    with pytest.raises(InputError, match="not a finished run: no metrics.json"):
        predict.load_run(tmp_path, torch.device("cpu"))
    os.mkfifo(tmp_path / "pipe")
    for name in ("talk.csv", "talk.emotions.csv", "pipe", "nowhere/x"):  # nothing is overwritten
        assert predict.main([*command, "--out", str(tmp_path / name)]) == 2
        assert ("does not exist" if "/" in name else "exists already") in capsys.readouterr().err
    assert predict.main(["--run", str(run), "--stream", "--out", "x"]) == 2 and not os.path.exists("x")


def test_a_stream_does_not_wait(model, capsys):
    """A line is not read before the last one is predicted. Lines that are not utterances change nothing."""

    def lines():
        yield '\ufeff{"speaker": "Ross", "text": "hi"}\n'
        assert json.loads(capsys.readouterr().out)["speaker"] == "Ross"
        yield from ("\n", "{torn", "[1]", '{"text": "nobody says this"}', '{"speaker": "Joey", "start": [1]}')
        yield '{"speaker": "Joey", "text": "hey"}'

    with pytest.raises(InputError, match="4 lines were not utterances"):
        predict.predict_lines(model, lines())
    *errors, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [x["error"].split(":")[0] for x in errors] == ["line 3", "line 4", "line 5", "line 6"]
    said = [Utterance(name, name, text, -1, None, None) for name, text in (("Ross", "hi"), ("Joey", "hey"))]
    assert last == predict.Stream(model).add(*said)[1]
    fusion = MAGT(replace(model.fusion.config, causal=False))
    with pytest.raises(InputError, match="--causal"):
        predict.predict_lines(replace(model, fusion=fusion), lines())


def test_speakers_of_iemocap(model):
    """By the order of speaking, as the run's are called so; 0 for an unknown one."""
    said = tuple(Utterance(name, name, "", -1, None, None) for name in ("Joey", "Eve", "Joey", "Ann"))
    file = replace(model.file, speaker_names=["first", "second"], speaker=torch.arange(2), split=torch.zeros(2))
    assert predict.speaker_indices(replace(model, file=file), Conversation("c", said)).tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("config.json", b'"features": false', b'"features": true', "it has no encoders"),
        ("text.safetensors", b'"key"', b'"kez"', "features.safetensors was not made from today's text.safetensors"),
        ("features.safetensors", b"sadness", b"Sadness", "seed0.safetensors was not made from today's features"),
        ("tiny/text/tokenizer.json", b"{", b" {", "tokenizer have changed"),
    ],
)
def test_parts_that_do_not_belong_together(name, old, new, words, run, tmp_path, capsys):
    path = shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("media")) / name
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    source = write_rows(tmp_path / "c.csv", FIELDS[:2], [["A", "b"]])
    assert predict.main(["--run", str(tmp_path / "copy"), "--input", str(source)]) == 2
    assert words in (said := capsys.readouterr().err) and said.count("\n") == 1


@torch.inference_mode()
def test_the_numbers_of_the_tour(run, model, meld):
    file = model.file
    text, video = (load_file(run / f"{kind}.features.safetensors") for kind in ("text", "video"))
    for name in (c.id for c in read_meld(meld).splits["test"]):
        values = tour.walk(run, name).values
        at = (file.conversation == file.conversation_names.index(name)) & file.present["video"]
        teaching = {"teacher_logits": text["logits"][at], "teacher_features": text["features"][at]}
        terms = losses.stage1_loss(video["logits"][at], file.label[at], video["features"][at], **teaching)
        assert values["L_all video = L_CE + L_s + L_f (14)"] == pytest.approx(float(terms["loss"]), abs=1e-4)
        assert values["L_s video (9)"] == pytest.approx(float(terms["l_s"]), abs=1e-4)
        assert values["L_f video (12)"] == pytest.approx(float(terms["l_f"]), abs=1e-4)
        batch = Conversations(file, model.kinds, torch.device("cpu")).batch([name])
        out, u = model.fusion(*batch.inputs), len(batch.labels) // 2
        terms = losses.stage2_loss(out.logits, out.hidden, batch.labels, 0.01, 0.09, batch.rows)
        assert values["L_total (25)"] == pytest.approx(float(terms["loss"]), rel=1e-5)
        torch.testing.assert_close(values["probabilities"], out.logits["text"][u].softmax(dim=-1))
        assert values["gate audio -> text (21)"] == pytest.approx(float(out.gates["text"]["audio"][u].mean()), abs=1e-5)
        assert torch.allclose(values["attention audio -> text"].sum(dim=1), torch.tensor(1.0))


def test_the_tour_of_a_corpus_that_has_changed(run, meld, tmp_path, capsys):
    root = shutil.copytree(meld, tmp_path / "meld")
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("media"))
    (copy / "config.json").write_text((run / "config.json").read_text().replace(str(meld), str(root)))
    for name, old, new, words in (
        ("test_sent_emo.csv", b",neutral,", b",fear,", "has other utterances, labels or text than"),
        ("test/output_repeated_splits_test/dia1_utt1.mp4", b"moov", b"none", "from other media than today's"),
    ):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content.replace(old, new, 1))
        assert tour.main(["--run", str(copy), "--conversation", "test_dia1"]) == 2
        assert words in capsys.readouterr().err and not (copy / "tour.md").exists()
        (root / name).write_bytes(content)


def test_the_command_line_of_the_tour(run, capsys):
    """It overwrites its own tour.md, and no other."""
    assert [tour.main(["--run", str(run), *more]) for more in ([], [], ["--conversation", "nobody"])] == [0, 0, 2]
    (run / "tour.md").write_text("mine")
    assert tour.main(["--run", str(run)]) == 2 and (run / "tour.md").read_text() == "mine"
    said = capsys.readouterr()
    assert "L_total (25)" in said.out and "test has test_dia" in said.err and "is not overwritten" in said.err
