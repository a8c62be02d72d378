"""Data: corpora on disk, the feature file, conversations as rows, scores, and files that are written atomically.

`read_iemocap`, `read_meld` and `read_csv` return a Corpus: conversations of utterances in the order of speaking, with
the paths of their audio and video (section 4.1 of the paper). Recoverable irregularities are counted in `Corpus.notes`,
which the report shows; what would make results incomparable is an InputError.

`FeatureFile` is the interface between the two stages: one feature (a vector) per utterance and feature kind, from an
encoder of stage 1 or from another program. `Conversations` hands it out in batches, as rows without padding.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import secrets
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

SPLITS = ("train", "dev", "test")
MODALITIES = ("text", "audio", "video")
KINDS = ("text", "audio", "video", "audio_kd", "video_kd")  # of features; _kd: from an encoder distilled from text
MOST_CLASSES = 100  # a confusion matrix of more cannot be read


class InputError(Exception):
    """The user's input cannot be used. The message says what, where, and what to do. Exit code 2."""


class MediaError(Exception):
    """One media file cannot be decoded. The message says why; the run continues without it."""


def scores(labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Accuracy, weighted and macro F1 in percent. A class that is neither a label nor predicted is left out."""
    found = {"accuracy": 100 * accuracy_score(labels, predictions)}
    for average in ("weighted", "macro"):
        found[f"{average}_f1"] = 100 * f1_score(labels, predictions, average=average, zero_division=0)
    return found


def digest(*parts: Any) -> str:
    """16 hex digits of SHA-256 over strings, bytes, tensors (dtype, shape, content) and whatever JSON can represent."""

    def hashed(part: Tensor | bytes) -> list:
        if isinstance(part, bytes):
            return ["bytes", hashlib.sha256(part).hexdigest()]
        content = part.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        return [str(part.dtype), list(part.shape), hashlib.sha256(content).hexdigest()]

    text = json.dumps(parts, sort_keys=True, default=hashed)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Writing and reading files

TEMPORARY = ".magtkd-"  # the names of all temporary files and folders begin with it


def check_target(path: Path) -> None:
    """Call it before long work: `path` must be a regular file, or a new name in a folder. Errors: InputError."""
    if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
        raise InputError(f"{path}: is a folder, a link, a pipe or a device, not a regular file; give another name")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it first")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Atomic write: `write(temporary path in the same folder)`, then rename. The temporary name ends with path's name.

    `write` should do nothing but write: its errors are taken for a full disk or missing rights. Errors: InputError, for
    these and for what `check_target` refuses; the old file is then unchanged.
    """
    path = Path(path)
    check_target(path)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        write(temporary)
        os.chmod(temporary, path.parent.stat().st_mode & 0o666)  # safetensors' own is 0600
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or f"{str(e).partition(chr(10))[0]}; is the disk full?"
        raise InputError(f"{path}: cannot be written ({reason}). What is complete is kept") from e
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that a killed process left in `folder`. Only for the folder's owner."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_file() and not path.is_symlink():
            path.unlink()


def append_line(path: Path, text: str) -> None:
    """Appends a line to a log in UTF-8. Errors: InputError."""
    check_target(path)
    with open(path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as f:
        f.write(text + "\n")


def read_text(path: Path) -> str:
    """A text file in UTF-8, its line ends as "\\n". Errors: InputError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not in UTF-8; save it as UTF-8 (a spreadsheet: as CSV)") from e


# Characters that break tables, terminals and figures: control characters, line separators, halves of a character.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Some copies of MELD contain control characters instead of Windows' punctuation: 0x92 is an apostrophe in cp1252.
PUNCTUATION = {code: bytes([code]).decode("cp1252") for code in (0x85, *range(0x91, 0x98))}


def _name(cell: str, where: str, column: str) -> str:
    """A name in Unicode's composed form (NFC), so that its two spellings are one name. Errors: InputError."""
    name = unicodedata.normalize("NFC", cell.translate(PUNCTUATION).strip())
    if not name:
        raise InputError(f"{where}: no {column}")
    if UNPRINTABLE.search(name):
        raise InputError(f"{where}: control character in the {column} {name[:60]!r}; remove it")
    return name


@dataclass(frozen=True)
class Utterance:
    id: str  # unique in the corpus
    speaker: str
    text: str
    label: int  # index into Corpus.label_names; -1: none
    audio: Path | None  # a file of any container; None: missing
    video: Path | None
    start: float | None = None  # of the utterance in these files, in seconds; None: from the beginning
    end: float | None = None  # None: to the end
    audio_is_cut: bool = False  # the audio file holds this utterance only, whatever start and end say


@dataclass(frozen=True)
class Conversation:
    id: str
    utterances: tuple[Utterance, ...]  # in the order of speaking, at least one


@dataclass(frozen=True)
class Corpus:
    name: str
    label_names: tuple[str, ...]
    splits: dict[str, tuple[Conversation, ...]]  # train, dev, test
    notes: tuple[str, ...]  # sizes and irregularities of this copy, for the report

    def utterances(self, *splits: str) -> list[Utterance]:
        """Of these splits, or of all."""
        return [u for s in splits or SPLITS for conversation in self.splits[s] for u in conversation.utterances]


DEMO = "`bash run.sh demo` needs no corpus."  # the end of a reader's error

# IEMOCAP

IEMOCAP_LABELS = ("ang", "exc", "fru", "hap", "neu", "sad")
IEMOCAP_DROPPED = ("xxx", "sur", "fea", "dis", "oth")  # no agreement, or too rare: not in the 6-class setting
TURN_LINE = re.compile(r"\[(\d+\.\d+) - (\d+\.\d+)\]\t(Ses\w+_[FM]\w{3})\t(\w+)\t\[.*\]")
TEXT_LINE = re.compile(r"(Ses\w+) \[(\d+\.\d+)-(\d+\.\d+)\]:\s*(.*)")


def read_iemocap(root: Path, seed: int = 0) -> Corpus:
    """Reads IEMOCAP_full_release: sessions 1-4 are train and dev (9:1 of the conversations, by `seed`), 5 is test.

    Speakers are named by their order in the conversation ("first", "second"): the ten actors never cross the splits.
    Errors: InputError.
    """
    root = Path(root)
    sessions = [root / f"Session{i}" for i in range(1, 6)]
    if missing := [s.name for s in sessions if not s.is_dir()]:
        raise InputError(
            f"no complete IEMOCAP at {root}: {', '.join(missing)} missing. It is free for research: ask for it at "
            f"https://sail.usc.edu/iemocap, unpack it, and give its folder IEMOCAP_full_release with --root. {DEMO}"
        )
    counts: Counter[str] = Counter()
    by_session = []
    for session in sessions:
        labels = _files(session / "dialog/EmoEvaluation", "*.txt")
        transcripts = _files(session / "dialog/transcriptions", "*.txt")
        unpaired = sorted({p.name for p in labels} ^ {p.name for p in transcripts})
        if unpaired or not labels:
            what = (
                f"{len(unpaired)} are in only one of them ({', '.join(unpaired[:3])})" if unpaired else "both are empty"
            )
            where = f"{session / 'dialog'}: labels are in EmoEvaluation, text in transcriptions"
            raise InputError(f"{where}; {what}. Unpack the session again")
        conversations = [_read_iemocap(session, *files, counts) for files in zip(labels, transcripts)]
        by_session.append([c for c in conversations if c.utterances])
    train = [c for session in by_session[:4] for c in session]
    random.Random(seed).shuffle(train)
    n_dev = max(1, round(len(train) / 10))
    splits = {"train": train[n_dev:], "dev": train[:n_dev], "test": by_session[4]}
    by_id = {split: tuple(sorted(conversations, key=lambda c: c.id)) for split, conversations in splits.items()}
    return Corpus("IEMOCAP", IEMOCAP_LABELS, by_id, _notes(counts, by_id))


def _read_iemocap(session: Path, labels: Path, transcript: Path, counts: Counter) -> Conversation:
    matches = [m for line in read_text(transcript).split("\n") if (m := TEXT_LINE.match(line))]
    text = {m[1]: m[4].strip() for m in matches}
    labelled, turns = set(), []
    for number, line in enumerate(read_text(labels).split("\n"), 1):
        if not line.startswith("["):
            continue  # the header and the annotators' own lines
        m = TURN_LINE.fullmatch(line.rstrip())
        if not m or m[3] in labelled:
            raise InputError(f"{labels}:{number}: malformed line or turn labelled twice, {line!r}; unpack it again")
        start, end, turn, emotion = m.groups()
        labelled.add(turn)
        if emotion in IEMOCAP_DROPPED:
            counts["turns labelled xxx, sur, fea, dis or oth, dropped"] += 1
        elif emotion not in IEMOCAP_LABELS:
            known = ", ".join((*IEMOCAP_LABELS, *IEMOCAP_DROPPED))
            raise InputError(f"{labels}:{number}: unknown emotion {emotion!r}; IEMOCAP has {known}")
        elif not text.get(turn):
            counts["labelled turns without text in the transcript, dropped"] += 1
        else:
            turns.append((float(start), float(end), turn, IEMOCAP_LABELS.index(emotion)))
    unlabelled = {turn for turn in text.keys() - labelled if "XX" not in turn}  # XX: noises between turns
    counts["transcribed turns without a label, dropped"] += len(unlabelled)

    wavs = {p.stem: p for p in _files(session / "sentences/wav" / labels.stem, "*.wav")}
    video = next(iter(_files(session / "dialog/avi", f"Div[Xx]/{labels.stem}.avi")), None)
    turns.sort()  # the file may be grouped by name
    letters = dict.fromkeys(turn[-4] for _, _, turn, _ in turns)  # "F" or "M"; the session's letter is another
    speakers = dict(zip(letters, ("first", "second")))
    utterances = []
    for start, end, turn, label in turns:
        speaker, audio = speakers[turn[-4]], wavs.get(turn)
        utterances.append(Utterance(turn, speaker, text[turn], label, audio, video, start, end, audio_is_cut=True))
    return Conversation(labels.stem, tuple(utterances))


# MELD

MELD_LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
MELD_CLIPS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}


def read_meld(root: Path) -> Corpus:
    """Reads MELD.Raw, its csv files and clips in `root` itself or in its folders train/, dev/ and test/.

    Conversations are named "train_dia0" and so on (ids restart in each split), speakers by the names in the csv.
    Errors: InputError.
    """
    root = Path(root)
    tables = {split: _find(root, split, f"{split}_sent_emo.csv") for split in SPLITS}
    if missing := [f"{split}_sent_emo.csv" for split, path in tables.items() if path is None]:
        raise InputError(
            f"no complete MELD at {root}: looked there and in train/, dev/ and test/ for {', '.join(missing)}. Get "
            "MELD.Raw.tar.gz (10.9 GB) by the links of https://github.com/declare-lab/MELD, unpack it and the three "
            f"archives inside, and give the folder with --root. {DEMO}"
        )
    counts: Counter[str] = Counter()
    rows = [row for split in SPLITS for row in _meld_rows(root, split, tables[split], counts)]
    return _group("MELD", rows, MELD_LABELS, Path(), counts)


def _meld_rows(root: Path, split: str, table: Path, counts: Counter) -> list[tuple[str, dict[str, str]]]:
    """In the order of speaking, with the columns of `read_csv`."""
    folder = _find(root, split, MELD_CLIPS[split]) or root / MELD_CLIPS[split]  # no folder: no clips
    clips = {p.stem: p for p in _files(folder, "dia*.mp4")}
    # Corrected cuts of the test clips take the place of the wrong ones.
    clips |= {p.stem.removeprefix("final_videos_test"): p for p in _files(folder, "final_videos_testdia*.mp4")}
    rows = []
    for where, row in read_table(table, ("conversation", "id", "speaker", "text", "label"))[0]:
        if not re.fullmatch("[0-9]{1,9} [0-9]{1,9}", f"{row['conversation']} {row['id']}"):
            raise InputError(f"{where}: malformed row {','.join(row.values())[:60]!r}; download it again")
        conversation, number = int(row["conversation"]), int(row["id"])  # both have gaps
        row |= {"split": split, "conversation": f"{split}_dia{conversation}", "id": f"utt{number}"}
        row["text"] = " ".join(row["text"].translate(PUNCTUATION).split())
        row["video"] = str(clips.pop(f"dia{conversation}_utt{number}", ""))
        row["start"] = row["end"] = ""  # in the csv they are times of the episode, not of the clip
        rows.append((conversation, number, where, row))
    counts["clips without a row in the csv, ignored"] += len(clips)
    return [(where, row) for _, _, where, row in sorted(rows, key=lambda row: row[:2])]


def _find(root: Path, split: str, name: str) -> Path | None:
    """`name` in root or below root/split, wherever it exists."""
    folders = (root, root / split, root / split / split)
    return next((path for folder in folders if (path := folder / name).is_file() or path.is_dir()), None)


def _files(folder: Path, pattern: str) -> list[Path]:
    """Sorted files of a folder, none if it is missing; without the `._name` stubs that Macs leave beside each file."""
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith(".") and p.is_file())


