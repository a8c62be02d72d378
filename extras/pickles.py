"""The features that the paper's authors published, as pickles, read without running anything that is in them.

A folder with first_stage_{train,dev,test}_features.pkl; each a dict of `text`, `audio`, `video`, `audio_kd`, `video_kd`
(any of these but the first may be absent), `speakers` and `labels`, dicts from a conversation's id to a list with an
entry per utterance; `vids`, the ids of the conversations, and `dia2utt`, which is not needed here.

A pickle is a program: to load it is to run it. Here, only the parts of the language that make dicts, lists, tuples,
strings, numbers and NumPy arrays of numbers work; NumPy's own functions have stand-ins that build nothing else. A small
pickle can also stand for gigabytes, by naming one list again and again: nothing here unfolds such a list.

Not here: the feature file (data.py), into whose shape this is brought.
"""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import KINDS, SPLITS, FeatureFile, InputError
from extras.features import check_features

PLAIN = re.compile(r"[<>=|]?[fiubUS?]\d*")  # numpy's codes for numbers and strings, and for nothing that holds objects


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


ALLOWED: dict[tuple[str, str], Any] = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): _Array}
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    ALLOWED |= {(f"{_core}.multiarray", "_reconstruct"): _reconstruct, (f"{_core}.multiarray", "scalar"): _scalar}
    ALLOWED |= {(f"{_core}.numeric", "_frombuffer"): _frombuffer}


class _Unpickler(pickle._Unpickler):  # the one in Python: its memo is a dict, so that a large index costs nothing
    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.encoded: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self.encode
        if (module, name) not in ALLOWED:
            raise _RefusedError(f"{module}.{name}, which is neither of Python's plain types nor NumPy's")
        return ALLOWED[module, name]

    def encode(self, text: str, encoding: str) -> bytes:
        """How the oldest protocols write bytes. Once per text: a pickle may ask for the same a million times."""
        if encoding != "latin1":
            raise _RefusedError(f"bytes in {encoding!r}")
        if text not in self.encoded:
            self.encoded[text] = text.encode(encoding)
        return self.encoded[text]

    # Keys are strings and numbers alone: to hash a tuple of tuples of tuples can take for ever.
    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (_Array, _Dtype)):
            raise _RefusedError(f"a state for an object of type {type(self.stack[-2]).__name__}")
        super().load_build()

    def _check_keys(self, keys: list) -> None:
        for key in keys:
            if not isinstance(key, (str, int, float, bytes)):
                raise _RefusedError(f"a key of type {type(key).__name__}")

    def refuse(self) -> None:
        raise _RefusedError("a set, or an object of another class")

    dispatch = dict(pickle._Unpickler.dispatch) | {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.BUILD[0]: load_build,
    }
    for _code in (pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.INST):
        dispatch[_code[0]] = refuse
    for _code in (pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID):
        dispatch[_code[0]] = refuse


def _plain(x: Any, known: dict[int, Any]) -> Any:
    """The same with arrays in place of their stand-ins; what is named twice is one object still."""
    if id(x) in known:
        return known[id(x)]
    if isinstance(x, (dict, list)):
        known[id(x)] = y = type(x)()  # before what is in it, which may name it again
        if isinstance(x, dict):
            y.update((k, _plain(v, known)) for k, v in x.items())
        else:
            y.extend(_plain(v, known) for v in x)
    elif isinstance(x, tuple):
        y = tuple(_plain(v, known) for v in x)
    elif isinstance(x, _Array):
        y = x.value
    elif x is None or isinstance(x, (str, bytes, int, float, np.ndarray)):
        y = x
    else:
        raise _RefusedError(f"an object of type {type(x).__name__}")
    known[id(x)] = y
    return y


