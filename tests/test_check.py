"""--check: is it the corpus of the paper, and what does a run need?"""

from contextlib import nullcontext

import pytest

import magtkd
from data import SPLITS, Conversation, Corpus, InputError, Utterance
from extras import check
from magtkd import CONFIGS

SIZES = {"MELD": [(1038, 9989), (114, 1109), (280, 2610)], "IEMOCAP": [(108, 5163), (12, 647), (31, 1570)]}


@pytest.mark.parametrize(
    "name, more, video, words",
    [
        ("MELD", 0, "u.mp4", ""),
        ("IEMOCAP", 0, "u.mp4", ""),  # 53 turns may be missing, and no more
        ("IEMOCAP", -1, None, "other conversations or utterances"),
    ],
)
def test_is_it_the_corpus_of_the_paper(name, more, video, words, tmp_path, capsys):
    u, splits = Utterance("u", "a", "b", 0, "u.wav", video, 0.0, 3.0), {}
    for split, (conversations, utterances) in zip(SPLITS, SIZES[name]):  # one conversation has nearly all utterances
        long = Conversation("long", (u,) * (utterances + more * (split == "test") - conversations + 1))
        splits[split] = (long, *[Conversation("short", (u,))] * (conversations - 1))
    arguments = Corpus(name, ("happy", "sad"), splits, ("a note",)), tmp_path, CONFIGS[name.lower()], tmp_path / "run"
    with pytest.raises(InputError, match=f"not the corpus of the paper: .*{words}") if words else nullcontext():
        check.check(*arguments, "cpu")
    said = capsys.readouterr().out
    assert said.endswith("This is the corpus of the paper.\n") != bool(words) and not list(tmp_path.iterdir())
    if name == "MELD":  # 10 epochs of 6 FLOPs per weight and position on train and 2 on dev, then 2 on all
        flops = 2 * 150 * 90e6 * (10 * (6 * 9989 + 2 * 1109) + 2 * 13_708)  # A and A_KD
        assert f"audio: {150 * 13_708:,} positions, 49,960 steps, {flops / 1e15:.1f} PFLOP" in said
        assert f"disk for decoded media: {13_708 * (3 * 32_000 + 8 * 3 * 224**2) / 1e9:.1f} GB" in said


@pytest.mark.parametrize("options, code", [([], 2), (["--modalities", "text"], 0)])
def test_a_csv_without_clips(options, code, tmp_path, capsys):
    """It has the name of a paper's corpus, and is not compared with it. Nothing is written."""
    path, rows = tmp_path / "MELD.csv", [f"{split},{split},A,Well,{x},gone.mp4\n" for split in SPLITS for x in "ab"]
    path.write_text("split,conversation,speaker,text,label,video\n" + "".join(rows))
    assert magtkd.main(["csv", "--root", str(path), "--check", "--out", str(tmp_path / "run"), *options]) == code
    said = capsys.readouterr()
    assert "2/2/2 utterances" in said.out and "labels: a 3, b 3" in said.out and "files not found" in said.out
    assert "expected" not in said.out and said.out.endswith("This csv can be trained on.\n") == (code == 0)
    assert ("is not complete: " in said.err) == (code == 2) and list(tmp_path.iterdir()) == [path]
