"""Converts pickles of features to a feature file, without running anything that is in them.

    python -m extras.pickles INPUT OUT.safetensors [--seed N]

INPUT is a folder with the authors' first_stage_{train,dev,test}_features.pkl: each a dict of fields (text, audio,
video, audio_kd, video_kd, labels, speakers), each of them a dict from a conversation's id to a list with one entry per
utterance. Or it is IEMOCAP_features.pkl, IEMOCAP_features_raw.pkl, MELD_features_raw.pkl or MELD_features_raw1.pkl: a
list of such dicts (ids of utterances, speakers, labels, text, audio, perhaps video, sentences), then the ids of the
train and of the test conversations. MELD's dev set is part of train; elsewhere a tenth of train's conversations is
drawn by --seed, for IEMOCAP the same that `data.read_iemocap` draws.
"""

import argparse
import codecs
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import KINDS, SPLITS, FeatureFile, InputError, check_features, write_features

IEMOCAP_LABELS = ("happy", "sad", "neutral", "angry", "excited", "frustrated")  # the field's, for 0, 1, ..
MELD_LABELS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
MELD_DEV = [str(i) for i in range(1039, 1153)]  # the ids of MELD's dev conversations


class _Dtype:
    """Stands in for numpy.dtype: the state of a real one can declare any bytes to be pointers to objects."""

    def __init__(self, code: str, *flags: bool):
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, content = state
        super().__setstate__((version, shape, dtype.dtype, fortran, content))


def _frombuffer(content: bytes | str, dtype: _Dtype, shape: tuple = (), order: str = "C") -> np.ndarray:
    content = content.encode("latin1") if isinstance(content, str) else content  # str: of Python 2
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


ALLOWED = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array, ("_codecs", "encode"): codecs.encode}
ALLOWED |= {("builtins", "set"): set, ("__builtin__", "set"): set}
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    ALLOWED[f"{_core}.multiarray", "_reconstruct"] = lambda cls, shape, code: _Array(0)  # its state follows
    ALLOWED[f"{_core}.multiarray", "scalar"] = lambda dtype, content: _frombuffer(content, dtype)[()]
    ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise InputError(f"{module}.{name}")
        return ALLOWED[module, name]


def load_pickle(path: Path) -> Any:
    """The content of a pickle of dicts, lists, sets, tuples, strings, numbers and arrays. InputError for any other."""
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except InputError as e:
        raise InputError(f"{path}: refused, it holds {e}; nothing of it was run") from e
    except Exception as e:  # a damaged pickle makes Python and NumPy raise nearly anything
        raise InputError(f"{path}: cannot be read as a pickle of plain values ({type(e).__name__})") from e


def convert(path: Path, seed: int = 0) -> FeatureFile:
    """Prints what was taken as what. Raises InputError that names the file and the field at fault."""
    parts = _read_folder(path) if path.is_dir() else _read_list(path, seed)
    conversations = [name for _, ids in parts for name in ids]
    rows, lengths = {}, []
    for field in parts[0][0]:
        try:
            entries = [list(fields[field][i]) for fields, ids in parts for i in ids.values()]
            rows[field] = _read(field, [x for of_one in entries for x in of_one])
        except (KeyError, ValueError, TypeError, OverflowError) as e:
            what = "a vector, all of one length" if field in KINDS else "a number from 0, a name or a one-hot vector"
            raise InputError(f"{path}: field {field!r}: each utterance must have {what} ({e!r:.99})") from e
        lengths = lengths or [len(x) for x in entries]
        if odd := [name for name, x, U in zip(conversations, entries, lengths) if len(x) != U]:
            raise InputError(f"{path}: field {field!r}: conversation {odd[0]!r} must have one entry per utterance")
    utterances = [f"{name} {i}" for name, U in zip(conversations, lengths) for i in range(U)]
    ids = rows.pop("ids", np.empty(0))
    if ids.dtype.kind == "U" and len(np.unique(ids)) == len(ids):
        utterances = ids.tolist()
    first = conversations[0]
    classes = IEMOCAP_LABELS if first.startswith("Ses") else MELD_LABELS if first.isdigit() else ()
    names = {"conversation_names": conversations, "utterance_names": utterances}
    names["label_names"], rows["label"] = _number(rows.pop("labels"), "class", classes)
    names["speaker_names"], rows["speaker"] = _number(rows.pop("speakers"), "speaker")
    rows["conversation"] = np.repeat(range(len(lengths)), lengths)
    rows["split"] = np.repeat(range(3), [len(ids) for _, ids in parts])[rows["conversation"]]
    print("features:", ", ".join(f"{kind} {rows[kind].shape[1]}" for kind in KINDS if kind in rows))
    print("utterances:", ", ".join(f"{name} {n}" for name, n in zip(SPLITS, np.bincount(rows["split"]))))
    print("labels:", ", ".join(names["label_names"]))
    return check_features(path, {name: torch.from_numpy(x) for name, x in rows.items()}, names)


