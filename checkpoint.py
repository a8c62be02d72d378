"""What a run leaves on disk, and how a second start finds it: whole files only, one owner, one configuration.

Not here: what is in the files (features.py, report.py), and the training that makes them (magtkd.py).
"""

import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import InputError


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file under a temporary name, then moves it: there is never half a file under its name."""
    part = Path(f"{path}.part")
    write(part)
    os.replace(part, path)


def save(path: Path, parts: dict[str, Any], epoch: int, best: dict) -> None:
    """Keeps a training's state after an epoch; the one before survives until the new one is whole.

    parts: whatever has a state_dict: model, optimizer, schedule, scaler. best: what the loop knows of its best epoch.
    """
    state = {"parts": {name: part.state_dict() for name, part in parts.items()}, "epoch": epoch, "best": best}
    replace(path, lambda part: torch.save(state, part))


def load(path: Path, parts: dict[str, Any]) -> tuple[int, dict] | None:
    """Puts the parts into the state that `save` kept; returns (epoch, best), or None if nothing was kept.

    Errors: InputError for a file that `save` did not write, or wrote for another model.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return state["epoch"], state["best"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as e:
        raise InputError(
            f"{path}: not a checkpoint of this program ({e}); delete it, or start again with --fresh"
        ) from e


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights, on the CPU."""
    return {name: x.detach().to("cpu", copy=True) for name, x in model.state_dict().items()}


def log(out: Path, device: torch.device, **entry) -> None:
    """Appends a line to out/log.jsonl: what an epoch was like; with the memory it took, in bytes."""
    if device.type == "cuda":
        entry["gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    entry["process_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the largest so far
    with open(out / "log.jsonl", "a") as f:
        f.write(json.dumps(entry) + "\n")


def seed_everything(*parts: int | str) -> None:
    """Seeds Python, NumPy (SpecAugment draws from it) and torch from a run's seed, a model's name and an epoch.

    Called at the start of every epoch, it makes the random state a function of (seed, model, epoch): a resumed run
    draws what an undisturbed one would have drawn, and no generator's state needs to be kept.
    """
    seed = zlib.crc32(json.dumps(parts).encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def open_run(out: Path, config: dict, fresh: bool):
    """Makes or reopens a run's folder and locks it. Returns the lock: keep it as long as the run lives.

    Errors: InputError if another process runs in it, or if it was begun with another configuration.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as e:
        raise InputError(f"{out}: cannot be written ({e.strerror}); give another folder with --out") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(
            f"{out}: another run is at work in this folder; wait for it, or give another one with --out"
        ) from e
    path = out / "config.json"
    if fresh:
        if not path.exists() and any(entry.name != ".lock" for entry in out.iterdir()):
            raise InputError(f"{out}: not the folder of a run (no config.json in it), so --fresh will not empty it")
        for entry in out.iterdir():
            if entry.name != ".lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    elif path.exists():
        try:
            before = json.loads(path.read_text())
        except json.JSONDecodeError as e:
            raise InputError(f"{path}: not a configuration; start again with --fresh") from e
        changes = [
            f"{key}: {before.get(key)} there, {config.get(key)} now"
            for key in sorted(before.keys() | config.keys())
            if before.get(key) != config.get(key)
        ]
        if changes:
            raise InputError(
                f"{out} was begun with another configuration ({'; '.join(changes)}). Give the same options to go on, "
                "another folder with --out, or --fresh to delete what is there."
            )
    replace(path, lambda part: part.write_text(json.dumps(config, indent=2)))
    return lock
