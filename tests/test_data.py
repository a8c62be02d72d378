"""The readers, on trees that extras/demo.py writes with the oddities of the real ones, and on spoiled copies; then
conversations as rows, and what a training keeps of its state."""

import csv

import pytest
import torch
from test_features import example

from data import Conversations, InputError, load_state, read_iemocap, read_meld, replace_file, save_state
from extras import demo
from fusion import MAGT, FusionConfig

# IEMOCAP


def turns_on_disk(root, conversation):
    """(start, id, emotion) from a label file, read without the reader."""
    path = next(root.glob(f"Session*/dialog/EmoEvaluation/{conversation}.txt"))
    lines = [line.split("\t") for line in path.read_text().splitlines() if line.startswith("[")]
    return sorted((float(span.strip("[]").split(" - ")[0]), turn, emotion) for span, turn, emotion, _ in lines)


def test_iemocap_splits(iemocap):
    corpus = read_iemocap(iemocap)
    assert [len(corpus.splits[s]) for s in ("train", "dev", "test")] == [11, 1, 3]
    assert {c.id[:5] for c in corpus.splits["test"]} == {"Ses05"}
    assert {c.id[:5] for s in ("train", "dev") for c in corpus.splits[s]} == {"Ses01", "Ses02", "Ses03", "Ses04"}
    assert corpus.label_names == ("ang", "exc", "fru", "hap", "neu", "sad")
    assert corpus == read_iemocap(iemocap)
    assert len({read_iemocap(iemocap, seed=s).splits["dev"][0].id for s in range(5)}) > 1


def test_iemocap_turns(iemocap):
    corpus = read_iemocap(iemocap)
    for conversation in [c for split in corpus.splits.values() for c in split]:
        expected = [(t, e) for _, t, e in turns_on_disk(iemocap, conversation.id) if e in corpus.label_names]
        assert [(u.id, corpus.label_names[u.label]) for u in conversation.utterances] == expected
        starts = [u.start for u in conversation.utterances]
        assert starts == sorted(starts)
        # F or M before the number of the turn, named by the order in which they speak
        by_letter = {u.id[-4]: u.speaker for u in conversation.utterances}
        assert {(u.id[-4], u.speaker) for u in conversation.utterances} == set(by_letter.items())
        assert conversation.utterances[0].speaker == "first"
        assert all(u.text and "[" not in u.text for u in conversation.utterances)


def test_iemocap_counts_what_is_odd(iemocap):
    corpus = read_iemocap(iemocap)
    assert "5 turns labelled xxx, sur, fea, dis or oth, dropped" in corpus.notes
    assert "1 utterances without a sound file" in corpus.notes
    assert all(u.video for split in corpus.splits for u in corpus.utterances(split))  # Session5 has Divx, not DivX
    assert not any("._" in str(u.audio) for u in corpus.utterances("train"))
    grouped = next(c for s in corpus.splits.values() for c in s if c.id == "Ses02F_impro01")
    assert len({u.id[-4] for u in grouped.utterances[:4]}) == 2  # by time again, although the file goes by name


def edit(root, conversation, what, change):
    path = next(root.glob(f"Session*/dialog/{what}/{conversation}.txt"))
    path.write_text(change(path.read_text()))
    return path


def test_iemocap_unknown_emotion(iemocap, copy_of):
    root = copy_of(iemocap)
    turn = turns_on_disk(root, "Ses01M_impro01")[0]
    edit(root, "Ses01M_impro01", "EmoEvaluation", lambda t: t.replace(f"{turn[1]}\t{turn[2]}", f"{turn[1]}\tjoy"))
    with pytest.raises(InputError, match=r"Ses01M_impro01.txt:\d+: unknown emotion 'joy'; IEMOCAP has ang, "):
        read_iemocap(root)


def test_iemocap_torn_line(iemocap, copy_of):
    root = copy_of(iemocap)
    edit(root, "Ses01M_impro01", "EmoEvaluation", lambda t: t[: t.rindex("[") - 8])
    with pytest.raises(InputError, match=r"Ses01M_impro01.txt:\d+: torn line '\["):
        read_iemocap(root)


def test_iemocap_words_without_label_and_label_without_words(iemocap, copy_of):
    root = copy_of(iemocap)
    (_, first, _), (_, second, _) = turns_on_disk(root, "Ses01M_impro01")[:2]

    def without(turn):
        return lambda text: "\n".join(line for line in text.splitlines() if turn not in line)

    edit(root, "Ses01M_impro01", "EmoEvaluation", without(first))
    edit(root, "Ses01M_impro01", "transcriptions", without(second))
    notes = read_iemocap(root).notes
    assert "1 transcribed turns without a label, dropped" in notes
    assert "1 labelled turns without words in the transcript, dropped" in notes


