"""Readers, on synthetic corpora and on damaged copies; writing; conversations as rows."""

import csv
import os
import re
import shutil

import pytest
import torch
from corpora import write_rows
from test_features import example

import data
from data import InputError, append_line, digest, read_csv, read_iemocap, read_meld, read_text, replace_file

LABELS = "Session1/dialog/EmoEvaluation/Ses01M_impro01.txt"
TURN = r"^\[([\d.]+) - .*\t(Ses.*)\t(ang|exc|fru|hap|neu|sad)\t"
TABLE = "test_sent_emo.csv"
TRANSCRIPT = "Session1/dialog/transcriptions/Ses01M_impro01.txt"


def edit(path, change):
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode())


def test_iemocap(iemocap):
    corpus = read_iemocap(iemocap)
    assert [len(corpus.splits[s]) for s in ("train", "dev", "test")] == [11, 1, 3]
    assert {c.id[:5] for c in corpus.splits["test"]} == {"Ses05"} != {c.id[:5] for c in corpus.splits["dev"]}
    assert corpus == read_iemocap(iemocap) and corpus != read_iemocap(iemocap, seed=1)
    for c in (c for split in corpus.splits.values() for c in split):
        turns = re.findall(TURN, next(iemocap.rglob(f"EmoEvaluation/{c.id}.txt")).read_text(), re.M)
        turns.sort(key=lambda turn: float(turn[0]))
        assert [(u.id, corpus.label_names[u.label]) for u in c.utterances] == [turn[1:] for turn in turns]
        letters = "".join(dict.fromkeys(u.id[-4] for u in c.utterances))  # F or M, in the order of speaking
        assert [u.speaker for u in c.utterances] == [("first", "second")[letters.index(u.id[-4])] for u in c.utterances]
        assert all(u.text and "[" not in u.text and u.audio_is_cut and u.video for u in c.utterances)
    assert {"5 turns labelled xxx, sur, fea, dis or oth, dropped", "1 utterances without audio"} < set(corpus.notes)


def test_meld(meld):
    corpus = read_meld(meld)
    utterances = {u.id: u for u in corpus.utterances()}
    for split in ("train", "dev", "test"):
        with open(next(meld.rglob(f"{split}_sent_emo.csv")), encoding="utf-8", newline="") as f:
            rows = {f"{split}_dia{r['Dialogue_ID']}_utt{r['Utterance_ID']}": r for r in csv.DictReader(f)}
        assert [u.id for u in corpus.utterances(split)] == sorted(rows)
        for u in corpus.utterances(split):
            assert (corpus.label_names[u.label], u.speaker) == (rows[u.id]["Emotion"], rows[u.id]["Speaker"])
            assert u.start is None and u.end is None  # the csv's times are those of the episode, not of the clip
    assert "1 utterances without video" in corpus.notes and utterances["dev_dia0_utt1"].video is None
    assert "1 clips without a row in the csv, ignored" in corpus.notes
    assert utterances["test_dia0_utt0"].video.name == "final_videos_testdia0_utt0.mp4"
    assert utterances["train_dia0_utt0"].text.endswith(", “It’s neutral…”")


def test_damaged_and_incomplete_corpora(iemocap, meld, tmp_path):
    roots = {LABELS: (tmp_path / "iemocap", read_iemocap), TABLE: (tmp_path / "meld", read_meld)}
    shutil.copytree(iemocap, tmp_path / "iemocap")
    shutil.copytree(meld, tmp_path / "meld")
    for file, change, words in [
        (LABELS, lambda t: re.sub(r"\t\w{3}\t", "\tjoy\t", t, count=1), ":3: unknown emotion 'joy'; IEMOCAP has ang, "),
        (LABELS, lambda t: t + t.split("\n")[2] + "\n", r":\d+: malformed line or turn labelled twice"),
        (TABLE, lambda t: t.replace(",neutral,", ",bored,", 1), r":\d+: unknown label 'bored'; MELD has anger"),
        (TABLE, lambda t: t.replace(",0,0,", ",zero,0,", 1), r":\d+: malformed row"),
    ]:
        root, read = roots[file]
        text = (root / file).read_bytes()
        edit(root / file, change)
        with pytest.raises(InputError, match=f"{root / file}{words}"):
            read(root)
        (root / file).write_bytes(text)

    root = roots[LABELS][0]
    (_, first, _), (_, second, _) = re.findall(TURN, (root / LABELS).read_text(), re.M)[:2]
    edit(root / LABELS, lambda text: re.sub(f".*{first}.*", "", text))
    edit(root / TRANSCRIPT, lambda text: re.sub(f".*{second}.*", "", text))
    notes = read_iemocap(root).notes
    assert "1 transcribed turns without a label, dropped" in notes
    assert "1 labelled turns without text in the transcript, dropped" in notes
    (root / "Session3").rename(root / "elsewhere")
    with pytest.raises(InputError, match="no complete IEMOCAP at .*: Session3 missing.*sail.usc.edu.*run.sh demo"):
        read_iemocap(root)


