"""IEMOCAP and MELD as they lie on a user's disk (section 4.1 of the paper).

`read_iemocap` and `read_meld` turn a user's own copy into a Corpus: conversations of utterances, in the order of
speaking, with paths to sound and picture. Whatever is odd but bearable about the copy is counted in `Corpus.notes`,
which the report shows; what would make the results incomparable is an InputError that says what to do.

Not here: decoding (media.py), prompts (encoders.py), vectors (features.py).
"""

import csv
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "dev", "test")


class InputError(Exception):
    """The user's input cannot be used; the message says what, where, and what to do. Exit code 2."""


@dataclass(frozen=True)
class Utterance:
    id: str  # unique in the corpus
    speaker: str
    text: str
    label: int  # index into Corpus.label_names
    audio: Path | None  # a file of any container; None: missing
    video: Path | None
    start: float | None = None  # the utterance's place in the video file, in seconds; None: all of the file
    end: float | None = None


@dataclass(frozen=True)
class Conversation:
    id: str
    utterances: tuple[Utterance, ...]  # in the order of speaking, at least one


@dataclass(frozen=True)
class Corpus:
    name: str
    label_names: tuple[str, ...]
    splits: dict[str, tuple[Conversation, ...]]  # train, dev, test
    notes: tuple[str, ...]  # what is odd about this copy, for the report

    def utterances(self, split: str) -> list[Utterance]:
        return [u for conversation in self.splits[split] for u in conversation.utterances]


# IEMOCAP

IEMOCAP_LABELS = {"ang": "angry", "exc": "excited", "fru": "frustrated", "hap": "happy", "neu": "neutral", "sad": "sad"}
IEMOCAP_DROPPED = {
    "xxx",
    "sur",
    "fea",
    "dis",
    "oth",
}  # no agreement, or too rare: left out by everyone's 6-class setting
TURN_LINE = re.compile(r"\[(\d+\.\d+) - (\d+\.\d+)\]\t(Ses\w+)\t(\w+)\t\[.*\]")
WORDS_LINE = re.compile(r"(Ses\w+) \[(\d+\.\d+)-(\d+\.\d+)\]:\s*(.*)")


def read_iemocap(root: Path, seed: int = 0) -> Corpus:
    """Reads IEMOCAP_full_release: sessions 1-4 are train and dev (9:1 of the conversations, by `seed`), 5 is test.

    Speakers are named by their order in the conversation ("first", "second"): the ten actors never cross the splits.
    Errors: InputError for no corpus, a session or a label file missing, a torn line, an unknown emotion.
    """
    root = Path(root)
    sessions = [root / f"Session{i}" for i in range(1, 6)]
    if not any(s.is_dir() for s in sessions):
        raise InputError(
            f"no IEMOCAP at {root}: looked for Session1 .. Session5 in it. The corpus is free for research: ask for it "
            "at https://sail.usc.edu/iemocap, unpack it, and give the folder IEMOCAP_full_release with --root. "
            "`bash run.sh demo` needs no corpus."
        )
    if lacking := [s.name for s in sessions if not s.is_dir()]:
        raise InputError(
            f"IEMOCAP at {root} is incomplete: {len(lacking)} of 5 sessions missing ({', '.join(lacking)}). "
            "Sessions 1-4 are train and dev, 5 is test; unpack the missing ones."
        )
    counts: Counter[str] = Counter()
    by_session = [_read_session(session, counts) for session in sessions]
    train = [c for session in by_session[:4] for c in session]
    random.Random(seed).shuffle(train)
    n_dev = max(1, round(len(train) / 10))
    splits = {"train": train[n_dev:], "dev": train[:n_dev], "test": by_session[4]}
    by_id = {split: tuple(sorted(conversations, key=lambda c: c.id)) for split, conversations in splits.items()}
    if empty := [split for split, conversations in by_id.items() if not conversations]:
        raise InputError(f"IEMOCAP at {root} has no utterance with one of the six emotions for {', '.join(empty)}")
    return Corpus("IEMOCAP", tuple(IEMOCAP_LABELS), by_id, _notes(counts, by_id))