def _notes(counts: Counter, splits: dict[str, tuple[Conversation, ...]]) -> tuple[str, ...]:
    utterances = {s: [u for c in splits[s] for u in c.utterances] for s in SPLITS}
    for m in MODALITIES:
        counts[f"utterances without {m}"] = sum(not getattr(u, m) for s in SPLITS for u in utterances[s])
    n_conversations, n_utterances = ("/".join(str(len(x[s])) for s in SPLITS) for x in (splits, utterances))
    sizes = f"{n_conversations} conversations and {n_utterances} utterances (train/dev/test)"
    return (sizes, *(f"{n} {what}" for what, n in sorted(counts.items()) if n))


# Your own csv

FIELDS = ("speaker", "text", "audio", "video", "start", "end")  # of a conversation to predict; two are required
CSV_FIELDS = ("split", "conversation", "speaker", "text", "label")  # required of a corpus
OTHER_NAMES = {"dialogue_id": "conversation", "utterance_id": "id", "utterance": "text", "emotion": "label"}  # MELD's
OTHER_NAMES |= {"starttime": "start", "endtime": "end"}
CSV_SPLITS = {name: name for name in SPLITS} | {"val": "dev", "valid": "dev", "validation": "dev"}
TIME = re.compile(r"(?:(?:([0-9]+):)?([0-9]{1,2}):)?([0-9]+\.?[0-9]*(?:e-?[0-9]+)?)")  # [[hours:]minutes:]seconds


