"""`--check`: is this the corpus of the paper, and what will a run need? Reads labels and file names; decodes nothing.

Not here: reading the corpora (data.py), decoding (encoders.py).
"""

import os
import shutil
from pathlib import Path

from data import SPLITS, Corpus, InputError
from encoders import MAX_SECONDS, MediaStore, video_shape
from fusion import TEXT
from magtkd import Config

# Conversations and utterances of train/dev/test. IEMOCAP's dev is drawn from sessions 1-4, so its utterances count
# together with train's. A strict reading of IEMOCAP leaves out 53 turns that other people's lists call happy.
EXPECTED = {
    "IEMOCAP": {"conversations": (108, 12, 31), "utterances": (5810, 1623), "may be missing": 53, "no file": 0},
    "MELD": {"conversations": (1038, 114, 280), "utterances": (9989, 1109, 2610), "may be missing": 0, "no file": 1},
}
FRAMES = (8, 224)  # number and pixels of the published TimeSformer's, where the checkpoint is no folder here
DECODING = 0.016  # seconds of one core per utterance: 5,040 made-up utterances in 41 s of two cores (pytest -m slow)
NAMES = {"audio": "sound", "video": "film"}


def check(corpus: Corpus, root: Path, config: Config, out: Path) -> None:
    """Prints what was found against what is expected. Errors: InputError that says what is not the paper's corpus."""
    expected, wrong, everyone = EXPECTED[corpus.name], [], corpus.utterances()
    conversations = [len(corpus.splits[split]) for split in SPLITS]
    utterances = [len(corpus.utterances(split)) for split in SPLITS]
    if corpus.name == "IEMOCAP":
        utterances = [utterances[0] + utterances[1], utterances[2]]
    print(f"{corpus.name} at {root}\n  {'':34}{'found':>18}{'expected':>18}")
    for what, found in (("conversations", conversations), ("utterances", utterances)):
        splits = "train/dev/test" if len(found) == 3 else "train and dev/test"
        print(f"  {f'{what}, {splits}':34}{slashes(found):>18}{slashes(expected[what]):>18}")
    fewer = [e - n for n, e in zip(utterances, expected["utterances"])]
    if tuple(conversations) != expected["conversations"]:
        wrong.append("other conversations than the paper's")
    if any(n < 0 for n in fewer) or sum(fewer) > expected["may be missing"]:
        wrong.append("other utterances than the paper's")

    wanted = [m for m in config.modalities if m != TEXT]
    for m in wanted:
        missing = sum(getattr(u, m) is None for u in everyone)
        print(f"  {f'utterances without {NAMES[m]}':34}{missing:>18,}{expected['no file']:>18,}")
        if missing > expected["no file"]:
            wrong.append(f"{missing:,} of {len(everyone):,} utterances without {NAMES[m]}")
    for note in corpus.notes[1:]:
        print(f"  - {note}")
    if wanted:
        print_needs(corpus, config, out / "media", wanted)
    for m in config.modalities:
        steps = config.stage1_epochs[m] * -(-len(corpus.utterances("train")) // config.stage1_batch)
        print(f"  training, {m}: {steps:,} steps of {config.stage1_batch} utterances")
    print("  How long a step takes depends on the machine: the first epoch's line in log.jsonl tells.")
    if wrong:
        raise InputError(
            f"{corpus.name} at {root} is not the corpus of the paper: {'; '.join(wrong)}. Unpack what is missing, or "
            "train on what is there with --modalities (say --modalities text)"
        )
    print("This is the corpus of the paper.")


def print_needs(corpus: Corpus, config: Config, folder: Path, wanted: list[str]) -> None:
    """Seconds of sound, disk, and time of the decoding."""
    everyone, frames = corpus.utterances(), FRAMES
    if "video" in wanted and Path(config.video_model).is_dir():  # the hub is not asked: that may take a minute
        frames = video_shape(config.video_model)
    store = MediaStore(folder, (), *frames)
    need = sum(store.bytes_for(u, m) for u in everyone for m in wanted)
    free = shutil.disk_usage(next(p for p in Path(os.path.realpath(folder)).parents if p.exists())).free
    print(f"  disk for decoded media: {need / 1e9:.1f} GB in {folder}; {free / 1e9:.1f} GB are free")
    if "audio" in wanted:
        seconds = sum(4.0 if u.end is None else min(u.end - u.start, MAX_SECONDS) for u in everyone)
        timed = all(u.end is not None for u in everyone)
        print(f"  sound: about {seconds:,.0f} s ({'by the times in the labels' if timed else 'at 4 s an utterance'})")
    minutes = len(everyone) * DECODING / 60
    print(f"  decoding: about {minutes:.0f} minutes of one core, if real files take as long as made-up ones")


def slashes(numbers) -> str:
    return "/".join(f"{n:,}" for n in numbers)
