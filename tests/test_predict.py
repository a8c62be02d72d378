"""Prediction on a conversation of one's own: as in training, whatever is missing; one utterance at a time; errors."""

import csv
import dataclasses
import io
import json
import shutil

import pytest
import torch

import magtkd
from data import Conversation, Conversations, InputError, MediaError, Utterance, read_iemocap, read_meld
from extras import predict
from extras.features import read_features
from fusion import MAGT
from magtkd import load_fusion

SHAPE = (8, 48)  # of a video: frames, pixels
SHORT = ["--stage1-epochs", "1", "--stage2-epochs", "1", "--seeds", "1", "--encoders", "tiny", "--workers", "2"]


@pytest.fixture(scope="module")
def causal_run(meld, tmp_path_factory):
    """A whole run with a causal fusion, on MELD's layout."""
    out = tmp_path_factory.mktemp("runs") / "causal"
    assert magtkd.main(["meld", "--root", str(meld), "--out", str(out), "--causal", *SHORT]) == 0
    return out


@pytest.fixture
def model(causal_run):
    return predict.load_run(causal_run, torch.device("cpu"))


def write(path, rows, columns=predict.FIELDS):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)


def conversation_of_test(meld):
    return max(read_meld(meld).splits["test"], key=lambda c: len(c.utterances))


def as_rows(conversation):
    fields = [(u.speaker, u.text, u.audio, u.video) for u in conversation.utterances]
    return [{k: str(x) for k, x in zip(predict.FIELDS, row) if x is not None} for row in fields]