def read_table(path: Path, required: tuple[str, ...]) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """A csv with commas, semicolons or tabs: ([("path:line", row), ..], the columns that no reader uses).

    Capitals in names of columns do not matter, and MELD's names count as ours. Errors: InputError.
    """
    text, rows = read_text(path), []
    first_line = text.lstrip("\n").partition("\n")[0]
    lines = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first_line.count), strict=True)
    try:
        header = [name.strip().lower() for name in next(filter(None, lines), [])]  # a blank line has no cells
        columns = [OTHER_NAMES.get(name, name) for name in header]
        for cells in filter(None, lines):
            where = f"{path}:{lines.line_num}"
            if len(cells) != len(columns):
                raise InputError(f"{where}: {len(cells)} fields, but {len(columns)} columns; quote text with commas")
            rows.append((where, dict(zip(columns, cells))))
    except csv.Error as e:
        raise InputError(f"{path}:{lines.line_num}: malformed row ({e}); look for an unclosed quote above") from e
    if missing := [name for name in required if name not in columns]:
        raise InputError(f"{path}: no column {' and '.join(missing)}; its first line has {', '.join(header) or 'none'}")
    known = {*CSV_FIELDS, "id", *FIELDS}
    if twice := sorted(name for name in known if columns.count(name) > 1):
        raise InputError(f"{path}: two columns for the {twice[0]}; rename or remove one")
    if not rows:
        raise InputError(f"{path}: no utterances, only column names")
    return rows, [name for name in columns if name not in known]


