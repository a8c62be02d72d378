"""The authors' pickles: what plain ones hold comes out; what is not plain is refused and not run."""

import collections
import os
import pickle
import pickletools
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import magtkd
from data import SPLITS, InputError, write_features
from extras.features import read_features
from extras.pickles import load_pickle, read_pickles

KINDS = {"text": 5, "audio": 4, "video": 3, "audio_kd": 4}


def content(split):
    """Two conversations, of 3 and of 1 utterances; the ids are the same in every split."""
    generator = np.random.default_rng(SPLITS.index(split))
    lengths = {"d0": 3, "d1": 1}
    fields = {
        kind: {c: [generator.normal(size=d).astype(np.float32) for _ in range(U)] for c, U in lengths.items()}
        for kind, d in KINDS.items()
    }
    fields["audio"]["d0"][1][:] = np.nan  # no sound
    fields["labels"] = {"d0": [2, 0, 1], "d1": [np.int64(2)]}
    fields["speakers"] = {"d0": [7, 3, 7], "d1": np.array([3])}
    return fields | {"vids": ["d1", "d0"], "dia2utt": {c: list(range(U)) for c, U in lengths.items()}}


def write(folder, change=None, protocol=pickle.DEFAULT_PROTOCOL):
    for split in SPLITS:
        fields = content(split)
        if change is not None and split == "dev":
            change(fields)
        path = folder / f"first_stage_{split}_features.pkl"
        path.write_bytes(pickle.dumps(fields, protocol))
    return folder


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_read_as_written(tmp_path, protocol):
    features = read_pickles(write(tmp_path, protocol=protocol))
    assert list(features.features) == ["text", "audio", "video", "audio_kd"]
    assert features.conversation_names == [f"{s} {c}" for s in SPLITS for c in ("d1", "d0")]  # the order of vids
    assert features.conversation.tolist() == [0, 1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5]
    assert features.split.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert features.label.tolist() == [2, 2, 0, 1] * 3 and features.label_names == ["class 0", "class 1", "class 2"]
    assert features.speaker.tolist() == [0, 1, 0, 1] * 3 and features.speaker_names == ["speaker 3", "speaker 7"]
    assert features.utterance_names[5] == "dev d0 0"
    dev = content("dev")
    for kind in KINDS:
        expected = torch.from_numpy(np.stack(dev[kind]["d1"] + dev[kind]["d0"])).nan_to_num()
        assert torch.equal(features.features[kind][4:8], expected)
    assert features.present["audio"].tolist() == [True, True, False, True] * 3
    write_features(tmp_path / "f.safetensors", features)
    again = read_features(tmp_path / "f.safetensors")  # it is a feature file like any other
    assert torch.equal(again.features["text"], features.features["text"])


def test_numpy_1_wrote_other_names(tmp_path):
    write(tmp_path, protocol=2)
    for path in tmp_path.iterdir():
        old = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        assert b"cnumpy.core.multiarray\n" in old and b"_core" not in old
        path.write_bytes(old)
    assert read_pickles(tmp_path).features["text"].shape == (12, 5)


def test_arrays_of_every_plain_kind(tmp_path):
    arrays = [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["Ross", "Joey"]),
        np.array([True, False]),
        np.float16([1.5]),
    ]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": arrays, "b": (np.float64(2.5), None, "x", 1)}, protocol))
        loaded = load_pickle(tmp_path / "a.pkl")
        assert loaded["b"] == (2.5, None, "x", 1)
        for x, y in zip(arrays, loaded["a"]):
            assert x.dtype == y.dtype and np.array_equal(x, y)


def test_stage_2_on_the_pickles(tmp_path, capsys):
    folder = tmp_path / "published"
    folder.mkdir()
    write(folder)
    options = ["iemocap", "--features", str(folder), "--out", str(tmp_path / "run"), "--seeds", "1"]
    assert magtkd.main([*options, "--encoders", "tiny", "--stage2-epochs", "1"]) == 0
    assert "| MAGT T+A_KD+V |" in capsys.readouterr().out