def load_pickle(path: Path) -> Any:
    """What a pickle of dicts, lists, tuples, strings, numbers and arrays holds. Errors: InputError for any other."""
    try:
        content = _Unpickler(Path(path).read_bytes()).load()
        return _plain(content, {})
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from e
    except _RefusedError as e:
        raise InputError(f"{path}: refused, it holds {e}; nothing of it was run") from e
    except Exception as e:  # a damaged pickle makes Python and NumPy raise nearly anything
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

    # A number takes a byte at least: more than that are the same ones named again and again.
    left = sum(path.stat().st_size for path in paths.values())
    features: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    label, speaker, conversation, split_of, names, utterances = [], [], [], [], [], []
    for s, (split, content) in enumerate(contents.items()):
        for vid in content.get("vids", content["text"]):
            rows = _conversation(paths[split], content, kinds, vid)
            for kind in kinds:
                features[kind] += rows[kind]
                left -= sum(map(len, rows[kind]))
            if left < 0:
                raise InputError(f"{paths[split]}: stands for more numbers than it has bytes; write each one out")
            U = len(rows["text"])
            label += rows["labels"]
            speaker += rows["speakers"]
            conversation += [len(names)] * U
            split_of += [s] * U
            names.append(f"{split} {vid}")
            utterances += [f"{split} {vid} {i}" for i in range(U)]

    label_names, label_index = _number(label, "class")
    speaker_names, speaker_index = _number(speaker, "speaker")
    for kind, rows in features.items():
        if len({len(x) for x in rows}) > 1:
            i = next(i for i, x in enumerate(rows) if len(x) != len(rows[0]))
            raise InputError(
                f"{folder}: field {kind!r}: {utterances[i]} has {len(rows[i])} numbers, the first {len(rows[0])}"
            )
    columns = {"label": label_index, "speaker": speaker_index, "conversation": conversation, "split": split_of}
    tensors = {kind: torch.from_numpy(np.stack(rows)) for kind, rows in features.items()}
    tensors |= {name: torch.tensor(x) for name, x in columns.items()}
    all_names = {"label_names": label_names, "speaker_names": speaker_names}
    all_names |= {"conversation_names": names, "utterance_names": utterances}
    return check_features(folder, tensors, all_names)


def _check_fields(path: Path, content: Any) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a dict of fields, got {type(content).__name__}")
    for field in ("text", "labels", "speakers"):
        if field not in content:
            raise InputError(f"{path}: field {field!r} is missing; it has {', '.join(map(_show, content)) or 'none'}")
    for field in (*KINDS, "labels", "speakers"):
        if field in content and not isinstance(content[field], dict):
            raise InputError(f"{path}: field {field!r} must be a dict of conversations")
    vids = content.get("vids", content["text"])
    if not isinstance(vids, (dict, list, tuple, np.ndarray)) or not len(vids):
        raise InputError(f"{path}: field 'vids' must name the conversations, got {_show(vids)}")
    if odd := [vid for vid in vids if not isinstance(vid, (str, int, float, np.generic))]:
        raise InputError(f"{path}: field 'vids': a conversation is named by text or a number, not {_show(odd[0])}")


def _conversation(path: Path, content: dict, kinds: list[str], vid: Any) -> dict[str, list]:
    """One conversation: arrays [d] float32 per utterance for each kind; numbers or strings for labels and speakers."""
    rows: dict[str, list] = {}
    for field in (*kinds, "labels", "speakers"):
        where = f"{path}: field {field!r}: conversation {_show(vid)}"
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
    if isinstance(x, (list, tuple)) and len(x) == 1 and isinstance(x[0], (list, tuple, np.ndarray)):
        x = x[0]  # [1, d]
    if isinstance(x, (list, tuple)) and not all(isinstance(number, (int, float, np.generic)) for number in x):
        raise InputError(f"{where}: no vector of numbers")
    try:
        with np.errstate(over="ignore"):  # beyond float32: infinity, which check_features names
            vector = np.asarray(x, dtype=np.float32).squeeze()
    except (TypeError, ValueError, OverflowError) as e:
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
        raise InputError(f"{where}: wanted a number from 0 or a name, got {_show(x)}")
    return x


def _number(values: list[int | str], what: str) -> tuple[list[str], list[int]]:
    """Names and indices into them, in the order of the numbers or of the alphabet."""
    known = sorted(set(values), key=lambda x: (isinstance(x, str), x))
    index = {x: i for i, x in enumerate(known)}
    return [x if isinstance(x, str) else f"{what} {x}" for x in known], [index[x] for x in values]


def _show(x: Any) -> str:
    """For a message: a name or a small number as it is; of anything else, which may be endless, its type."""
    if isinstance(x, str):
        return repr(x[:40])
    return repr(x) if isinstance(x, (float, np.generic)) or isinstance(x, int) and abs(x) < 1e9 else type(x).__name__