def read_csv(path: Path) -> Corpus:
    """Reads your own corpus from a csv: the columns CSV_FIELDS, and optionally id, audio, video, start and end.

    Rows of a conversation are in the order of speaking, but need not be adjacent. An utterance is named
    "<conversation>_<id or number, from 0>". Label names are sorted. For the other columns see `make_utterance`.
    Errors: InputError that names the line or the label at fault.
    """
    path = Path(path)
    rows, unused = read_table(path, CSV_FIELDS)
    label_names = tuple(sorted({_name(row["label"], where, "label") for where, row in rows}))
    if not 2 <= len(label_names) <= MOST_CLASSES:
        raise InputError(f"{path}: needs 2 to {MOST_CLASSES} different labels, got {len(label_names)}")
    counts = Counter({f"columns not used ({', '.join(unused)})": len(unused)})
    corpus = _group(path.stem, rows, label_names, path.parent, counts)
    if empty := [split for split in SPLITS if not corpus.splits[split]]:
        raise InputError(f"{path}: no rows for {', '.join(empty)}; train, dev and test are all needed")
    known = {u.label for u in corpus.utterances("train")}
    if unknown := [name for i, name in enumerate(label_names) if i not in known]:
        raise InputError(f"{path}: labels that no row of train has: {', '.join(unknown)}; correct them, or add rows")
    return corpus


