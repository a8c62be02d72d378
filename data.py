"""Data: IEMOCAP and MELD on disk, the feature file, and conversations as rows.

`read_iemocap` and `read_meld` turn a user's own copy into a Corpus: conversations of utterances, in the order of
speaking, with paths to sound and pictures (section 4.1 of the paper). What is odd but bearable about the copy is
counted in `Corpus.notes`, which the report shows; what would make the results incomparable is an InputError.

`FeatureFile` is what lies between the stages: one feature (a vector) per
utterance and encoder. `Conversations` hands it out in batches, as rows without padding.

Not here: what becomes of words, sound and pictures (encoders.py).
"""

import csv
import errno
import io
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SPLITS = ("train", "dev", "test")
MODALITIES = ("text", "audio", "video")
KINDS = ("text", "audio", "video", "audio_kd", "video_kd")  # of features; _kd: from an encoder distilled from text


class InputError(Exception):
    """The user's input cannot be used; the message says what, where, and what to do. Exit code 2."""


class MediaError(Exception):
    """One file cannot be decoded; the message says why. The run goes on without it."""


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file under a temporary name, then moves it: there is never half a file under its name."""
    part = Path(f"{path}.part")
    try:
        write(part)
        os.replace(part, path)
    except (RuntimeError, SafetensorError) as e:  # a full disk, in torch's and safetensors' words
        raise InputError(f"{path}: cannot be written ({e}); is the disk full? What is whole stays") from e
    finally:
        part.unlink(missing_ok=True)


def save_state(path: Path, parts: dict[str, Any], history: list[dict], best: dict) -> None:
    """parts: whatever has a state_dict: model, optimizer, schedule, scaler. The old file stays until this is whole."""
    state = {"parts": {name: part.state_dict() for name, part in parts.items()}, "history": history, "best": best}
    replace_file(path, lambda part: torch.save(state, part))


def load_state(path: Path, parts: dict[str, Any]) -> tuple[list[dict], dict] | None:
    """Puts the parts into the state that `save_state` kept. Returns (history, best), or None if nothing was kept."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return list(state["history"]), dict(state["best"])
    except Exception as e:  # a damaged file makes torch raise nearly anything
        raise InputError(f"{path}: not a checkpoint of this model; delete it, or start again with --fresh") from e