def _read_folder(folder: Path) -> list[tuple[dict, dict]]:
    """({field: {id of a conversation: entries}}, {its name: its id}) for each of SPLITS."""
    parts = []
    for split in SPLITS:
        content = load_pickle(path := folder / f"first_stage_{split}_features.pkl")
        content = content if isinstance(content, dict) else {}
        fields = {k: content[k] for k in (*KINDS, "labels", "speakers") if isinstance(content.get(k), dict)}
        if missing := sorted({"text", "labels", "speakers"} - fields.keys()):
            raise InputError(f"{path}: field {missing[0]!r} is missing; must be a dict with text, labels and speakers")
        parts.append((fields, _conversations(path, fields["text"], f"{split} ")))  # ids start again in each split
    return parts


def _read_list(path: Path, seed: int) -> list[tuple[dict, dict]]:
    content = load_pickle(path)
    n = sum(isinstance(x, dict) for x in content[:7]) - 1 if isinstance(content, list) else 0  # index of the sentences
    if not 4 <= n <= 6 or len(content) < n + 3:
        raise InputError(f"{path}: must be a list of 5 to 7 dicts, then the train and the test conversations")
    fields = dict(zip(("ids", "speakers", "labels", "text", "audio", "video"), content[:n]))
    print(f"{path}: a list of {', '.join(fields)}, sentences (not used), train and test conversations")
    train, test = _conversations(path, content[n + 1]), _conversations(path, content[n + 2])
    order, how = [name for name in train if name in MELD_DEV], "as in MELD"
    if not order:
        order, how = sorted(train), f"drawn with seed {seed}"
        random.Random(seed).shuffle(order)
        order = order[: max(1, round(len(order) / 10))]
    print(f"dev: {len(order)} of the {len(train)} conversations of train, {how}")
    dev = {name: train.pop(name) for name in sorted(order)}
    return [(fields, train), (fields, dev), (fields, test)]


def _conversations(path: Path, ids: Any, prefix: str = "") -> dict[str, Any]:
    """{name: id}, in the order of the ids."""
    ids = ids if isinstance(ids, (dict, list, set)) else ()
    known = np.array([i for i in ids if isinstance(i, (str, int, np.integer))])
    if known.dtype.kind not in "iuU" or len(known) < len(ids):
        raise InputError(f"{path}: must name the conversations by text or integers")
    return {f"{prefix}{i}": i for i in sorted(known.tolist())}


def _read(field: str, entries: Any) -> np.ndarray:
    """[U, d] float32; of labels, speakers and ids [U] numbers or names. Raises ValueError, TypeError, OverflowError."""
    x = np.array(entries, np.float32 if field in KINDS else None)
    if field in KINDS:
        return x.reshape(len(x), -1)
    if x.ndim == 2 and x.shape[1] > 1 and (np.sort(x) == np.eye(x.shape[1])[-1]).all():
        x = x.argmax(1)  # one-hot
    x = x.reshape(len(x))
    if x.dtype.kind != "U" and ((x < 0).any() or (x % 1 != 0).any()):
        raise ValueError("negative or fractional")
    return x if x.dtype.kind == "U" else x.astype(np.int64)


def _number(values: np.ndarray, what: str, names: tuple[str, ...] = ()) -> tuple[list[str], np.ndarray]:
    """Names and indices into them, in the order of the numbers or of the alphabet. names: of 0, 1, .., if known."""
    known, index = np.unique(values, return_inverse=True)
    if known.dtype.kind != "U":
        known = [names[i] if known[-1] < len(names) else f"{what} {i}" for i in known]
    return [str(name) for name in known], index


def main() -> int:
    from magtkd import run_command  # here, so that the functions above need no more than data.py

    parser = argparse.ArgumentParser(description="Convert pickles of features to a feature file; they are not run.")
    parser.add_argument("input", type=Path, help="a folder with the authors' pickles, or IEMOCAP_features.pkl, ..")
    parser.add_argument("output", type=Path, metavar="OUT.safetensors", help="a new file")
    parser.add_argument("--seed", type=int, default=0, help="draws the dev set where there is none")
    args = parser.parse_args()

    def work() -> None:
        if args.output.exists():
            raise InputError(f"{args.output} exists; give a new name")
        write_features(args.output, convert(args.input, args.seed))
        print(f"wrote {args.output}")

    return run_command("pickles", work)


if __name__ == "__main__":
    sys.exit(main())