def _group(name: str, rows: list, label_names: tuple[str, ...], folder: Path, counts: Counter) -> Corpus:
    """A corpus from rows [("path:line", {column: cell}), ..] in the order of speaking."""
    split_of, conversations, line_of, not_found = {}, {}, {}, {}
    for where, row in rows:
        split = CSV_SPLITS.get(row["split"].strip().lower())
        if split is None:
            raise InputError(f"{where}: split must be one of {', '.join(CSV_SPLITS)}; got {row['split'][:60]!r}")
        label = _name(row["label"], where, "label")
        if label not in label_names:
            raise InputError(f"{where}: unknown label {label!r}; {name} has {', '.join(label_names)}")
        conversation = _name(row["conversation"], where, "conversation")
        if split_of.setdefault(conversation, split) != split:
            raise InputError(f"{where}: conversation {conversation!r} is in {split_of[conversation]} and in {split}")
        utterances = conversations.setdefault(conversation, [])
        number = _name(row["id"], where, "id") if "id" in row else len(utterances)
        u = make_utterance(row, where, f"{conversation}_{number}", folder, label_names.index(label))
        if line_of.setdefault(u.id, where) != where:
            raise InputError(f"{where}: utterance {u.id!r} is there a second time, after {line_of[u.id]}")
        missing = {m: p for m in ("audio", "video") if (p := getattr(u, m)) is not None and not os.path.isfile(p)}
        not_found |= {UNPRINTABLE.sub("?", str(p)): None for p in missing.values()}
        utterances.append(dataclasses.replace(u, **dict.fromkeys(missing)))
    counts[f"media files not found ({', '.join(list(not_found)[:3])})"] = len(not_found)
    splits = {s: tuple(Conversation(c, tuple(x)) for c, x in conversations.items() if split_of[c] == s) for s in SPLITS}
    return Corpus(name, label_names, splits, _notes(counts, splits))


def read_conversation(path: Path) -> Conversation:
    """Reads a csv with the columns FIELDS, of which speaker and text are required. Errors: InputError."""
    rows, unused = read_table(path, FIELDS[:2])
    if len({row.get("conversation", "").strip() for _, row in rows}) > 1:
        raise InputError(f"{path}: rows of several conversations; give each conversation a file of its own")
    if unused:
        print(f"{path}: columns not used: {', '.join(unused)}", file=sys.stderr)
    utterances = [make_utterance(row, where, str(i), Path(path).parent) for i, (where, row) in enumerate(rows)]
    return Conversation(str(path), tuple(utterances))