class Evil:
    """Its pickle is a program that makes a file."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_a_malicious_pickle_does_nothing(tmp_path):
    mark = tmp_path / "mark"
    attacks = [
        Evil(os.system, f"touch {mark}"),
        Evil(eval, f"open({str(mark)!r}, 'w')"),
        Evil(subprocess.Popen, ["touch", str(mark)]),
        {"text": {"d0": [Evil(open, str(mark), "w")]}},
        np.array([Evil(os.system, f"touch {mark}")], dtype=object),
    ]
    for attack in attacks:
        path = tmp_path / "bad.pkl"
        path.write_bytes(pickle.dumps(attack))
        with pytest.raises(InputError, match="refused, it holds .*; nothing of it was run"):
            load_pickle(path)
        assert not mark.exists()
        write(tmp_path, lambda fields, attack=attack: fields.update(dia2utt=attack))  # in a field that nobody needs
        with pytest.raises(InputError, match="first_stage_dev_features.pkl: refused"):
            read_pickles(tmp_path)
        assert not mark.exists()
    pickle.loads(pickle.dumps(attacks[0]))  # the attack is a real one
    assert mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3),
        collections.OrderedDict(a=1),
        {1, 2},
        np.array([None, 1], dtype=object),
        np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
        np.datetime64("2020-01-01"),
        np.ma.masked_array([1, 2]),
        np.dtype("f4"),
        1j,
        sys,
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_not_plain_is_refused(tmp_path, value):
    path = tmp_path / "x.pkl"
    name = b"cnumpy._core.multiarray\n_reconstruct\n." if value is sys else pickle.dumps([value])
    path.write_bytes(name)
    with pytest.raises(InputError, match="refused"):
        load_pickle(path)


def test_the_tools_of_an_attack_are_refused(tmp_path):
    """Built by hand: names reached through NumPy's modules, and NumPy's own functions called with other classes."""
    for text in (
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nos.system\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0ddtype.__new__\x93.",
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\nndarray\nS'xxxx'\ntR.",
        b"cnumpy\nndarray\n(tR.",
    ):
        pickletools.dis(text, out=open(os.devnull, "w"))  # each is a pickle
        (tmp_path / "x.pkl").write_bytes(text)
        with pytest.raises(InputError, match="refused|not a whole pickle"):
            load_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("data", [b"", b"nonsense", pickle.dumps(content("train"))[:-100], b"\x80\x09."])
def test_a_torn_file(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(InputError, match="not a whole pickle"):
        load_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: f.pop("text"), "field 'text' is missing; it has 'audio'"),
        (lambda f: f.pop("labels"), "field 'labels' is missing"),
        (lambda f: f.pop("audio_kd"), "field 'audio_kd' is in some of the three files only"),
        (lambda f: f["audio"].pop("d0"), "field 'audio': conversation 'd0' is missing"),
        (lambda f: f["vids"].append("d2"), "field 'text': conversation 'd2' is missing"),
        (lambda f: f["audio"]["d0"].pop(), "field 'audio': conversation 'd0' has 2 utterances, its text 3"),
        (lambda f: f["labels"]["d0"].append(1), "field 'labels': conversation 'd0' has 4 utterances, its text 3"),
        (lambda f: f["text"].update(d0=[]), "field 'text': conversation 'd0' has 0"),
        (lambda f: f["text"].update(d0="abc"), "must be a list with an entry per utterance, got str"),
        (lambda f: f.update(video=3), "field 'video' must be a dict"),
        (lambda f: f.update(vids=[]), "'vids' must name"),
        (lambda f: f["text"]["d0"].__setitem__(1, np.zeros(9)), "'text': dev d0 1 has 9 numbers, the first 5"),
        (lambda f: f["text"]["d0"].__setitem__(1, np.zeros((2, 5))), "wanted a vector, got an array [2, 5]"),
        (lambda f: f["text"]["d0"].__setitem__(1, "words"), "utterance 1: no vector of numbers"),
        (lambda f: f["text"]["d0"][1].__setitem__(0, np.inf), "'text' has NaN or infinity inside row 6, 'dev d0 1'"),
        (lambda f: f["labels"]["d0"].__setitem__(1, -1), "utterance 1: wanted a number from 0 or a name, got -1"),
        (lambda f: f["speakers"]["d0"].__setitem__(1, [1]), "wanted a number from 0 or a name"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    with pytest.raises(InputError, match=re.escape(words)):
        read_pickles(write(tmp_path, change))


def test_a_file_missing(tmp_path, capsys):
    folder = tmp_path / "published"
    folder.mkdir()
    write(folder)
    (folder / "first_stage_dev_features.pkl").unlink()
    assert magtkd.main(["meld", "--features", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "first_stage_dev_features.pkl missing" in capsys.readouterr().err