def test_text_files(tmp_path):
    (tmp_path / "a").write_bytes("Adé\n".encode() + "Zoë\n".encode("cp1252"))
    for name, words in ("a", ":2: not in UTF-8"), ("b", ": .*No such"), ("", ": .*Is a"):
        with pytest.raises(InputError, match=f"{tmp_path / name}{words}"):
            read_text(tmp_path / name)
    (tmp_path / "a").write_bytes("\ufeffone\r\ntwo\rthree\u2028\n".encode())  # as editors write
    assert read_text(tmp_path / "a") == "one\ntwo\nthree\u2028\n"


HEADER = ["split", "conversation", "speaker", "text", "label"]
ROWS = [["train", "a", "Ann", "Hi.", "glad"], ["dev", "b", "Bob", "Well, no.", "sad"], ["test", "c", "Ann", "", "sad"]]
ROWS += [["Train", "a", "Bob", "I see.", "sad"]]


def test_csv_columns_and_notes(tmp_path):
    (tmp_path / "a.wav").touch()
    header = ["Split", "Dialogue_ID", "Utterance_ID", "SPEAKER", "Utterance", "Emotion", "mood", "video", "StartTime"]
    rows = [
        ["VALIDATION", "b", "7", "Ade\u0301", "It\x92s\nme", "sad", "", "a.wav", "00:01:02,5"],
        ["train", "a", "1", "Ad\u00e9", "x", "glad", "", "no.mp4", "1:02.5"],
        ["test", "c", "0", "Eve", "", "sad", "", "", ""],
        ["train", "a", "0", "Ade\u0301", "y", "sad", "", "no.mp4", "62,5"],
    ]
    corpus = read_csv(write_rows(tmp_path / "t.csv", header, rows, delimiter=";"))
    assert corpus.label_names == ("glad", "sad")
    assert [u.id for u in corpus.utterances("train")] == ["a_1", "a_0"]  # the order of the file
    (u,) = corpus.utterances("dev")
    assert (u.text, u.audio, u.video) == ("It’s me", tmp_path / "a.wav", tmp_path / "a.wav")
    assert {(u.speaker, u.start) for u in corpus.utterances("train", "dev")} == {("Ad\u00e9", 62.5)}  # one person
    lost = f"1 media files not found ({tmp_path / 'no.mp4'})"
    without = [f"{n} utterances without {m}" for n, m in ((3, "audio"), (1, "text"), (3, "video"))]
    assert corpus.notes[1:] == ("1 columns not used (mood)", lost, *without)


def test_csv_faults(tmp_path):
    path = tmp_path / "t.csv"
    assert len(read_csv(write_rows(path, HEADER, ROWS)).utterances()) == 4  # unchanged, it is read
    for number, cells, words in [
        (0, {"split": "x"}, ":2: split must be one of train, dev, test, val, valid, validation; got 'x'"),
        (0, {"split": "dev"}, ":5: conversation 'a' is in dev and in train"),
        (1, {"speaker": "A\x1b[31m"}, ":3: control character in the speaker"),
        (3, {"start": "5", "end": "1"}, ":5: ends at 1 s, before it starts"),
        *[(1, {"start": x}, ":3: start must be in seconds") for x in ("-1", "nan", "1e400", "9" * 5000, "1:2:3:4")],
        (0, {"id": "1"}, ":5: utterance 'a_1' is there a second time, after .*:2$"),
        (1, {"label": "mad"}, ": labels that no row of train has: mad"),
        (1, {"utterance": "x"}, ": two columns for the text"),
    ]:
        rows = [dict(zip(HEADER, row)) for row in ROWS]
        rows[number] |= cells
        columns = [*HEADER, *(cells.keys() - set(HEADER))]
        with pytest.raises(InputError, match=f"{path}{words}"):
            read_csv(write_rows(path, columns, [[r.get(c, "1" if c == "id" else "") for c in columns] for r in rows]))