@pytest.mark.parametrize("what", ["EmoEvaluation", "transcriptions"])
def test_iemocap_file_missing(iemocap, copy_of, what):
    root = copy_of(iemocap)
    next(root.glob(f"Session2/dialog/{what}/Ses02M_impro01.txt")).unlink()
    with pytest.raises(InputError, match="1 conversations have a file in only one of .*Ses02M_impro01.txt"):
        read_iemocap(root)


def test_iemocap_session_missing(iemocap, copy_of):
    root = copy_of(iemocap)
    (root / "Session3").rename(root / "elsewhere")
    with pytest.raises(InputError, match=r"incomplete: 1 of 5 sessions missing \(Session3\)"):
        read_iemocap(root)


def test_no_corpus(tmp_path):
    with pytest.raises(InputError, match="no IEMOCAP at .*Session1.*sail.usc.edu.*--root.*bash run.sh demo"):
        read_iemocap(tmp_path / "nothing")
    with pytest.raises(InputError, match="no complete MELD at .*train_sent_emo.csv.*--root.*bash run.sh demo"):
        read_meld(tmp_path)
    (tmp_path / "train.tar.gz").touch()
    with pytest.raises(InputError, match="unpack it"):
        read_meld(tmp_path)


# MELD


def rows_on_disk(root, split):
    path = next(root.rglob(f"{split}_sent_emo.csv"))
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def test_meld_rows(meld):
    corpus = read_meld(meld)
    for split in ("train", "dev", "test"):
        rows = rows_on_disk(meld, split)
        utterances = corpus.utterances(split)
        ids = [f"{split}_dia{r['Dialogue_ID']}_utt{r['Utterance_ID']}" for r in rows]
        assert sorted(u.id for u in utterances) == sorted(ids)
        emotion = dict(zip(ids, (r["Emotion"] for r in rows)))
        speaker = dict(zip(ids, (r["Speaker"] for r in rows)))
        assert all(corpus.label_names[u.label] == emotion[u.id] and u.speaker == speaker[u.id] for u in utterances)
        for c in corpus.splits[split]:
            numbers = [int(u.id.rsplit("utt", 1)[1]) for u in c.utterances]
            assert numbers == sorted(numbers)
    ids = [u.id for split in corpus.splits for u in corpus.utterances(split)]
    assert len(set(ids)) == len(ids)  # although ids restart in each split


def test_meld_oddities(meld):
    corpus = read_meld(meld)
    utterances = {u.id: u for split in corpus.splits for u in corpus.utterances(split)}
    assert "train_dia2" not in {c.id for c in corpus.splits["train"]}
    assert "train_dia1_utt1" not in utterances and "train_dia1_utt0" in utterances
    assert utterances["dev_dia0_utt1"].video is None
    assert "1 utterances without a clip" in corpus.notes
    assert "1 clips without a row in the csv, ignored" in corpus.notes
    assert utterances["test_dia0_utt0"].video.name == "final_videos_testdia0_utt0.mp4"
    assert not any(u.video and u.video.name.startswith("._") for u in utterances.values())
    first = utterances["train_dia0_utt0"].text
    assert not any(0x80 <= ord(c) < 0xA0 for c in first) and any(c in first for c in "…’“”")


def test_meld_csv_in_the_root_or_in_the_splits(meld, copy_of):
    root = copy_of(meld)
    expected = [[u.id for u in read_meld(meld).utterances(s)] for s in ("train", "dev", "test")]
    for split in ("train", "dev", "test"):
        table = next(root.rglob(f"{split}_sent_emo.csv"))
        folder = root / split if table.parent == root else root
        folder.mkdir(exist_ok=True)
        table.rename(folder / table.name)
    assert [[u.id for u in read_meld(root).utterances(s)] for s in ("train", "dev", "test")] == expected


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.replace(",neutral,", ",bored,"), "unknown emotion 'bored'; MELD has anger"),
        (lambda t: t[: t.rindex('"') - 40], r":\d+: torn row"),
        (lambda t: t.replace("Speaker", "Who", 1), "columns Speaker are missing"),
        (lambda t: t.splitlines()[0] + "\n", "no rows"),
        (lambda t: t + t.splitlines()[-1] + "\n", "a second row for Dialogue_ID"),
    ],
)
def test_meld_spoiled_table(meld, copy_of, change, words):
    root = copy_of(meld)
    path = next(root.rglob("test_sent_emo.csv"))
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_meld(root)


