"""What both command lines share: output that any terminal takes, errors in one line, and the last line of defence.

Exit codes: 0; 1 for a bug of this program, with the traceback in a file; 2 for the user's error; 130 for Ctrl-C; 141 if
nobody reads the output any more.
"""

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from data import InputError
from extras.runs import MARKER

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO}


def guard(program: str, work: Callable[[], None], folder: Path, stopped: str) -> int:
    """Does `work` and says in one line what went wrong. Returns the exit code.

    folder: of the run; it gets crash.txt. stopped: what to say after Ctrl-C.
    """
    open_streams()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # magtkd.py and predict.py set it for the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
        sys.stdout.flush()
        return 0
    except InputError as e:
        return say(f"{program}: {e}", 2)
    except KeyboardInterrupt:
        return say(stopped, 130)
    except torch.OutOfMemoryError as e:
        first = str(e).splitlines()[0]
        return say(f"{program}: the GPU's memory is full ({first}); try --gradient-checkpointing, or --device cpu", 2)
    except MemoryError as e:
        return say(f"{program}: the memory is full ({e or 'no more is to be had'}); try --workers 1", 2)
    except OSError as e:
        if output_is_broken():
            return 141 if isinstance(e, BrokenPipeError) else say(f"{program}: standard output: {e.strerror}", 2)
        if e.errno in DISK:
            advice = "free some space or give another folder with --out. What is whole stays"
            return say(f"{program}: {e.filename or folder}: {e.strerror}; {advice}", 2)
        if e.filename is not None and e.errno is not None:
            return say(f"{program}: {e.filename}: {e.strerror}; look at it, move it away or delete it", 2)
        return report_bug(program, e, folder)
    except Exception as e:
        return report_bug(program, e, folder)


def open_streams() -> None:
    """Makes standard input, output and error usable whatever they are: closed, or of few letters."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the run's next file would be standard output
        pass
    os.close(fd)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # somebody has read from it already
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def say(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(one_line(message), file=sys.stderr, flush=True)
    return code


def one_line(message: str) -> str:
    """Notes of a corpus may follow in lines of their own, indented; any other end of a line becomes a blank."""
    return re.sub(r"[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+(?!  )", " ", message).strip()


def output_is_broken() -> bool:
    """Whether standard output takes no more. It then leads to nowhere, so that Python's end does not complain."""
    try:
        sys.stdout.flush()
        return False
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def report_bug(program: str, error: Exception, folder: Path) -> int:
    """Keeps the traceback in the run's crash.txt; in a temporary file, if the folder is not a run's or is full."""
    text = f"{' '.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        if not (folder / MARKER).is_file():
            raise FileNotFoundError(folder)
        path = folder / "crash.txt"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        try:
            handle, path = tempfile.mkstemp(prefix=f"{program}-", suffix="-crash.txt")
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as f:
                f.write(text)
        except OSError:
            path = "(nowhere: no file can be written)"
    what = f"{type(error).__name__}: {error}"[:200]
    return say(f"{program}: a bug of this program ({what}). Please report it; the traceback is in {path}", 1)


def device(name: str) -> str:
    """For argparse: a device that torch has here."""
    if name == "cpu":
        return name
    if not (m := re.fullmatch(r"cuda(:(\d{1,3}))?", name)):
        raise argparse.ArgumentTypeError(f"{name!r} is none of cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{name}: torch sees no CUDA here; use cpu")
    if int(m[2] or 0) >= (count := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"{name}: torch sees {count} GPU{'s' * (count > 1)} here, counted from 0")
    return name


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """For argparse: a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"wants {what} from {low:,} to {high:,}, not {text[:40]!r}")
        return value

    return parse


def check_paths(out: Path, inputs: dict[str, Path | None]) -> None:
    """Errors: InputError if `out` is an input, lies in one, or holds one: writing there could damage it.

    inputs: by the name of their option.
    """
    folder = Path(os.path.realpath(out))  # Path.resolve raises on links that lead to themselves
    for option, path in inputs.items():
        if path is not None and (path := Path(os.path.realpath(path))).exists():
            if path == folder or path in folder.parents or folder in path.parents:
                how = "is" if path == folder else "lies in" if path in folder.parents else "holds"
                raise InputError(f"--out {out} {how} {option} {path}, which this run only reads; give another --out")