@torch.inference_mode()
def test_a_conversation_of_the_corpus_gets_what_training_gave_it(causal_run, meld, model, tmp_path):
    """Through the csv, the decoders, the encoders and the fusion; broken and missing clips of the corpus included."""
    file = read_features(causal_run / "features.safetensors")
    fusion, kinds = load_fusion(causal_run / "fusion.safetensors")
    data = Conversations(file, kinds, torch.device("cpu"))
    corpus = read_meld(meld)
    for split in corpus.splits.values():
        for conversation in split:
            batch = data.batch([conversation.id])
            expected = fusion(*batch.inputs).logits["text"].softmax(dim=-1)
            write(tmp_path / "c.csv", as_rows(conversation))
            answers = predict.predict(model, predict.read_conversation(tmp_path / "c.csv"))
            got = torch.tensor([a.probabilities for a in answers])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_the_command_line_marks_what_is_missing(causal_run, meld, tmp_path, capsys):
    clip = next(u.video for u in conversation_of_test(meld).utterances if u.video)
    shutil.copy(clip, tmp_path / "clip.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    rows = [
        {"speaker": "Monica", "text": "Hello, you, and you", "video": "clip.mp4"},
        {"speaker": "a stranger", "text": "Well", "video": "clip.mp4", "start": "0", "end": "0.5"},
        {"speaker": "Monica", "text": "Words alone, and many of them, more than a line of the table can hold"},
        {"speaker": "Monica", "text": "", "audio": "nothing.wav", "video": "broken.mp4"},
        {"speaker": "Monica", "text": "Too late", "video": "clip.mp4", "start": "900", "end": "901"},
    ]
    write(tmp_path / "talk.csv", rows)
    options = ["--run", str(causal_run), "--input", str(tmp_path / "talk.csv")]
    assert predict.main(options) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "speaker" in lines[0] and "%neutral" in lines[0] and len(lines) == 8
    assert "audio (none given), video (none given)" in lines[3] and "…" in lines[3]
    with open(tmp_path / "talk.emotions.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert [r["speaker"] for r in table] == [r["speaker"] for r in rows]
    missing = [r["missing"] for r in table]
    assert missing[:2] == ["", ""]
    assert missing[3] == "text (none given); audio (missing); video (broken, 7 bytes (InvalidDataError))"
    assert missing[4].startswith("audio (ends before ") and "video (ends at" in missing[4]
    for row in table:
        p = {k.removeprefix("p_"): float(v) for k, v in row.items() if k.startswith("p_")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-3) and max(p, key=p.get) == row["emotion"]
    assert predict.main([*options, "--out", str(tmp_path / "no" / "where.csv")]) == 2


def test_a_stream_answers_as_the_whole_does(causal_run, model, meld, tmp_path, monkeypatch, capsys):
    rows = as_rows(conversation_of_test(meld))
    write(tmp_path / "c.csv", rows)
    whole = predict.predict(model, predict.read_conversation(tmp_path / "c.csv"))
    lines = [json.dumps(row) for row in rows]
    lines[1:1] = ["", "{torn", "[1]", '{"text": "nobody says this"}', '{"speaker": "Ross", "text": 3}']
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert predict.main(["--run", str(causal_run), "--stream"]) == 2  # four lines were no utterances
    captured = capsys.readouterr()
    assert captured.err == "predict: 4 lines were no utterances and were left out; their answers say why\n"
    answers = [json.loads(line) for line in captured.out.splitlines()]
    errors = [a["error"] for a in answers if "error" in a]
    assert len(errors) == 4 and all(f"line {n}" in e for n, e in zip((3, 4, 5, 6), errors))
    answers = [a for a in answers if "error" not in a]
    assert len(answers) == len(rows)
    for a, expected in zip(answers, whole):
        assert list(a["probabilities"].values()) == pytest.approx(expected.probabilities, abs=2e-4)
        assert a["missing"] == expected.missing


def test_a_stream_answers_at_once(causal_run, monkeypatch, capsys):
    """The second line is not asked for before the first is answered."""

    def lines():
        yield '{"speaker": "Ross", "text": "hi"}\n'
        assert '"emotion"' in capsys.readouterr().out
        yield '{"speaker": "Joey", "text": "hey"}\n'

    monkeypatch.setattr("sys.stdin", lines())
    assert predict.main(["--run", str(causal_run), "--stream"]) == 0


def test_a_sound_file_of_the_utterance_alone_beside_a_film(iemocap, tmp_path):
    """IEMOCAP's own layout: a WAV per utterance, a film per conversation."""
    corpus = read_iemocap(iemocap)
    u = next(u for u in corpus.utterances("test") if u.audio and u.video and u.start > 3)
    whole = predict.decode(u, "audio", SHAPE)
    assert len(whole) / 16_000 == pytest.approx(u.end - u.start, abs=predict.ALONE)
    film = Utterance("x", "first", "", -1, u.video, u.video, u.start, u.end)
    assert predict.sound_window(film) == (u.start, u.end)
    no_film = Utterance("x", "first", "", -1, u.audio, None, u.start, u.end)  # then the times are those of the sound
    assert predict.sound_window(no_film) == (u.start, u.end)
    assert predict.decode(u, "video", SHAPE).shape == (8, 3, 48, 48)
    late = Utterance("x", "first", "", -1, u.audio, u.video, u.start + 100, u.end + 110)
    assert isinstance(predict.decode(late, "audio", SHAPE), MediaError)


def test_speakers(model):
    def conversation(*names):
        return Conversation("c", tuple(Utterance(str(i), n, "", -1, None, None) for i, n in enumerate(names)))

    by_name = predict.Model(model.encoders, model.fusion, [], {"Ross": 3, "Joey": 1}, SHAPE)
    assert predict.speaker_indices(by_name, conversation("Joey", "Ann", "Ross")).tolist() == [1, 0, 3]
    in_order = predict.Model(model.encoders, model.fusion, [], {"first": 1, "second": 2}, SHAPE)
    assert predict.speaker_indices(in_order, conversation("Joey", "Ann", "Joey", "Eve")).tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "speaker and text missing (the file is empty)"),
        ("speaker,words\nA,b\n", "column text missing (it has speaker, words)"),
        ("speaker,text\n", "no utterance in it"),
        ("speaker,text\nA,b,c\n", ":2: torn row, more fields than columns"),
        ("speaker,text,start\nA,b\n", ":2: torn row, fewer fields than columns"),
        ("speaker,text\nA,b\n,c\n", ":3: no speaker"),
        ("speaker,text,start\nA,b,soon\n", ":2: start must be a number of seconds up to 1e+06, got 'soon'"),
        ("speaker,text,end\nA,b,nan\n", ":2: end must be a number of seconds up to 1e+06, got 'nan'"),
        ("speaker,text,start,end\nA,b,2,1\n", ":2: ends at 1.0 s, before it starts"),
    ],
)
def test_tables_that_do_not_fit(text, words, causal_run, tmp_path, capsys):
    (tmp_path / "c.csv").write_text(text)
    assert predict.main(["--run", str(causal_run), "--input", str(tmp_path / "c.csv")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_column_that_is_not_used_is_named(tmp_path, capsys):
    (tmp_path / "c.csv").write_text("\ufeffspeaker,text,vidoe\nA,b,c.mp4\n", encoding="utf-8")
    predict.read_conversation(tmp_path / "c.csv")
    assert "columns that are not used: vidoe" in capsys.readouterr().err


def test_runs_that_do_not_do(causal_run, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("speaker,text\nA,b\n")

    def error(run):
        assert predict.main(["--run", str(run), "--input", str(tmp_path / "c.csv")]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and not captured.out
        return captured.err

    assert "none is no finished run: config.json, fusion.safetensors missing" in error(tmp_path / "none")
    copy = shutil.copytree(causal_run, tmp_path / "copy", ignore=shutil.ignore_patterns("media"))
    (copy / "text.safetensors").unlink()
    assert "no finished run: text.safetensors missing" in error(copy)
    (copy / "text.safetensors").write_bytes((copy / "video.safetensors").read_bytes())
    assert "not the weights of this run's encoder" in error(copy)
    (copy / "fusion.safetensors").write_bytes(b"nonsense")
    assert "not a fusion model" in error(copy)
    (copy / "config.json").write_text('{"features": "abc"}')
    assert "no encoders" in error(copy)
    assert "cannot be read" in (predict.main(["--run", "x", "--input", "y"]), capsys.readouterr().err)[1]


def test_a_stream_needs_a_causal_model(model):
    fusion = MAGT(dataclasses.replace(model.fusion.config, causal=False))
    with pytest.raises(InputError, match="--causal"):
        predict.Stream(dataclasses.replace(model, fusion=fusion))