def read_text(path: Path) -> str:
    """A text file in UTF-8, or else in Windows' cp1252. Errors: InputError for one that is no text."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file")
        content = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    if "\0" in text:
        raise InputError(f"{path}: no text in UTF-8 (it has bytes of 0; UTF-16?); save it as UTF-8")
    return text


def read_table(path: Path, wanted: tuple[str, ...]) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """A csv, its cells between commas, semicolons or tabs: (names of the columns, [("path:line", row), ..]).

    The case of the columns' names is that of `wanted`. Errors: InputError for a torn row or an unclosed quote.
    """
    text, rows = read_text(path), []
    head = text.lstrip().partition("\n")[0]
    lines = csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    known = {name.lower(): name for name in wanted}
    try:
        columns = [known.get(name.strip().lower(), name.strip()) for name in next(lines, [])]
        if twice := [name for name, n in Counter(columns).items() if n > 1 and name in wanted]:
            raise InputError(f"{path}: two columns are called {twice[0]}")
        for cells in lines:
            where = f"{path}:{lines.line_num}"
            if cells and len(cells) != len(columns):
                more = "more" if len(cells) > len(columns) else "fewer"
                raise InputError(f"{where}: torn row, {more} fields than columns; text with a comma wants quotes")
            rows += [(where, dict(zip(columns, cells)))] if cells else []
    except csv.Error as e:
        raise InputError(f"{path}:{lines.line_num}: torn row ({e}); look for a quote that is not closed") from e
    return columns, rows


@dataclass(frozen=True)
class Utterance:
    id: str  # unique in the corpus
    speaker: str
    text: str
    label: int  # index into Corpus.label_names
    audio: Path | None  # a file of any container; None: missing
    video: Path | None
    start: float | None = None  # where the utterance lies in the video file, in seconds; None: all of the file
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

    def utterances(self, *splits: str) -> list[Utterance]:
        """Of these splits, or of all."""
        return [u for s in splits or SPLITS for conversation in self.splits[s] for u in conversation.utterances]


# IEMOCAP

IEMOCAP_LABELS = {"ang": "angry", "exc": "excited", "fru": "frustrated", "hap": "happy", "neu": "neutral", "sad": "sad"}
IEMOCAP_DROPPED = set("xxx sur fea dis oth".split())  # no agreement, or too rare: in nobody's 6-class setting
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
    ids = Counter(u.id for conversations in by_id.values() for c in conversations for u in c.utterances)
    if twice := [turn for turn, n in ids.items() if n > 1]:
        raise InputError(f"IEMOCAP at {root}: turns labelled twice: {_some(twice)}; unpack the label files again")
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
    said = [(m[1], m[4].strip()) for line in _lines(words) if (m := WORDS_LINE.match(line))]
    text = dict(reversed(said))
    counts["turns a second time in a transcript, ignored"] += len(said) - len(text)
    labelled, turns = set(), []
    for number, line in enumerate(_lines(labels), 1):
        if not line.startswith("["):
            continue  # the header and the annotators' own lines
        if not (m := TURN_LINE.fullmatch(line.rstrip())):
            raise InputError(f"{labels}:{number}: torn line {line[:60]!r}; unpack this file again")
        start, end, turn, emotion = float(m[1]), float(m[2]), m[3], m[4]
        if turn[-4:-3] not in ("F", "M"):
            raise InputError(f"{labels}:{number}: the speaker of {turn!r} is neither F nor M; unpack this file again")
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

    sounds = {p.stem: p for p in _files(session / "sentences/wav" / labels.stem, "*.wav")}
    turns.sort()  # the file may be grouped by name
    order = list(dict.fromkeys(turn[-4] for _, _, turn, _ in turns))  # "F" or "M"; the session's letter is another
    utterances = []
    for start, end, turn, label in turns:
        audio = sounds.get(turn)
        counts["utterances without a sound file"] += audio is None
        counts["utterances without a video file"] += video is None
        speaker = ("first", "second")[order.index(turn[-4])]
        utterances.append(Utterance(turn, speaker, text[turn], label, audio, video, start, end))
    return Conversation(labels.stem, tuple(utterances))


# MELD

MELD_LABELS = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
MELD_CLIPS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
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
        packed = (
            " There is a .tar.gz in it: unpack it, and those inside it, first." if any(root.glob("*.tar.gz")) else ""
        )
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
    folder = _find(root, split, MELD_CLIPS[split])
    clips = {} if folder is None else {p.stem: p for p in _files(folder, "dia*.mp4")}
    if folder is not None:  # corrected cuts of the test clips
        corrected = {p.stem.removeprefix("final_videos_test"): p for p in _files(folder, "final_videos_testdia*.mp4")}
        clips |= corrected
    else:
        counts[f"folders of clips missing ({split}: {MELD_CLIPS[split]})"] += 1
    dialogues: dict[int, dict[int, Utterance]] = {}
    columns, rows = read_table(table, MELD_COLUMNS)
    if lacking := [c for c in MELD_COLUMNS if c not in columns]:
        raise InputError(f"{table}: not MELD's table, the columns {', '.join(lacking)} are missing")
    for where, row in rows:
        if not re.fullmatch("[0-9]{1,9} [0-9]{1,9}", f"{row['Dialogue_ID']} {row['Utterance_ID']}"):
            raise InputError(f"{where}: torn row {','.join(row.values())[:60]!r}; download it again")
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


def _find(root: Path, split: str, name: str) -> Path | None:
    """`name` in root or below root/split, wherever it exists."""
    folders = (root, root / split, root / split / split)
    return next((path for folder in folders if (path := folder / name).is_file() or path.is_dir()), None)


def _files(folder: Path, pattern: str) -> list[Path]:
    """Sorted files of a folder, none if it is missing; without the `._name` stubs that Macs leave beside each file."""
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith(".") and p.is_file())


def _lines(path: Path) -> list[str]:
    """Ended by Windows', Unix' or old Macs' end of a line, and by none of Unicode's others."""
    return re.split("\r\n|\r|\n", read_text(path))


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _notes(counts: Counter, splits: dict[str, tuple[Conversation, ...]]) -> tuple[str, ...]:
    sizes = "/".join(str(len(splits[s])) for s in SPLITS)
    utterances = "/".join(str(sum(len(c.utterances) for c in splits[s])) for s in SPLITS)
    head = f"{sizes} conversations and {utterances} utterances (train/dev/test)"
    return (head, *(f"{n} {what}" for what, n in sorted(counts.items()) if n))


# The feature file, and the encoders' answers that it is made of


class Encoded(NamedTuple):
    """An encoder's answers for every utterance of a corpus, in order; NaN where sound or picture is missing."""

    features: Tensor  # [N, d]
    logits: Tensor  # [N, C]


def write_encoded(path: Path, answers: Encoded, ids: list[str]) -> None:
    replace_file(path, lambda part: save_file(answers._asdict(), part, {"utterances": json.dumps(ids)}))


