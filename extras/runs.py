"""A run's folder: one owner at a time, one configuration, and nothing in it that is not whole.

Not here: what is in the files (data.py, report.py).
"""

import fcntl
import json
import shutil
from pathlib import Path

from data import InputError, replace_file


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
    replace_file(path, lambda part: part.write_text(json.dumps(config, indent=2)))
    return lock