def _read_session(session: Path, counts: Counter) -> list[Conversation]:
    labels = _files(session / "dialog/EmoEvaluation", "*.txt")
    words = {p.name: p for p in _files(session / "dialog/transcriptions", "*.txt")}
    if lacking := sorted(words.keys() ^ {p.name for p in labels}):
        raise InputError(
            f"{session / 'dialog'}: {len(lacking)} conversations have a file in only one of EmoEvaluation (labels) and "
            f"transcriptions (words): {_some(lacking)}. Unpack the session again."
        )
    if not labels:
        raise InputError(f"{session / 'dialog/EmoEvaluation'}: no label files (Ses*.txt). Unpack the session again.")
    videos = {p.stem: p for folder in ("DivX", "Divx") for p in _files(session / "dialog/avi" / folder, "*.avi")}
    conversations = [_read_dialogue(session, p, words[p.name], videos.get(p.stem), counts) for p in labels]
    return [c for c in conversations if c.utterances]


def _read_dialogue(session: Path, labels: Path, words: Path, video: Path | None, counts: Counter) -> Conversation:
    text = {m[1]: m[4].strip() for line in _lines(words) if (m := WORDS_LINE.match(line))}
    labelled, turns = set(), []
    for number, line in enumerate(_lines(labels), 1):
        if not line.startswith("["):
            continue  # the header and the annotators' own lines
        if not (m := TURN_LINE.fullmatch(line.rstrip())):
            raise InputError(f"{labels}:{number}: torn line {line[:60]!r}; unpack this file again")
        start, end, turn, emotion = float(m[1]), float(m[2]), m[3], m[4]
        labelled.add(turn)
        if emotion in IEMOCAP_DROPPED:
            counts["turns labelled xxx, sur, fea, dis or oth, dropped"] += 1
        elif emotion not in IEMOCAP_LABELS:
            known = ", ".join(sorted(IEMOCAP_LABELS.keys() | IEMOCAP_DROPPED))
            raise InputError(f"{labels}:{number}: unknown emotion {emotion!r}; IEMOCAP has {known}")
        elif not text.get(turn):
            counts["labelled turns without words in the transcript, dropped"] += 1
        else:
            turns.append((start, end, turn, list(IEMOCAP_LABELS).index(emotion)))
    unlabelled = {turn for turn in text.keys() - labelled if "XX" not in turn}  # XX: noises between turns
    counts["transcribed turns without a label, dropped"] += len(unlabelled)

    turns.sort()  # the file may be grouped by name
    order = list(
        dict.fromkeys(turn[-4] for _, _, turn, _ in turns)
    )  # "F" or "M"; the session's letter is not the speaker
    utterances = []
    for start, end, turn, label in turns:
        audio = session / "sentences/wav" / labels.stem / f"{turn}.wav"
        counts["utterances without a sound file"] += not audio.is_file()
        counts["utterances without a video file"] += video is None
        speaker = ("first", "second")[order.index(turn[-4])]
        utterances.append(
            Utterance(turn, speaker, text[turn], label, audio if audio.is_file() else None, video, start, end)
        )
    return Conversation(labels.stem, tuple(utterances))


# MELD

MELD_LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
MELD_CLIPS = {
    "train": ("train_splits",),
    "dev": ("dev_splits_complete",),
    "test": ("output_repeated_splits_test",),
}
MELD_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
# Some copies hold control characters where Windows punctuation was meant: 0x92 is an apostrophe in cp1252.
PUNCTUATION = {code: bytes([code]).decode("cp1252") for code in (0x85, *range(0x91, 0x98))}


def read_meld(root: Path) -> Corpus:
    """Reads MELD.Raw, its csv and clips in `root` itself or in its folders train/, dev/ and test/.

    Conversations are "train_dia0" and so on (ids restart in each split), speakers bear their names.
    Errors: InputError for no corpus, a csv missing, a torn row, an unknown emotion, two rows of one id.
    """
    root = Path(root)
    tables = {split: _find(root, split, f"{split}_sent_emo.csv") for split in SPLITS}
    if lacking := [f"{split}_sent_emo.csv" for split, path in tables.items() if path is None]:
        packed = " There is a .tar.gz in it: unpack it, and those inside it, first." if _packed(root) else ""
        raise InputError(
            f"no complete MELD at {root}: looked there and in its folders train/, dev/ and test/ for "
            f"{', '.join(lacking)}.{packed} Get MELD.Raw.tar.gz (10.9 GB) by the links of "
            "https://github.com/declare-lab/MELD, unpack it and the three archives inside, and give the folder with "
            "--root. `bash run.sh demo` needs no corpus."
        )
    counts: Counter[str] = Counter()
    splits = {split: tuple(_read_split(root, split, tables[split], counts)) for split in SPLITS}
    return Corpus("MELD", MELD_LABELS, splits, _notes(counts, splits))