def test_demo_writes_what_the_readers_read(tmp_path):
    """Without flaws nothing is odd."""
    demo.write_meld(tmp_path / "m", conversations=(3, 1, 1), utterances=(2, 3))
    demo.write_iemocap(tmp_path / "i", conversations=1, utterances=(2, 3))
    for corpus in (read_meld(tmp_path / "m"), read_iemocap(tmp_path / "i")):
        assert len(corpus.notes) == 1 and "conversations" in corpus.notes[0]
        assert all(u.audio and u.video for split in corpus.splits for u in corpus.utterances(split))


# Conversations as rows


def test_conversations_come_as_rows():
    file = example()
    data = Conversations(file, ("text", "audio_kd"), torch.device("cpu"))
    assert data.splits == {"train": ["c0", "c1"], "dev": ["c2"], "test": ["c3"]}
    assert data.lengths == {"c0": 2, "c1": 1, "c2": 2, "c3": 2}
    for names, rows in (["c2", "c0"], [3, 4, 0, 1]), (["c1"], [2]), (["c3", "c1", "c0"], [5, 6, 2, 0, 1]):
        batch = data.batch(names)
        features, speakers, lengths, present = batch.inputs
        assert lengths == [data.lengths[name] for name in names]
        assert torch.equal(features["text"], file.features["text"][rows])
        assert torch.equal(features["audio"], file.features["audio_kd"][rows])
        assert torch.equal(batch.labels, file.label[rows])
        assert present.keys() == batch.rows.keys() == {"audio"}  # every utterance has its words
        assert present["audio"].tolist() == [row != 2 for row in rows]
        assert batch.rows["audio"].tolist() == [i for i, row in enumerate(rows) if row != 2]
        config = FusionConfig({"text": 4, "audio": 3}, num_classes=3, num_speakers=data.num_speakers, width=8)
        assert MAGT(config)(*batch.inputs).logits["text"].shape == (len(rows), 3)


def test_a_speaker_unknown_in_training_is_number_0():
    file = example()
    data = Conversations(file, ("text",), torch.device("cpu"))
    assert data.num_speakers == 2 and data.speaker.tolist() == [1, 2, 1, 2, 1, 1, 0]  # Eve speaks in test alone
    file.speaker = torch.tensor([0, 2, 0, 1, 0, 2, 1])  # train: Ada and Eve
    data = Conversations(file, ("text",), torch.device("cpu"))
    assert data.num_speakers == 3 and data.batch(["c2", "c3"]).inputs[1].tolist() == [0, 1, 3, 0]


# Files that are written whole, or not at all


def test_half_a_file_never_has_the_name_of_a_whole_one(tmp_path):
    path = tmp_path / "file"
    replace_file(path, lambda part: part.write_text("old"))

    def killed(part):
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, killed)
    assert path.read_text() == "old"
    replace_file(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def parts_of_a_training(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(seed):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_the_state_of_a_training_is_kept(tmp_path):
    before, after = parts_of_a_training(2), parts_of_a_training(1)
    assert load_state(tmp_path / "state", after) is None
    history, best = [{"train": {"loss": 1.5}, "dev_f1": 40.0}], {"dev_f1": 40.0, "model": before["model"].state_dict()}
    save_state(tmp_path / "state", before, history, best)
    found, found_best = load_state(tmp_path / "state", after)
    assert found == history and found_best["dev_f1"] == 40.0
    assert torch.equal(found_best["model"]["weight"], before["model"].weight)
    assert torch.equal(after["model"].weight, before["model"].weight)
    assert str(after["optimizer"].state_dict()) == str(before["optimizer"].state_dict())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_text("[1, 2, 3]"),
        lambda path: torch.save({"model": torch.ones(2)}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: save_state(path, {"model": torch.nn.Linear(4, 2), "optimizer": torch.nn.Identity()}, [], {}),
    ],
    ids=["empty", "cut", "text", "other keys", "a list", "another model"],
)
def test_a_state_that_is_not_this_trainings(tmp_path, spoil):
    path = tmp_path / "text.resume.pt"
    save_state(path, parts_of_a_training(1), [], {})
    spoil(path)
    with pytest.raises(InputError, match="text.resume.pt: not a checkpoint of this model; .*--fresh$"):
        load_state(path, parts_of_a_training(1))