def make_utterance(row: dict, where: str, name: str, folder: Path, label: int = -1) -> Utterance:
    """An utterance from a csv row or a JSON object with the keys FIELDS, of which the first is required.

    Paths are relative to `folder`; without audio, the video's own is used. start and end are times in these files, in
    seconds, mm:ss or hh:mm:ss, with a decimal point or comma. Errors: InputError that begins with `where`.
    """
    row = {k: text for k, v in row.items() if v is not None and (text := str(v).strip())}
    speaker = _name(row.get("speaker", ""), where, "speaker")
    text = UNPRINTABLE.sub(" ", row.get("text", "").translate(PUNCTUATION)).strip()
    paths = {m: folder / row[m] for m in ("audio", "video") if m in row}
    times = {}
    for column in (c for c in ("start", "end") if c in row):
        match = TIME.fullmatch(row[column].lower().replace(",", "."))
        times[column] = sum(float(x or 0) * unit for x, unit in zip(match.groups(), (3600, 60, 1))) if match else -1
        if not 0 <= times[column] < 1e6:  # no recording is as long
            raise InputError(f"{where}: {column} must be in seconds or hh:mm:ss, got {row[column][:60]!r}")
    if "end" in times and times["end"] <= times.get("start", 0):
        raise InputError(f"{where}: ends at {times['end']:g} s, before it starts")
    return Utterance(name, speaker, text, label, paths.get("audio", paths.get("video")), paths.get("video"), **times)


# The feature file


class Encoded(NamedTuple):
    """An encoder's output for every utterance of a corpus, in order; NaN where audio or video is missing."""

    features: Tensor  # [N, d]
    logits: Tensor  # [N, C]


@dataclass
class FeatureFile:
    """Every utterance's features. Rows are utterances in the order of speaking, those of a conversation together."""

    features: dict[str, Tensor]  # kind -> [N, d_m] float32; kinds are KINDS, "text" always there
    present: dict[str, Tensor]  # kind -> [N] bool; False: the utterance does not have it, its feature is zero
    label: Tensor  # [N] int64
    speaker: Tensor  # [N] int64
    conversation: Tensor  # [N] int64
    split: Tensor  # [N] int64, index into SPLITS
    label_names: list[str]
    speaker_names: list[str]
    conversation_names: list[str]
    utterance_names: list[str]
    made_from: dict[str, str] = field(default_factory=dict)  # kind -> key of the encoder that made it; else absent


ROWS = ("label", "speaker", "conversation", "split")  # the file's int64 columns
NAMES = ("label_names", "speaker_names", "conversation_names", "utterance_names")  # in its metadata, as JSON


def write_features(path: Path, file: FeatureFile) -> None:
    """Writes the format of docs/corpora.md, NaN where a feature is missing."""
    tensors = {k: x.masked_fill(~file.present[k][:, None], torch.nan).contiguous() for k, x in file.features.items()}
    tensors |= {name: getattr(file, name) for name in ROWS}
    metadata = {name: json.dumps(getattr(file, name)) for name in (*NAMES, "made_from")}
    metadata["split_names"] = json.dumps(SPLITS)
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_features(path: Path) -> FeatureFile:
    """Reads and checks a feature file. Errors: InputError that names the field at fault."""
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as f:
            tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
        names = {name: json.loads(metadata[name]) for name in (*NAMES, "split_names")}
        made_from = dict(json.loads(metadata.get("made_from", "{}")))
    except Exception as e:  # a damaged header makes safetensors and torch raise nearly anything
        needed = f"its metadata must have {', '.join(NAMES)} and split_names, as JSON"
        raise InputError(f"{path}: not a readable feature file ({type(e).__name__}: {e}); {needed}") from e
    if names.pop("split_names") != list(SPLITS):
        raise InputError(f"{path}: field 'split_names' must be {list(SPLITS)}")
    return dataclasses.replace(check_features(path, tensors, names), made_from=made_from)