def _read_split(root: Path, split: str, table: Path, counts: Counter) -> list[Conversation]:
    folder = _find(root, split, *MELD_CLIPS[split])
    clips = {} if folder is None else {p.stem: p for p in _files(folder, "dia*.mp4")}
    if folder is not None:  # corrected cuts of the test clips
        corrected = {p.stem.removeprefix("final_videos_test"): p for p in _files(folder, "final_videos_testdia*.mp4")}
        clips |= corrected
    else:
        counts[f"folders of clips missing ({split}: {MELD_CLIPS[split][0]})"] += 1
    dialogues: dict[int, dict[int, Utterance]] = {}
    text = table.read_bytes()
    try:
        lines = text.decode("utf-8-sig")
    except UnicodeDecodeError:
        lines = text.decode("cp1252")
    reader = csv.DictReader(lines.splitlines(keepends=True))
    if lacking := [c for c in MELD_COLUMNS if c not in (reader.fieldnames or ())]:
        raise InputError(f"{table}: not MELD's table, the columns {', '.join(lacking)} are missing")
    for row in reader:
        where = f"{table}:{reader.line_num}"
        if None in row or None in row.values() or not (row["Dialogue_ID"] + row["Utterance_ID"]).isdigit():
            raise InputError(f"{where}: torn row {','.join(str(v) for v in row.values())[:60]!r}; download it again")
        if row["Emotion"] not in MELD_LABELS:
            raise InputError(f"{where}: unknown emotion {row['Emotion']!r}; MELD has {', '.join(MELD_LABELS)}")
        dialogue, number = int(row["Dialogue_ID"]), int(row["Utterance_ID"])
        name = f"dia{dialogue}_utt{number}"
        clip = clips.pop(name, None)
        counts["utterances without a clip"] += clip is None
        words = " ".join(row["Utterance"].translate(PUNCTUATION).split())
        label = MELD_LABELS.index(row["Emotion"])
        speaker = row["Speaker"].translate(PUNCTUATION).strip()
        utterance = Utterance(f"{split}_{name}", speaker, words, label, clip, clip)
        if number in dialogues.setdefault(dialogue, {}):
            raise InputError(f"{where}: a second row for Dialogue_ID {dialogue}, Utterance_ID {number}")
        dialogues[dialogue][number] = utterance
    if not dialogues:
        raise InputError(f"{table}: no rows; download it again")
    counts["clips without a row in the csv, ignored"] += len(clips)
    ordered = ((k, [v[i] for i in sorted(v)]) for k, v in sorted(dialogues.items()))  # ids have gaps: never range(n)
    return [Conversation(f"{split}_dia{k}", tuple(utterances)) for k, utterances in ordered]


def _find(root: Path, split: str, *names: str) -> Path | None:
    """The first of `names` that exists in root or below root/split."""
    for folder in (root, root / split, root / split / split):
        for name in names:
            if (folder / name).exists():
                return folder / name
    return None


def _packed(root: Path) -> bool:
    return root.is_dir() and any(root.glob("*.tar.gz"))


def _files(folder: Path, pattern: str) -> list[Path]:
    """Sorted files of a folder, none if it is missing; without the `._name` stubs that Macs leave beside each file."""
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith(".") and p.is_file())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _notes(counts: Counter, splits: dict[str, tuple[Conversation, ...]]) -> tuple[str, ...]:
    sizes = "/".join(str(len(splits[s])) for s in SPLITS)
    utterances = "/".join(str(sum(len(c.utterances) for c in splits[s])) for s in SPLITS)
    head = f"{sizes} conversations and {utterances} utterances (train/dev/test)"
    return (head, *(f"{n} {what}" for what, n in sorted(counts.items()) if n))
