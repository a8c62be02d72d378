"""The features that the paper's authors published, as pickles, read without running anything that is in them.

A folder with first_stage_{train,dev,test}_features.pkl; each a dict of `text`, `audio`, `video`, `audio_kd`, `video_kd`
(any of these but the first may be absent), `speakers` and `labels`, dicts from a conversation's id to a list with an
entry per utterance; `vids`, the ids of the conversations, and `dia2utt`, which is not needed here.

A pickle is a program: to load it is to run it. Here, only the parts of the language that make dicts, lists, tuples,
strings, numbers and NumPy arrays of numbers work; NumPy's own functions have stand-ins that build nothing else.

Not here: the feature file (data.py), into whose shape this is brought.
"""

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import KINDS, SPLITS, FeatureFile, InputError

PLAIN = re.compile(r"[<>=|]?[fiubUS?]\d*")  # numpy's codes for numbers and strings, and for nothing that holds objects
ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    ValueError,
    TypeError,
    MemoryError,
    OverflowError,
    RecursionError,
)


class _RefusedError(Exception):
    """The pickle holds something else than plain values; the message says what."""


class _Dtype:
    """Stands in for numpy.dtype: a code of PLAIN, and the order of its bytes."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not (isinstance(code, str) and PLAIN.fullmatch(code)):
            raise _RefusedError(f"an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if isinstance(state[1], str) and state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray while it is put together: `value` in the end."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _frombuffer(data, dtype, shape, "F" if fortran else "C")


def _reconstruct(cls: type, shape: tuple, code: bytes) -> _Array:
    if cls is not _Array:
        raise _RefusedError("an array of a class of its own")
    return _Array()


def _frombuffer(data: bytes | str, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise _RefusedError("an array of an unknown type")
    data = data.encode("latin1") if isinstance(data, str) else bytes(data)  # str: of Python 2
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: _Dtype, data: bytes | str) -> Any:
    return _frombuffer(data, dtype, (), "C").item()


def _encode(text: str, encoding: str) -> bytes:
    """How the oldest protocols write bytes."""
    if encoding != "latin1":
        raise _RefusedError(f"bytes in {encoding!r}")
    return text.encode(encoding)


ALLOWED: dict[tuple[str, str], Any] = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array}
ALLOWED |= {("_codecs", "encode"): _encode}
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    ALLOWED |= {(f"{_core}.multiarray", "_reconstruct"): _reconstruct, (f"{_core}.multiarray", "scalar"): _scalar}
    ALLOWED |= {(f"{_core}.numeric", "_frombuffer"): _frombuffer}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _RefusedError(f"{module}.{name}, which is neither of Python's plain types nor NumPy's")
        return ALLOWED[module, name]


def _plain(x: Any) -> Any:
    """The same with arrays in place of their stand-ins."""
    if isinstance(x, dict):
        return {_plain(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(map(_plain, x))
    if isinstance(x, _Array):
        return x.value
    if x is None or isinstance(x, (str, bytes, int, float, np.ndarray)):
        return x
    raise _RefusedError(f"an object of type {type(x).__name__}")


def load_pickle(path: Path) -> Any:
    """What a pickle of dicts, lists, tuples, strings, numbers and arrays holds. Errors: InputError for any other."""
    try:
        with open(path, "rb") as f:
            return _plain(_Unpickler(f, encoding="latin1").load())
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from e
    except _RefusedError as e:
        raise InputError(f"{path}: refused, it holds {e}; nothing of it was run") from e
    except ERRORS as e:
        raise InputError(f"{path}: not a whole pickle of plain values ({type(e).__name__})") from e


def read_pickles(folder: Path) -> FeatureFile:
    """The authors' features. Labels and speakers are named by their numbers, if that is what the pickles hold.

    Errors: InputError that names the file, the field, the conversation and the utterance at fault.
    """
    paths = {split: Path(folder) / f"first_stage_{split}_features.pkl" for split in SPLITS}
    if missing := [p.name for p in paths.values() if not p.is_file()]:
        raise InputError(f"{folder}: {', '.join(missing)} missing; --features wants the authors' three, or one file")
    contents = {split: load_pickle(path) for split, path in paths.items()}
    for split, content in contents.items():
        _check_fields(paths[split], content)
    kinds = [k for k in KINDS if all(k in content for content in contents.values())]
    if odd := [k for k in KINDS if k not in kinds and any(k in content for content in contents.values())]:
        raise InputError(f"{folder}: field {odd[0]!r} is in some of the three files only")

    features: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    label, speaker, conversation, split_of, names, utterances = [], [], [], [], [], []
    for s, (split, content) in enumerate(contents.items()):
        for vid in content.get("vids", content["text"]):
            rows = _conversation(paths[split], content, kinds, vid)
            for kind in kinds:
                features[kind] += rows[kind]
            U = len(rows["text"])
            label += rows["labels"]
            speaker += rows["speakers"]
            conversation += [len(names)] * U
            split_of += [s] * U
            names.append(f"{split} {vid}")
            utterances += [f"{split} {vid} {i}" for i in range(U)]

    label_names, label_index = _number(label, "class")
    speaker_names, speaker_index = _number(speaker, "speaker")
    present = {}
    for kind, rows in features.items():
        widths = {len(x) for x in rows}
        if len(widths) > 1:
            i = next(i for i, x in enumerate(rows) if len(x) != len(rows[0]))
            raise InputError(
                f"{folder}: field {kind!r}: {utterances[i]} has {len(rows[i])} numbers, the first {len(rows[0])}"
            )
        x = torch.from_numpy(np.stack(rows))
        present[kind] = ~x.isnan().all(dim=1)
        if (broken := ~x.isfinite().all(dim=1) & present[kind]).any():
            raise InputError(f"{folder}: field {kind!r}: NaN or infinity in {utterances[int(broken.nonzero()[0])]}")
        features[kind] = x.nan_to_num()
    rows = {"label": label_index, "speaker": speaker_index, "conversation": conversation, "split": split_of}
    return FeatureFile(
        features,
        present,
        **{name: torch.tensor(x) for name, x in rows.items()},
        label_names=label_names,
        speaker_names=speaker_names,
        conversation_names=names,
        utterance_names=utterances,
    )


def _check_fields(path: Path, content: Any) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a dict of fields, got {type(content).__name__}")
    for field in ("text", "labels", "speakers"):
        if field not in content:
            raise InputError(f"{path}: field {field!r} is missing; it has {', '.join(map(str, content)) or 'none'}")
    for field in (*KINDS, "labels", "speakers"):
        if field in content and not isinstance(content[field], dict):
            raise InputError(f"{path}: field {field!r} must be a dict of conversations")
    vids = content.get("vids", content["text"])
    if not isinstance(vids, (dict, list, tuple, np.ndarray)) or not len(vids):
        raise InputError(f"{path}: field 'vids' must name the conversations, got {str(vids)[:40]}")


def _conversation(path: Path, content: dict, kinds: list[str], vid: Any) -> dict[str, list]:
    """One conversation: arrays [d] float32 per utterance for each kind; numbers or strings for labels and speakers."""
    rows: dict[str, list] = {}
    for field in (*kinds, "labels", "speakers"):
        where = f"{path}: field {field!r}: conversation {vid!r}"
        try:
            values = content[field][vid]
        except (KeyError, TypeError) as e:
            raise InputError(f"{where} is missing") from e
        if not isinstance(values, (list, tuple, np.ndarray)):
            raise InputError(f"{where} must be a list with an entry per utterance, got {type(values).__name__}")
        if len(values) != len(rows.get("text", values)) or not len(values):
            raise InputError(f"{where} has {len(values)} utterances, its text {len(rows.get('text', values))}")
        convert = _vector if field in kinds else _name
        rows[field] = [convert(f"{where}, utterance {i}", x) for i, x in enumerate(values)]
    return rows


def _vector(where: str, x: Any) -> np.ndarray:
    try:
        vector = np.asarray(x, dtype=np.float32).squeeze()
    except (TypeError, ValueError) as e:
        raise InputError(f"{where}: no vector of numbers") from e
    if vector.ndim != 1:
        raise InputError(f"{where}: wanted a vector, got an array {list(vector.shape)}")
    return vector


def _name(where: str, x: Any) -> int | str:
    """A label or a speaker: a whole number or a string."""
    x = x.item() if isinstance(x, (np.ndarray, np.generic)) and x.size == 1 else x
    if isinstance(x, float) and math.isfinite(x) and x == int(x):
        x = int(x)
    if not isinstance(x, (int, str)) or (isinstance(x, int) and x < 0):
        raise InputError(f"{where}: wanted a number from 0 or a name, got {str(x)[:40]}")
    return x


def _number(values: list[int | str], what: str) -> tuple[list[str], list[int]]:
    """Names and indices into them, in the order of the numbers or of the alphabet."""
    known = sorted(set(values), key=lambda x: (isinstance(x, str), x))
    index = {x: i for i, x in enumerate(known)}
    return [x if isinstance(x, str) else f"{what} {x}" for x in known], [index[x] for x in values]