def test_conversations_to_predict(tmp_path, capsys):
    rows = [["Ann", "Well, no; yes", "", "b"], ["Bob", 'a "b"\tc', "1", "b"], ["Eve", "", "x", "b"]]
    for separator in ",;\t":
        path = write_rows(tmp_path / "t.csv", ["Speaker", " TEXT ", "mood", "conversation"], rows, separator)
        found = [(u.id, u.speaker, u.text, u.label) for u in data.read_conversation(path).utterances]
        assert found == [("0", "Ann", "Well, no; yes", -1), ("1", "Bob", 'a "b" c', -1), ("2", "Eve", "", -1)]
        assert capsys.readouterr().err == f"{path}: columns not used: mood\n"
    for text, words in [
        ('speaker,text\nAnn,"no\nBob,yes\n', ":3: malformed row .*quote"),
        ("\nspeaker,text\n\nAnn,no,yes\n", ":4: 3 fields, but 2 columns"),
        ("Ann,no\n", ": no column speaker and text; its first line has ann, no"),
        ("speaker,text\n", ": no utterances"),
        ("speaker,text,conversation\nAnn,no,a\nAnn,no,b\n", ": rows of several conversations"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=f"t.csv{words}"):
            data.read_conversation(path)


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path, x = tmp_path / "file.npy", torch.zeros(10_000)
    path.write_text("old")
    for write in (
        lambda _: torch.save(x, "/dev/full"),
        lambda new: new.write_text("ne") + x.numpy().tofile("/dev/full"),
    ):
        with pytest.raises(InputError, match="file.npy: cannot be written .*What is complete is kept"):
            replace_file(path, write)  # on a full disk
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_regular_files_are_written_and_removed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / f"{data.TEMPORARY}1").symlink_to("mine")
    (tmp_path / f"{data.TEMPORARY}2").touch()
    data.remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"pipe", "mine", "broken", f"{data.TEMPORARY}1"}
    for name in ("pipe", "", "/dev/null", "broken", f"{data.TEMPORARY}1", "no/x", "mine/x"):
        for write in (lambda path: replace_file(path, pytest.fail), lambda path: append_line(path, "x")):
            with pytest.raises(InputError, match=f"{name}: .*(not a regular file|does not exist)"):
                write(tmp_path / name)
    append_line(tmp_path / "mine", "zwei ü \ud800")
    assert (tmp_path / "mine").read_bytes() == "minezwei ü \\ud800\n".encode()


def test_conversations_are_rows():
    file = example()
    file.speaker = torch.tensor([0, 2, 0, 1, 0, 2, 1])  # 0 and 2 speak in train, 1 does not
    rows_of = data.Conversations(file, ("text", "audio_kd"), torch.device("cpu"))
    assert rows_of.num_speakers == 3 and rows_of.batch(["c2", "c3"]).inputs[1].tolist() == [0, 1, 3, 0]
    names, rows = ["c3", "c1", "c0"], [5, 6, 2, 0, 1]
    batch = rows_of.batch(names)
    features, _, lengths, present = batch.inputs
    assert lengths == [1 if name == "c1" else 2 for name in names] and torch.equal(batch.labels, file.label[rows])
    assert torch.equal(features["text"], file.features["text"][rows])
    assert torch.equal(features["audio"], file.features["audio_kd"][rows])
    assert {m: x.tolist() for m, x in present.items()} == {"audio": [row != 2 for row in rows]}  # all have text
    assert {m: x.tolist() for m, x in batch.rows.items()} == {"audio": [i for i, r in enumerate(rows) if r != 2]}


def test_digests_differ_where_contents_do():
    x = torch.arange(6.0)
    different = [(), ("",), ("a", ""), (b"a",), (1,), (None,), (x,), (x.view(2, 3),), (x.double(),), (x + 1,), (x, x)]
    assert len({digest(*parts) for parts in different}) == len(different)
    assert digest({"a": 1, "b": (2,)}) == digest({"b": [2], "a": 1})
