"""`--check`: is this the corpus of the paper, and what will a run need? Reads labels and names of files, decodes nothing.

Not here: reading the corpora (data.py), decoding (encoders.py).
"""

import shutil
from pathlib import Path

from data import SPLITS, Corpus, InputError
from encoders import MAX_SECONDS, RATE, MediaStore, video_shape
from fusion import TEXT
from magtkd import Config

# Conversations and utterances of train/dev/test. IEMOCAP's dev is drawn from sessions 1-4, so its utterances count
# together with train's. A strict reading of IEMOCAP leaves out 53 turns that other people's lists call happy.
EXPECTED = {
    "IEMOCAP": {"conversations": (108, 12, 31), "utterances": (5_810, 1_623), "may be missing": 53, "no file": 0},
    "MELD": {
        "conversations": (1_038, 114, 280),
        "utterances": (9_989, 1_109, 2_610),
        "may be missing": 0,
        "no file": 1,
    },
}
FRAME_SIZE = (8, 224)  # of the published TimeSformer, if its checkpoint cannot be asked
DECODING = 0.016  # seconds of one core per utterance: 5,040 made-up utterances in 41 s of two cores (pytest -m slow)


def check(corpus: Corpus, root: Path, config: Config, out: Path) -> None:
    """Prints what was found against what is expected. Errors: InputError that says what is not the paper's corpus."""
    expected, wrong = EXPECTED[corpus.name], []
    found = [len(corpus.splits[split]) for split in SPLITS], [len(corpus.utterances(split)) for split in SPLITS]
    conversations, utterances = found
    if corpus.name == "IEMOCAP":
        utterances = [utterances[0] + utterances[1], utterances[2]]
    print(f"{corpus.name} at {root}")
    print(f"  {'':28}{'found':>20}{'expected':>20}")
    rows = [("conversations", conversations), ("utterances", utterances)]
    for what, numbers in rows:
        splits = "train/dev/test" if len(numbers) == 3 else "train+dev/test"
        print(f"  {what + ', ' + splits:28}{slashes(numbers):>20}{slashes(expected[what]):>20}")
    if tuple(conversations) != expected["conversations"]:
        wrong.append("other conversations than the paper's")
    short = [e - n for n, e in zip(utterances, expected["utterances"])]
    if any(n < 0 for n in short) or sum(short) > expected["may be missing"]:
        wrong.append("other utterances than the paper's")

    everyone = corpus.utterances()
    wanted = [m for m in config.modalities if m != TEXT]
    for m in wanted:
        missing = sum(getattr(u, m) is None for u in everyone)
        name = {"audio": "without a sound file", "video": "without a film"}[m]
        print(f"  {name:28}{missing:>20,}{expected['no file']:>20,}")
        if missing > expected["no file"]:
            what = f"{missing:,} of {len(everyone):,} utterances have no {name.split()[-1]}"
            wrong.append(f"no {m} at all" if missing == len(everyone) else what)
    for note in corpus.notes[1:]:
        print(f"  - {note}")

    if wanted:
        store = (
            MediaStore(out / "media", (), *frame_shape(config)) if "video" in wanted else MediaStore(out / "media", ())
        )
        need = sum(store.bytes_for(u, m) for u in everyone for m in wanted)
        free = shutil.disk_usage(next(p for p in (out, *out.resolve().parents) if p.exists())).free
        timed = all(u.end is not None for u in everyone)
        seconds = sum(min(u.end - u.start, MAX_SECONDS) if u.end is not None else 4.0 for u in everyone)
        how = "from the labels' times" if timed else "4 s an utterance; the files tell when they are decoded"
        print(f"  sound: about {seconds / 3600:.1f} hours at {RATE:,} Hz ({how})")
        print(f"  disk for decoded media: {need / 1e9:.1f} GB in {out / 'media'}; {free / 1e9:.1f} GB are free")
        print(
            f"  decoding: about {len(everyone) * DECODING / 60:.0f} minutes of one core, if real files take as made-up ones"
        )
    for m in config.modalities:
        steps = config.stage1_epochs[m] * -(-len(corpus.utterances("train")) // config.stage1_batch)
        print(f"  training, {m}: {steps:,} steps of {config.stage1_batch} utterances")
    print("  how long a step takes depends on the machine: the first epoch's line in log.jsonl tells")
    if wrong:
        raise InputError(
            f"{corpus.name} at {root} is not the corpus of the paper: {'; '.join(wrong)}. Unpack what is missing, or train "
            "on what is there with --modalities (say --modalities text)"
        )
    print("This is the corpus of the paper.")


def frame_shape(config: Config) -> tuple[int, int]:
    """Frames and pixels that the video checkpoint takes; the published ones where there is no checkpoint at hand."""
    try:
        return video_shape(config.video_model)
    except InputError:
        return FRAME_SIZE


def slashes(numbers) -> str:
    return "/".join(f"{n:,}" for n in numbers)
