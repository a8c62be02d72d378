"""The converter of pickles: plain values come out as written; anything else is refused, and nothing is run."""

import os
import pickle

import numpy as np
import pytest

from data import SPLITS, InputError, read_iemocap
from extras.demo import write_iemocap
from extras.pickles import IEMOCAP_LABELS, MELD_LABELS, convert, load_pickle


def write_authors(folder, protocol=4, **change):
    """Two conversations in each split, of 3 and of 1 utterances, with the same ids; `change` is of dev."""
    for i, split in enumerate(SPLITS):
        fields = {"text": {"d0": list(np.full((3, 5), i)), "d1": [np.full(5, i)]}}
        fields["audio"] = {"d0": [np.ones(4), np.full(4, np.nan), np.ones(4)], "d1": [np.ones(4)]}  # NaN: no audio
        fields |= {"labels": {"d0": [2, 0, 1], "d1": [2]}, "speakers": {"d0": [7, 3, 7], "d1": np.array([3])}}
        fields |= change if split == "dev" else {}
        (folder / f"first_stage_{split}_features.pkl").write_bytes(pickle.dumps(fields, protocol))
    return folder


@pytest.mark.parametrize("protocol", range(6))
def test_the_authors_pickles(tmp_path, protocol):
    file = convert(write_authors(tmp_path, protocol))
    assert file.conversation_names == [f"{s} {c}" for s in SPLITS for c in ("d0", "d1")]
    assert file.conversation.tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5] and file.utterance_names[4] == "dev d0 0"
    assert file.label.tolist() == [2, 0, 1, 2] * 3 and file.label_names == ["class 0", "class 1", "class 2"]
    assert file.speaker.tolist() == [1, 0, 1, 0] * 3 and file.speaker_names == ["speaker 3", "speaker 7"]
    assert file.split.tolist() == file.features["text"][:, 4].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert file.present["audio"].tolist() == [True, False, True, True] * 3


MELD = {0: "train", 1: "train", 1038: "train", 1039: "dev", 1152: "dev", 1153: "test", 1432: "test"}


@pytest.mark.parametrize("dims", [(100, 1582, 342), (600, 300)])
def test_lists_of_iemocap_and_meld(dims, tmp_path):
    """The first conversations are train and dev. Of IEMOCAP, dev is what the reader of the corpus draws."""
    expected, speakers, classes = MELD, [np.eye(4)[0], [0, 0, 1, 0]], MELD_LABELS
    if len(dims) == 3:
        write_iemocap(tmp_path / "corpus", conversations=4, utterances=(1, 1))
        splits = read_iemocap(tmp_path / "corpus", seed=3).splits
        expected = {c.id: split for split, part in splits.items() for c in part}
        speakers, classes = ["F", "M"], IEMOCAP_LABELS
    names, n = list(expected), sum(split != "test" for split in expected.values())
    columns = [{c: [f"{c}_F000", f"{c}_M000"] for c in names}, {c: speakers for c in names}]
    columns += [{c: [i % len(classes), 1] for i, c in enumerate(names)}]
    columns += [{c: [[i] * d, [0.5] * d] for i, c in enumerate(names)} for d in dims]
    content = [*columns, {c: ["Is it?", "It is."] for c in names}, set(names[:n]), list(names[n:]), {}]
    content = pickle.dumps(content, 2).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")  # of NumPy 1
    (tmp_path / "x.pkl").write_bytes(content)
    file = convert(tmp_path / "x.pkl", seed=3)
    assert [x.shape[1] for x in file.features.values()] == list(dims)
    row = file.utterance_names.index(f"{names[1]}_F000")
    assert file.features["text"][row, -1] == file.label[row] == 1 == file.speaker[row + 1]
    assert file.label_names == list(classes)
    found = {file.conversation_names[c]: SPLITS[s] for c, s in zip(file.conversation, file.split)}
    assert found == {str(name): split for name, split in expected.items()}


def test_nothing_is_run_and_a_damaged_pickle_is_named(tmp_path):
    attack = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "mark"),))})()
    with pytest.raises(InputError, match="refused, it holds .*mkdir; nothing of it was run"):
        convert(write_authors(tmp_path, more=np.array([attack], dtype=object)))
    assert not (tmp_path / "mark").exists()
    forged = b"cnumpy\ndtype\n(S'V8'\ntR(I3\nS'|'\nN(S'a'\nt(dS'a'\n(cnumpy\ndtype\n(S'O'\ntRI0\ntsI8\nI1\nI0\ntb."
    assert pickle.loads(forged).names == ("a",)  # 8 bytes of an array would be a pointer to an object
    (tmp_path / "x.pkl").write_bytes(forged)
    assert load_pickle(tmp_path / "x.pkl").dtype.names is None
    (tmp_path / "x.pkl").write_bytes(b"I" + b"9" * 5000 + b"\n.")
    with pytest.raises(InputError, match="x.pkl: cannot be read as a pickle of plain values"):
        load_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("labels", None, "dev_features.pkl: field 'labels' is missing"),
        ("labels", {"d0": [0, 1], "d1": [2]}, "'labels': conversation 'dev d0' must have one entry per utterance"),
        ("audio", {"d0": [[1] * 9] * 3, "d1": [[1] * 4]}, "'audio': each utterance must have a vector, all of one"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, field, value, message):
    with pytest.raises(InputError, match=message):
        convert(write_authors(tmp_path, **{field: value}))