def check_features(where: Path | str, tensors: dict[str, Tensor], names: dict[str, list[str]]) -> FeatureFile:
    """A feature file from its columns and its lists of names. Errors: InputError that names the field at fault."""

    def bad(name: str, what: str) -> InputError:
        return InputError(f"{where}: field {name!r} {what}")

    for name, known in names.items():
        usable = isinstance(known, list) and all(isinstance(x, str) and x.strip() for x in known)
        if not usable or len(set(known)) < len(known) or any(UNPRINTABLE.search(x) for x in known):
            raise bad(name, "must be a list of different names, as text, not empty, without control characters")
    if not 2 <= len(names["label_names"]) <= MOST_CLASSES:
        raise bad("label_names", f"must name 2 to {MOST_CLASSES} classes, got {len(names['label_names'])}")
    N, rows = len(names["utterance_names"]), {}
    for name in ROWS:
        x, known = tensors.get(name, torch.empty(0)), names.get(f"{name}_names", SPLITS)
        if x.shape != (N,) or x.dtype != torch.int64:
            raise bad(name, f"must be int64 [{N}], one per utterance name; got {x.dtype} {list(x.shape)}")
        if len(out := ((x < 0) | (x >= len(known))).nonzero()):
            raise bad(name, f"must be 0 to {len(known) - 1}; row {int(out[0])} has {int(x[out[0]])}")
        rows[name] = x
    if missing := [s for i, s in enumerate(SPLITS) if not (rows["split"] == i).any()]:
        raise bad("split", f"has no utterance in {', '.join(missing)}")
    blocks = torch.stack((rows["conversation"], rows["split"])).unique_consecutive(dim=1)
    if blocks.shape[1] != len(rows["conversation"].unique()):
        raise bad("conversation", "must have the utterances of a conversation together, in one split")

    features, present = {}, {}
    for kind in (k for k in KINDS if k in tensors):
        x = tensors[kind]
        if x.dim() != 2 or len(x) != N or not x.shape[1] or not x.is_floating_point():
            raise bad(kind, f"must be float32 [{N}, d]; got {x.dtype} {list(x.shape)}")
        x = x.float()
        absent = x.isnan().all(dim=1)  # a whole row of NaN: the utterance does not have it
        if len(broken := (~x.isfinite().all(dim=1) & ~absent).nonzero()):
            name = names["utterance_names"][i := int(broken[0])]
            raise bad(kind, f"has NaN or infinity inside row {i}, {name!r} (a missing one is all NaN)")
        if not absent.all():  # nobody has it: as if the field were not there
            features[kind], present[kind] = x.masked_fill(absent[:, None], 0.0), ~absent
    if "text" not in features:
        raise bad("text", "is missing or NaN throughout; MAGT's last anchor is text, other modalities may be absent")
    return FeatureFile(features, present, **rows, **names)


def to_feature_file(encoded: dict[str, Encoded], corpus: Corpus, made_from: dict[str, str]) -> FeatureFile:
    """The features of all encoders with labels, speakers and conversations."""
    conversations = [(s, c) for s, split in enumerate(SPLITS) for c in corpus.splits[split]]
    utterances = [(s, i, u) for i, (s, c) in enumerate(conversations) for u in c.utterances]
    speakers = {name: i for i, name in enumerate(dict.fromkeys(u.speaker for _, _, u in utterances))}
    return FeatureFile(
        features={kind: x.features.nan_to_num() for kind, x in encoded.items()},
        present={kind: ~x.features.isnan().any(dim=1) for kind, x in encoded.items()},
        label=torch.tensor([u.label for _, _, u in utterances]),
        speaker=torch.tensor([speakers[u.speaker] for _, _, u in utterances]),
        conversation=torch.tensor([i for _, i, _ in utterances]),
        split=torch.tensor([s for s, _, _ in utterances]),
        label_names=list(corpus.label_names),
        speaker_names=list(speakers),
        conversation_names=[c.id for _, c in conversations],
        utterance_names=[u.id for _, _, u in utterances],
        made_from=made_from,
    )


