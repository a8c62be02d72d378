"""Reading features of one's own: a feature file, or the columns of the authors' pickles, with the same checks.

Not here: writing them (data.py); the pickles themselves (pickles.py).
"""

import json
import unicodedata
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from data import KINDS, NAMES, ROWS, SPLITS, FeatureFile, InputError

MOST_CLASSES = 100  # a confusion matrix of more is no figure
LARGEST = 1e6  # of a feature: the squares of larger ones leave float32


def read_features(path: Path) -> FeatureFile:
    """Reads and checks a feature file. Errors: InputError that names the field at fault."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except Exception as e:  # a damaged header makes safetensors and torch raise nearly anything
        raise InputError(f"{path}: not a readable feature file ({e}); the README says what it holds") from e
    names = {}
    for field in (*NAMES, "split_names"):
        try:
            names[field] = json.loads(metadata[field])
        except (KeyError, ValueError, RecursionError) as e:
            raise InputError(f"{path}: field {field!r} must be in the metadata, as a JSON list of names") from e
    if names.pop("split_names") != list(SPLITS):
        raise InputError(f"{path}: field 'split_names' must be {list(SPLITS)}")
    return check_features(path, tensors, names)


def check_features(path: Path, tensors: dict[str, Tensor], names: dict[str, list[str]]) -> FeatureFile:
    """A feature file from its columns and its lists of names. Errors: InputError that names the field at fault."""

    def bad(field: str, what: str) -> InputError:
        return InputError(f"{path}: field {field!r} {what}")

    for field, known in names.items():
        if not isinstance(known, list) or not all(isinstance(x, str) and x.strip() and _is_text(x) for x in known):
            raise bad(field, "must be a list of names, each of them text and not empty")
        if len(set(known)) < len(known):
            raise bad(field, f"holds the name {next(x for x in known if known.count(x) > 1)[:60]!r} twice")
    if not 2 <= len(names["label_names"]) <= MOST_CLASSES:
        raise bad("label_names", f"must name 2 to {MOST_CLASSES} classes, got {len(names['label_names'])}")
    if "text" not in tensors:
        raise bad("text", "is missing; MAGT's last anchor is text, the other modalities may be absent")
    N, rows = len(names["utterance_names"]), {}
    for field in ROWS:
        x, known = tensors.get(field), names.get(f"{field}_names", SPLITS)
        if x is None or x.shape != (N,) or x.dtype != torch.int64:
            got = "nothing" if x is None else f"{x.dtype} {list(x.shape)}"
            raise bad(field, f"must be int64 [{N}], one per utterance name; got {got}")
        if len(out := ((x < 0) | (x >= len(known))).nonzero()):
            raise bad(field, f"must be 0 to {len(known) - 1}; row {int(out[0])} has {int(x[out[0]])}")
        rows[field] = x
    if missing := [s for i, s in enumerate(SPLITS) if not (rows["split"] == i).any()]:
        raise bad("split", f"has no utterance in {', '.join(missing)}")
    starts = torch.cat((torch.tensor([True]), rows["conversation"].diff() != 0))
    if starts.sum() != len(rows["conversation"].unique()):
        raise bad("conversation", "must hold the utterances of a conversation together, in the order of speaking")
    if (rows["split"].diff() != 0).logical_and(~starts[1:]).any():
        raise bad("split", "must not change within a conversation")

    features, present = {}, {}
    for kind in (k for k in KINDS if k in tensors):
        x = tensors[kind]
        if x.dim() != 2 or len(x) != N or not x.shape[1] or not x.is_floating_point():
            raise bad(kind, f"must be float32 [{N}, d]; got {x.dtype} {list(x.shape)}")
        x = x.float()
        absent = x.isnan().all(dim=1)  # a whole row of NaN: the utterance does not have it
        if len(broken := (~(x.abs() <= LARGEST).all(dim=1) & ~absent).nonzero()):
            i = int(broken[0])
            what = f"a number beyond {LARGEST:g}" if x[i].isfinite().all() else "NaN or infinity"
            raise bad(kind, f"has {what} inside row {i}, {names['utterance_names'][i]!r} (a missing one is all NaN)")
        if not absent.all():  # nobody has it: as if the field were not there
            features[kind], present[kind] = x.masked_fill(absent[:, None], 0.0), ~absent
    if "text" not in features:
        raise bad("text", "is NaN throughout")
    return FeatureFile(features, present, **rows, **names)


def _is_text(name: str) -> bool:
    """Neither half a character (a lone surrogate) nor a control character: both would break tables and figures."""
    return not any(unicodedata.category(x) in ("Cs", "Cc", "Zl", "Zp") for x in name)
