"""Wrong input is refused before it costs anything, by kinds: options, encoder folders, features, pickles, text files.

Each refusal is one line that names the file, option or field at fault. What is odd but plain is understood.
"""

import json
import pickle
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_features import example, spoil

import magtkd
from data import SPLITS, InputError, read_iemocap, read_meld, read_table, write_features
from extras import demo
from extras.features import MOST_CLASSES, read_features
from extras.pickles import load_pickle, read_pickles
from extras.predict import read_conversation

SHORT = ["--encoders", "tiny", "--stage1-epochs", "1", "--stage2-epochs", "1", "--seeds", "1"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "iemocap"
    demo.write_iemocap(root, seed=2, conversations=1, utterances=(4, 4))
    return root


@pytest.fixture(scope="module")
def small_meld(tmp_path_factory):
    root = tmp_path_factory.mktemp("small") / "meld"
    demo.write_meld(root, seed=2, conversations=(1, 1, 1), utterances=(3, 3))
    return root


# Options

COUNTS = ["0", "-1", "1.5", "nan", "1e3", "", "x", "9" * 30]
WEIGHTS = ["-0.1", "nan", "inf", "-inf", "1e9", "1e400", "", "x"]
WRONG = [(name, x) for name in ("stage1-epochs", "stage2-epochs", "stage1-batch") for x in COUNTS]
WRONG += [(name, x) for name in ("alpha", "beta", "sweep") for x in WEIGHTS]
WRONG += [(name, x) for name in ("stage1-lr", "stage2-lr") for x in [*WEIGHTS, "0", "1e-400", "11"]]
WRONG += [("seeds", x) for x in ["0", "-1", "5000", "1.0"]] + [("seed", x) for x in ["-1", str(2**32), "0.5"]]
WRONG += [("workers", x) for x in ["0", "-3", "100000"]] + [("width", x) for x in ["0", "7", "12", "1000000"]]
WRONG += [("max-tokens", x) for x in ["0", "63", "1e3"]] + [("precision", "int8"), ("preset", "old")]
WRONG += [("device", x) for x in ["gpu", "cuda:99", "cuda:-1", "meta", "mps", "cpu:1", "", "cuda:x"]]
WRONG += [("modalities", x) for x in ["", "audio", "text,smell", "text,,audio"]]


@pytest.mark.parametrize("option", sorted({name for name, _ in WRONG}))
def test_numbers_and_names_of_the_command_line(refused, tmp_path, option):
    for name, value in WRONG:
        if name == option:
            line = refused("demo", f"--{name}={value}", "--out", tmp_path / "run")
            assert f"--{name}" in line, (name, value, line)
    assert not (tmp_path / "run").exists()


def test_cells_of_a_sweep_that_would_share_a_file(refused, tmp_path):
    assert "share a file" in refused("demo", "--sweep", "0.1", "0.10000001", "--out", tmp_path / "run")
    many = [str(i / 100) for i in range(13)]
    assert "--sweep takes 12 weights at most" in refused("demo", "--sweep", *many, "--out", tmp_path / "run")


# Encoder folders


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SPOILED = {
    "cut weights": lambda folder: cut(folder / "model.safetensors"),
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights of something else": lambda folder: save_file({"a": torch.ones(2)}, folder / "model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "a configuration that is no JSON": lambda folder: cut(folder / "config.json"),
    "an unknown type": lambda folder: change_json(folder / "config.json", model_type="abacus"),
    "another width": lambda folder: change_json(folder / "config.json", hidden_size=128),
    "a width of text": lambda folder: change_json(folder / "config.json", hidden_size="wide"),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("kind", SPOILED)
def test_an_encoder_that_is_not_whole(refused, tiny, small, tmp_path, kind):
    models = {m: shutil.copytree(tiny[m], tmp_path / m) for m in ("text", "audio", "video")}
    options = ["iemocap", "--root", small, "--width", "64", *SHORT[2:], "--encoders", "full"]
    options += [x for m, folder in models.items() for x in (f"--{m}-model", folder)]
    for m, chosen in (("text", "text"), ("video", "text,video")):
        SPOILED[kind](models[m])
        line = refused(*options, "--modalities", chosen, "--out", tmp_path / f"run of {m}")
        assert str(models[m]) in line and "disk full" not in line, line
        shutil.rmtree(models[m])
        shutil.copytree(tiny[m], models[m])


@pytest.mark.parametrize("wanted, given", [("text", "audio"), ("text", "video"), ("audio", "text"), ("video", "audio")])
def test_an_encoder_of_another_kind(refused, tiny, small, tmp_path, wanted, given):
    models = tiny | {wanted: tiny[given]}
    options = ["iemocap", "--root", small, "--width", "64", *SHORT[2:], "--encoders", "full"]
    options += [x for m, folder in models.items() for x in (f"--{m}-model", folder)]
    chosen = "text" if wanted == "text" else f"text,{wanted}"
    line = refused(*options, "--modalities", chosen, "--out", tmp_path / "run")
    assert tiny[given] in line and "disk full" not in line, line


# Features and pickles: the same checks for both


def columns():
    """Of `example`: the numbers per utterance and the names, which a test spoils."""
    file = example()
    return file.features["text"].clone(), file.label.clone(), list(file.label_names)


def as_feature_file(folder, text, label, label_names):
    file = example()
    write_features(folder / "f.safetensors", file)
    spoil(folder / "f.safetensors", {"text": text, "label": label}, {"label_names": label_names})
    return read_features(folder / "f.safetensors")


def as_pickles(folder, text, label, label_names):
    file = example()
    for s, split in enumerate(SPLITS):
        content = {"text": {}, "labels": {}, "speakers": {}}
        for c in file.conversation[file.split == s].unique().tolist():
            rows = (file.conversation == c).nonzero().flatten()
            content["text"][f"c{c}"] = [x.numpy() for x in text[rows]]
            content["labels"][f"c{c}"] = [label_names[i] for i in label[rows].tolist()]
            content["speakers"][f"c{c}"] = file.speaker[rows].tolist()
        (folder / f"first_stage_{split}_features.pkl").write_bytes(pickle.dumps(content))
    return read_pickles(folder)


def put(x):
    def change(text, label, names):
        text = text.double()
        text[3, 1] = x
        return text, label, names

    return change


BAD_FEATURES = {
    "infinite as float32": (put(1e300), "NaN or infinity"),
    "infinity": (put(torch.inf), "NaN or infinity"),
    "a NaN among numbers": (put(torch.nan), "NaN or infinity"),
    "so large that a loss overflows": (put(1e20), "a number beyond 1e"),
    "width 0": (lambda text, label, names: (text[:, :0], label, names), r"got .*\[7, 0\]|wanted a vector|got .*0\]"),
    "one class": (lambda text, label, names: (text, label * 0, names[:1]), "2 to 100 classes, got 1"),
    "a name with a line's end": (lambda t, x, n: (t, x, ["a\nb", *n[1:]]), "each of them text and not empty"),
    "a name of blanks": (
        lambda text, label, names: (text, label, [" ", *names[1:]]),
        "each of them text and not empty",
    ),
    "half a character": (lambda text, label, names: (text, label, ["\ud800", *names[1:]]), "each of them text"),
}


@pytest.mark.parametrize("kind", BAD_FEATURES)
@pytest.mark.parametrize("write", [as_feature_file, as_pickles])
def test_features_that_cannot_be_trained_on(tmp_path, write, kind):
    write(tmp_path, *columns())  # whole, they are read
    change, words = BAD_FEATURES[kind]
    with pytest.raises(InputError, match=words):
        write(tmp_path, *change(*columns()))


@pytest.mark.parametrize(
    "wrong", [None, 3, {"a": 1}, "sad", [["sad"], "glad", "mad"], [None, "glad", "mad"], [1, 2, 3]]
)
@pytest.mark.parametrize("field", ["label_names", "speaker_names", "conversation_names", "utterance_names"])
def test_names_of_every_wrong_shape(tmp_path, wrong, field):
    write_features(tmp_path / "f", example())
    spoil(tmp_path / "f", names={field: wrong})
    with pytest.raises(InputError, match=f"field '{field}' must be a list of names"):
        read_features(tmp_path / "f")


@pytest.mark.parametrize("field", ["label_names", "speaker_names", "conversation_names", "utterance_names"])
def test_a_name_twice(tmp_path, field):
    write_features(tmp_path / "f", example())
    names = getattr(example(), field)
    spoil(tmp_path / "f", names={field: [*names[:-1], names[0]]})
    with pytest.raises(InputError, match=f"field '{field}' holds the name '{names[0]}' twice"):
        read_features(tmp_path / "f")


def test_more_classes_than_a_figure_shows(tmp_path):
    for count in (MOST_CLASSES + 1, 5_000):
        with pytest.raises(InputError, match=f"2 to {MOST_CLASSES} classes, got {count:}"):
            as_feature_file(tmp_path, *columns()[:2], [f"class {i}" for i in range(count)])
    assert len(as_feature_file(tmp_path, *columns()[:2], [f"c {i}" for i in range(MOST_CLASSES)]).label_names) == 100


def test_names_that_are_formulas_do_not_break_a_figure(tmp_path):
    (tmp_path / "mine").mkdir()
    names = ["$x", "$\\frac{", "_^{}%&#"]
    as_feature_file(tmp_path / "mine", *columns()[:2], names)
    options = ["iemocap", "--features", tmp_path / "mine" / "f.safetensors", "--out", tmp_path / "run", *SHORT]
    assert magtkd.main([str(x) for x in [*options, "--ablation"]]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["per_class"].keys() == set(names)


def test_a_conversation_twice_in_the_pickles(tmp_path):
    as_pickles(tmp_path, *columns())
    path = tmp_path / "first_stage_train_features.pkl"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(content | {"vids": ["c0", "c1", "c0"]}))
    with pytest.raises(InputError, match="'train c0' twice"):
        read_pickles(tmp_path)


def bombs():
    """Small pickles that stand for very much: (name, bytes)."""
    deep = [0.0] * 10
    for _ in range(28):
        deep = [deep] * 10
    yield "a list of lists", pickle.dumps(deep)
    yield "the same as tuples", pickle.dumps(tuple([deep] * 10))
    yield "an index of four bytes", b"\x80\x04]r\xff\xff\xff\x7f."
    yield "an index in digits", b"]p999999999999999999999\n."
    yield "a length of a frame", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f]."
    yield "a length of a text", b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\x00\x00x."
    yield "a shape", pickle.dumps(np.zeros(2)).replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85")
    yield "a list in itself", b"]q\x00h\x00a."
    yield "ten thousand lists deep", b"]" * 10_000 + b"a" * 9_999 + b"."


def test_pickles_that_stand_for_gigabytes(tmp_path):
    """Each is refused, or read as what it is, within a second and 100 MB; in the authors' layout it is refused."""
    for name, content in bombs():
        (tmp_path / "x.pkl").write_bytes(content)
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_pickle(tmp_path / "x.pkl")
        except InputError:
            pass
        assert time.perf_counter() - start < 2, name  # a second, on a machine that is not idle
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, name
    as_pickles(tmp_path, *columns())
    deep = pickle.loads(next(bombs())[1])
    for field, value in (("text", {"c2": deep}), ("text", deep), ("vids", deep), ("labels", {"c2": deep}), ("x", deep)):
        path = tmp_path / "first_stage_dev_features.pkl"
        whole = path.read_bytes()
        path.write_bytes(pickle.dumps(pickle.loads(whole) | {field: value}))
        start = time.perf_counter()
        if field == "x":
            read_pickles(tmp_path)  # nobody looks at it
        else:
            with pytest.raises(InputError, match="first_stage_dev"):
                read_pickles(tmp_path)
        assert time.perf_counter() - start < 2, field
        path.write_bytes(whole)


# Text files

SAME = {  # what editors do to a file without changing what it says
    "a mark at the start": lambda text: "\ufeff" + text,
    "Windows' ends of lines": lambda text: text.replace("\n", "\r\n"),
    "old Macs' ends of lines": lambda text: text.replace("\n", "\r"),
    "both": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    "no end of the last line": lambda text: text.rstrip("\n"),
    "blank lines at the end": lambda text: text + "\n\n",
}


def rewrite(path, change, encoding="utf-8"):
    with open(path, encoding="utf-8", newline="") as f:
        text = f.read().replace("\r\n", "\n")
    path.write_bytes(change(text).encode(encoding))


def readable(corpus):
    return [(u.id, u.speaker, u.text, u.label) for u in corpus.utterances()]


@pytest.mark.parametrize("kind", SAME)
def test_what_editors_do_to_a_corpus(small, small_meld, copy_of, kind):
    for root, read in ((small, read_iemocap), (small_meld, read_meld)):
        mine, before = copy_of(root), readable(read(root))
        for path in [*mine.rglob("Ses*.txt"), *mine.rglob("*.csv")]:
            rewrite(path, SAME[kind])
        assert readable(read(mine)) == before
        shutil.rmtree(mine)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c"])
def test_marks_inside_the_words_end_no_line(small, small_meld, copy_of, mark):
    for root, read, last in ((small, read_iemocap, "]: "), (small_meld, read_meld, ",")):
        mine, before = copy_of(root), [x[0] for x in readable(read(root))]
        for path in [*mine.rglob("transcriptions/Ses*.txt"), *mine.rglob("*.csv")]:
            rewrite(
                path,
                lambda text, last=last: text.replace(f"{last}Oh", f"{last}Oh{mark}dear").replace(
                    " I am", f"{mark}I am"
                ),
            )
        assert [x[0] for x in readable(read(mine))] == before
        shutil.rmtree(mine)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_bytes_that_are_no_text_are_named(small, small_meld, copy_of, encoding):
    for root, read in ((small, read_iemocap), (small_meld, read_meld)):
        mine = copy_of(root)
        path = sorted([*mine.rglob("EmoEvaluation/Ses01*.txt"), *mine.rglob("dev*.csv")])[0]
        rewrite(path, lambda text: text, encoding)
        with pytest.raises(InputError, match=f"{path.name}.*save it as UTF-8"):
            read(mine)
        shutil.rmtree(mine)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_cases_of_tables(tmp_path, separator):
    path = tmp_path / "talk.csv"
    rows = [["Speaker", " TEXT "], ["Ann", '"Well, no; yes"'], ["Bob", '"a ""b"""'], ["Eve", ""]]
    path.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8-sig")
    found = [(u.speaker, u.text) for u in read_conversation(path).utterances]
    assert found == [("Ann", "Well, no; yes"), ("Bob", 'a "b"'), ("Eve", "")]


@pytest.mark.parametrize(
    "text, words",
    [
        ('speaker,text\nAnn,"no\nBob,yes\n', ":3: torn row .*quote"),
        ("speaker,text\nAnn,no,yes\n", ":2: torn row, more fields"),
        ("speaker,text\nAnn\n", ":2: torn row, fewer fields"),
        ("speaker,text,text\nAnn,a,b\n", "two columns are called text"),
        ("speaker|text\nAnn|a\n", "column speaker and text missing"),
        ("Ann,no\n", "column speaker and text missing .it has Ann, no"),
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("speaker,text\n", "no utterance in it"),
        ("speaker,text\n,no\n", ":2: no speaker"),
        ("speaker,text,start\nAnn,no,1e400\n", ":2: start must be a number"),
        ("speaker,text,start,end\nAnn,no,5,1\n", ":2: ends at 1.0 s, before it starts"),
        ("speaker,text\nAnn,a\0b\n", "bytes of 0"),
        ("speaker,text\nAnn," + "x" * 200_000 + "\n", ":2: torn row .*field larger"),
    ],
)
def test_tables_that_are_named(tmp_path, text, words):
    (tmp_path / "talk.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_conversation(tmp_path / "talk.csv")


def test_a_table_names_the_line_of_the_file(tmp_path):
    (tmp_path / "t.csv").write_text('a,b\n1,"two\nlines"\n3,4\n')
    assert [where.rsplit(":")[-1] for where, _ in read_table(tmp_path / "t.csv", ("a", "b"))[1]] == ["3", "4"]


LABELS, WORDS = "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", "Session1/dialog/transcriptions/Ses01F_impro01.txt"


@pytest.mark.parametrize(
    "path, change, words",
    [
        (LABELS, lambda t: t + next(x for x in t.split("\n") if x.startswith("[")) + "\n", "turns labelled twice"),
        (LABELS, lambda t: t.replace("_F001\t", "_X001\t"), "neither F nor M"),
        (LABELS, lambda t: t.replace("[0.6000 -", "[0.6.000 -"), "torn line"),
        (LABELS, lambda t: t.replace("[0.6000 -", "[0,6000 -"), "torn line"),
        (LABELS, lambda t: t.replace("\t", " "), "torn line"),
    ],
)
def test_label_files_that_are_named(small, copy_of, path, change, words):
    root = copy_of(small)
    rewrite(root / path, change)
    with pytest.raises(InputError, match=words):
        read_iemocap(root)


def test_a_turn_twice_in_a_transcript_is_counted(small, copy_of):
    root = copy_of(small)
    rewrite(root / WORDS, lambda text: text + text.split("\n")[0].replace("]: ", "]: other ") + "\n")
    corpus = read_iemocap(root)
    assert "1 turns a second time in a transcript, ignored" in corpus.notes
    assert readable(corpus) == readable(read_iemocap(small))


def test_whole_files_are_what_the_tests_start_from(tmp_path):
    """Else a refusal could have another reason than the one that is tested."""
    (tmp_path / "a").mkdir()
    file, other = as_feature_file(tmp_path, *columns()), as_pickles(tmp_path / "a", *columns())
    assert torch.equal(file.features["text"], other.features["text"]) and Path(tmp_path / "f.safetensors").exists()
    assert load_file(tmp_path / "f.safetensors")["text"].shape == (7, 4)