def standardise(file: FeatureFile) -> tuple[FeatureFile, dict[str, dict[str, list[float]]]]:
    """Features of kinds that no encoder of this project made, with mean 0 and std 1 per column over train.

    A column that is constant in train becomes 0. Returns the file and {kind: {"mean": [d], "std": [d]}}, std 0 for a
    constant column. Errors: InputError for a kind that train lacks.
    """
    features, moments = dict(file.features), {}
    for kind, x in file.features.items():
        if kind not in file.made_from:
            x, present = x.double(), file.present[kind]
            train = x[present & (file.split == 0)]
            if not len(train):
                raise InputError(f"feature kind {kind!r}: no utterance of train has it")
            mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
            constant = std <= 1e-6 * mean.abs()  # float32 has 7 digits: no more than rounding
            x = ((x - mean) / std).masked_fill(constant | ~present[:, None], 0.0)
            features[kind] = x.float()
            moments[kind] = {"mean": mean.tolist(), "std": std.masked_fill(constant, 0.0).tolist()}
    return dataclasses.replace(file, features=features), moments


def file_digest(file: FeatureFile, kinds: Iterable[str]) -> str:
    """Digest of everything in a feature file that training on these kinds reads."""
    tensors = [x for kind in sorted(kinds) for x in (file.features[kind], file.present[kind])]
    own = [(kind, kind in file.made_from) for kind in sorted(kinds)]
    return digest(own, *tensors, *(getattr(file, name) for name in (*ROWS, *NAMES)))


# Conversations as rows


class Batch(NamedTuple):
    """Conversations one after the other: the input of a fusion model, and what its losses need besides."""

    inputs: tuple[dict[str, Tensor], Tensor, list[int], dict[str, Tensor]]  # the arguments of MAGT.forward, in order
    labels: Tensor  # [N]
    rows: dict[str, Tensor]  # modality -> [n_m] int64, the rows that have it; no entry: all have


class Conversations:
    """A feature file on the device, handed out by the names of conversations."""

    def __init__(self, file: FeatureFile, kinds: tuple[str, ...], device: torch.device):
        modality = {kind: kind.removesuffix("_kd") for kind in kinds}
        self.kinds, self.device, self.digest = kinds, device, file_digest(file, kinds)
        self.features = {modality[k]: file.features[k].to(device) for k in kinds}
        self.present = {modality[k]: file.present[k] for k in kinds if not file.present[k].all()}  # on the CPU: `batch`
        self.label, self.num_classes = file.label.to(device), len(file.label_names)
        seen = file.speaker[file.split == 0].unique()
        self.num_speakers = int(seen.max()) + 1
        # A speaker never seen in training has an embedding that was never trained: 0, which adds nothing.
        self.speaker = torch.where(torch.isin(file.speaker, seen), file.speaker + 1, 0).to(device)
        ids, lengths = file.conversation.unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0)
        self.slices: dict[str, slice] = {}
        self.splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for i, start, end in zip(ids.tolist(), (ends - lengths).tolist(), ends.tolist()):
            name = file.conversation_names[i]
            self.slices[name] = slice(start, end)
            self.splits[SPLITS[file.split[start]]].append(name)

    def batch(self, names: list[str]) -> Batch:
        """The conversations of these names. Does not wait for a GPU: all sizes are known on the host."""
        slices = [self.slices[name] for name in names]

        def pick(x: Tensor) -> Tensor:
            return torch.cat([x[at] for at in slices])

        present = {m: pick(x) for m, x in self.present.items()}
        rows = {m: x.nonzero().squeeze(1).to(self.device, non_blocking=True) for m, x in present.items()}
        present = {m: x.to(self.device, non_blocking=True) for m, x in present.items()}
        features = {m: pick(x) for m, x in self.features.items()}
        inputs = (features, pick(self.speaker), [at.stop - at.start for at in slices], present)
        return Batch(inputs, pick(self.label), rows)