def read_encoded(path: Path, ids: list[str]) -> Encoded:
    """What an encoder left, if it is of these utterances. Errors: InputError."""
    try:
        with safe_open(path, framework="pt") as f:
            if json.loads((f.metadata() or {})["utterances"]) == ids:
                answers = Encoded(f.get_tensor("features"), f.get_tensor("logits"))
                if [(x.dim(), len(x), x.dtype) for x in answers] != [(2, len(ids), torch.float32)] * 2:
                    raise ValueError("other shapes")
                return answers
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        raise InputError(f"{path}: not an encoder's answers ({type(e).__name__}); delete it, it is made again") from e
    raise InputError(f"{path}: made from other utterances than the corpus has now; start again with --fresh")


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


ROWS = ("label", "speaker", "conversation", "split")  # the file's int64 columns
NAMES = ("label_names", "speaker_names", "conversation_names", "utterance_names")  # in its metadata, as JSON


def write_features(path: Path, file: FeatureFile) -> None:
    """Writes the format of the README, NaN where a feature is missing; whole or not at all."""
    nan = torch.tensor(torch.nan)
    tensors = {k: torch.where(file.present[k][:, None], x, nan).contiguous() for k, x in file.features.items()}
    tensors |= {name: getattr(file, name) for name in ROWS}
    metadata = {name: json.dumps(getattr(file, name)) for name in NAMES} | {"split_names": json.dumps(SPLITS)}
    replace_file(path, lambda part: save_file(tensors, part, metadata))


def to_feature_file(encoded: dict[str, Encoded], corpus: Corpus) -> FeatureFile:
    """The features of all encoders with labels, speakers and conversations."""
    conversations = [(s, c) for s, split in enumerate(SPLITS) for c in corpus.splits[split]]
    utterances = [(s, i, u) for i, (s, c) in enumerate(conversations) for u in c.utterances]
    speakers = {name: i for i, name in enumerate(dict.fromkeys(u.speaker for _, _, u in utterances))}
    return FeatureFile(
        features={name: x.features.nan_to_num() for name, x in encoded.items()},
        present={name: ~x.features.isnan().any(dim=1) for name, x in encoded.items()},
        label=torch.tensor([u.label for _, _, u in utterances]),
        speaker=torch.tensor([speakers[u.speaker] for _, _, u in utterances]),
        conversation=torch.tensor([i for _, i, _ in utterances]),
        split=torch.tensor([s for s, _, _ in utterances]),
        label_names=list(corpus.label_names),
        speaker_names=list(speakers),
        conversation_names=[c.id for _, c in conversations],
        utterance_names=[u.id for _, _, u in utterances],
    )


# Conversations as rows


class Batch(NamedTuple):
    """Conversations one after the other: what a fusion model takes, and what its losses need besides."""

    inputs: tuple[dict[str, Tensor], Tensor, list[int], dict[str, Tensor]]  # as MAGT.forward has them, in order
    labels: Tensor  # [N]
    rows: dict[str, Tensor]  # modality -> [n_m] int64, the rows that have it; no entry: all have


class Conversations:
    """A feature file on the device, handed out by the names of conversations."""

    def __init__(self, file: FeatureFile, kinds: tuple[str, ...], device: torch.device):
        modality = {kind: kind.removesuffix("_kd") for kind in kinds}
        self.kinds, self.device = kinds, device
        self.features = {modality[k]: file.features[k].to(device) for k in kinds}
        self.present = {modality[k]: file.present[k] for k in kinds if not file.present[k].all()}  # on the CPU: `batch`
        self.label = file.label.to(device)
        seen = file.speaker[file.split == 0].unique()
        self.num_speakers = int(seen.max()) + 1
        # A speaker never seen in training has an embedding that was never trained: 0, which adds nothing.
        self.speaker = torch.where(torch.isin(file.speaker, seen), file.speaker + 1, 0).to(device)
        _, lengths = file.conversation.unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        names = [file.conversation_names[i] for i in file.conversation[starts].tolist()]
        self.slices = {name: slice(*at) for name, at in zip(names, zip(starts, ends))}
        self.lengths = dict(zip(names, lengths.tolist()))
        self.splits = {
            split: [name for name, start in zip(names, starts) if file.split[start] == s]
            for s, split in enumerate(SPLITS)
        }

    def batch(self, names: list[str]) -> Batch:
        """The conversations of these names. Nothing here waits for a GPU: sizes are known on the host."""
        at = [self.slices[name] for name in names]

        def pick(x: Tensor) -> Tensor:
            return torch.cat([x[rows] for rows in at])

        present = {m: pick(x) for m, x in self.present.items()}
        rows = {m: x.nonzero().squeeze(1).to(self.device, non_blocking=True) for m, x in present.items()}
        present = {m: x.to(self.device, non_blocking=True) for m, x in present.items()}
        features = {m: pick(x) for m, x in self.features.items()}
        inputs = (features, pick(self.speaker), [self.lengths[name] for name in names], present)
        return Batch(inputs, pick(self.label), rows)
