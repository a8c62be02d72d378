"""--check: is it the corpus of the paper? And what a run says of the machine before hours are spent on it."""

import dataclasses
import shutil

import pytest
import torch

import magtkd
from data import Conversation, Corpus, InputError, Utterance
from extras import check, cli, machine
from magtkd import CONFIGS

WORDS = dataclasses.replace(CONFIGS["meld"], modalities=("text",))


def corpus(name="MELD", train=(1038, 9989), dev=(114, 1109), test=(280, 2610), audio="u.mp4", video="u.mp4", end=3.0):
    """Of so many conversations and utterances per split, none of which is on disk."""

    def split(name: str, conversations: int, utterances: int) -> list[Conversation]:
        sizes = [1] * (conversations - 1) + [utterances - conversations + 1]
        return [
            Conversation(
                f"{name}{i}", tuple(Utterance(f"{name}{i}_{k}", "a", "b", 0, audio, video, 0.0, end) for k in range(n))
            )
            for i, n in enumerate(sizes)
        ]

    parts = {"train": split("train", *train), "dev": split("dev", *dev), "test": split("test", *test)}
    return Corpus(name, ["happy", "sad"], parts, ["made in a test", "a note"])


def test_the_papers_meld(tmp_path, capsys):
    check.check(corpus(), tmp_path, CONFIGS["meld"], tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("1,038/114/280") == 2 and said.count("9,989/1,109/2,610") == 2
    assert "This is the corpus of the paper." in said and "a note" in said
    assert "sound: about 41,124 s (by the times in the labels)" in said  # 13,708 x 3 s
    # int16 at 16 kHz, and 8 frames of 3 x 224 x 224 bytes
    assert f"disk for decoded media: {13_708 * (3 * 32_000 + 8 * 3 * 224**2) / 1e9:.1f} GB" in said
    assert "training, text: 24,980 steps of 4 utterances" in said  # 10 epochs of ceil(9,989 / 4)
    assert list(tmp_path.iterdir()) == []


def test_the_papers_iemocap(tmp_path, capsys):
    """Train and dev count together; 53 turns may be missing, and no more."""
    given = {"name": "IEMOCAP", "train": (108, 5163), "dev": (12, 647)}
    check.check(corpus(**given, test=(31, 1623)), tmp_path, CONFIGS["iemocap"], tmp_path / "run")
    check.check(corpus(**given, test=(31, 1570)), tmp_path, CONFIGS["iemocap"], tmp_path / "run")
    assert capsys.readouterr().out.count("This is the corpus of the paper.") == 2
    for test in (1569, 1624):
        with pytest.raises(InputError, match="other utterances than the paper's"):
            check.check(corpus(**given, test=(31, test)), tmp_path, CONFIGS["iemocap"], tmp_path / "run")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train": (1037, 9989)}, "other conversations"),
        ({"dev": (114, 1108)}, "other utterances"),
        ({"audio": None}, "13,708 of 13,708 utterances without sound"),
        ({"video": None}, "13,708 of 13,708 utterances without film"),
    ],
)
def test_what_is_not_the_papers(changes, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        check.check(corpus(**changes), tmp_path, CONFIGS["meld"], tmp_path / "run")
    assert "Unpack what is missing" in str(error.value) and "--modalities text" in str(error.value)


def test_words_alone_need_no_clips(tmp_path, capsys):
    check.check(corpus(audio=None, video=None), tmp_path, WORDS, tmp_path / "run")
    said = capsys.readouterr().out
    assert "This is the corpus of the paper." in said and "disk" not in said and "training, audio" not in said


# The command


@pytest.mark.parametrize("clips", [True, False])
def test_the_command_decodes_nothing_and_makes_nothing(meld, tmp_path, monkeypatch, capsys, clips):
    root = meld if clips else shutil.copytree(meld, tmp_path / "meld", ignore=shutil.ignore_patterns("*.mp4"))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("encoders.decode", None)
    monkeypatch.setattr("magtkd.train", None)
    options = ["meld", "--root", str(root), "--check", "--out", str(tmp_path / "run")]
    assert magtkd.main(options) == 2  # eleven conversations are not the paper's
    said = capsys.readouterr()
    assert "1,038/114/280" in said.out and "other conversations" in said.err and said.err.count("\n") == 1
    assert ("utterances without sound" in said.err) == (not clips) and "--modalities text" in said.err
    assert sorted(tmp_path.rglob("*")) == before
    if not clips:
        assert "without a clip" in said.out


def test_the_command_on_the_papers_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.READERS, "meld", lambda root: corpus(audio=None, video=None))
    options = ["meld", "--root", str(tmp_path), "--check", "--out", str(tmp_path / "run")]
    assert magtkd.main([*options, "--modalities", "text"]) == 0
    assert magtkd.main(options) == 2
    assert "13,708 of 13,708 utterances without sound" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["demo"], ["meld", "--features", "x.safetensors"]])
def test_check_is_for_corpora_on_disk(options, capsys):
    with pytest.raises(SystemExit) as end:
        magtkd.main([*options, "--check"])
    assert end.value.code == 2 and "--check reads a corpus" in capsys.readouterr().err


# What a run says of the machine


@pytest.mark.parametrize("options, warned", [([], True), (["--device", "cpu"], False), (["--encoders", "tiny"], False)])
def test_days_on_a_cpu_are_said_before_them(meld, tmp_path, monkeypatch, capsys, options, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "driver_version", lambda: "470.82.01")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def stop(*_, **__):
        raise InputError("stopped here")

    monkeypatch.setattr(cli, "run_both", stop)
    base = ["meld", "--root", str(meld), "--out", str(tmp_path / "run"), "--modalities", "text"]
    assert magtkd.main([*base, *options]) == 2
    said = capsys.readouterr().err
    assert ("full-size encoders on a CPU: 1 x " in said) == warned, said
    assert ("driver 470.82.01" in said) == ("--device" not in options), said
