"""The feature file: every utterance's vectors, which stage 1 leaves and stage 2 reads.

One safetensors file, so that people can bring vectors of their own; the README documents the format. `read_features`
checks what it is given and names the field at fault.

Not here: how the vectors are made (encoders.py) or used (fusion.py).
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import SPLITS, InputError

KINDS = ("text", "audio", "video", "audio_kd", "video_kd")  # of vectors; _kd: from an encoder distilled from text


@dataclass
class Features:
    """Every utterance's vectors. Rows are utterances in the order of speaking, those of a conversation together."""

    vectors: dict[str, Tensor]  # kind -> [N, d_m] float32; kinds are KINDS, "text" always there
    present: dict[str, Tensor]  # kind -> [N] bool; False: the utterance lacks it, its vector is zero
    label: Tensor  # [N] int64
    speaker: Tensor  # [N] int64
    conversation: Tensor  # [N] int64
    split: Tensor  # [N] int64, index into SPLITS
    label_names: list[str]
    speaker_names: list[str]
    conversation_names: list[str]
    utterance_names: list[str]


def write_features(path: Path, features: Features) -> None:
    """Writes the format of the README, NaN where a vector is missing; whole or not at all."""
    missing = torch.tensor(float("nan"))
    tensors = {
        kind: torch.where(features.present[kind][:, None], x, missing).contiguous()
        for kind, x in features.vectors.items()
    }
    tensors |= {name: getattr(features, name) for name in ("label", "speaker", "conversation", "split")}
    lists = ("label_names", "speaker_names", "conversation_names", "utterance_names")
    metadata = {name: json.dumps(getattr(features, name)) for name in lists} | {"split_names": json.dumps(SPLITS)}
    temporary = Path(f"{path}.part")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)


def read_features(path: Path) -> Features:
    """Reads and checks a feature file. Errors: InputError that names the field at fault."""
    try:
        with safe_open(path, framework="pt") as f:
            tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: not a readable feature file ({e}); the README says what it holds") from e

    def bad(field: str, what: str) -> InputError:
        return InputError(f"{path}: field {field!r} {what}")

    names = {}
    for field in ("label_names", "speaker_names", "conversation_names", "utterance_names", "split_names"):
        try:
            names[field] = json.loads(metadata[field])
        except (KeyError, json.JSONDecodeError) as e:
            raise bad(field, "must be in the metadata, as a JSON list of names") from e
    if tuple(names.pop("split_names")) != SPLITS:
        raise bad("split_names", f"must be {list(SPLITS)}")
    if "text" not in tensors:
        raise bad("text", "is missing; MAGT's last anchor is text, the other modalities may be absent")
    N = len(names["utterance_names"])
    rows = {}
    sizes = {"label": "label_names", "speaker": "speaker_names", "conversation": "conversation_names", "split": None}
    for field, list_name in sizes.items():
        if field not in tensors or tensors[field].shape != (N,) or tensors[field].dtype != torch.int64:
            got = f"{tensors[field].dtype} {list(tensors[field].shape)}" if field in tensors else "nothing"
            raise bad(field, f"must be int64 [{N}], one per utterance name; got {got}")
        most = len(names[list_name]) if list_name else len(SPLITS)
        if N and not (0 <= tensors[field].min() and tensors[field].max() < most):
            where = int(((tensors[field] < 0) | (tensors[field] >= most)).nonzero()[0])
            raise bad(field, f"must be 0 to {most - 1}; row {where} has {int(tensors[field][where])}")
        rows[field] = tensors[field]
    if lacking := [s for i, s in enumerate(SPLITS) if not (rows["split"] == i).any()]:
        raise bad("split", f"has no utterance in {', '.join(lacking)}")
    starts = torch.cat((torch.tensor([True]), rows["conversation"].diff() != 0))
    if starts.sum() != len(rows["conversation"].unique()):
        raise bad("conversation", "must hold the utterances of a conversation together, in the order of speaking")
    if (rows["split"].diff() != 0).logical_and(~starts[1:]).any():
        raise bad("split", "must not change within a conversation")

    vectors, present = {}, {}
    for kind in (k for k in KINDS if k in tensors):
        x = tensors[kind]
        if x.dim() != 2 or len(x) != N or not x.shape[1] or not x.is_floating_point():
            raise bad(kind, f"must be float32 [{N}, d]; got {x.dtype} {list(x.shape)}")
        absent = x.isnan().all(dim=1)  # a whole row of NaN: the utterance lacks it
        if (broken := ~x.isfinite().all(dim=1) & ~absent).any():
            raise bad(kind, f"has NaN or infinity inside row {int(broken.nonzero()[0])} (a missing one is all NaN)")
        if not absent.all():  # nobody has it: as if the field were not there
            vectors[kind], present[kind] = x.float().masked_fill(absent[:, None], 0.0), ~absent
    if "text" not in vectors:
        raise bad("text", "is NaN throughout")
    return Features(vectors, present, **rows, **names)
