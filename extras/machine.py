"""What a run should know of its machine first: a GPU that torch cannot use, and hours that would be weeks on a CPU.

Not here: what ran where, for the report (report.py); the measurements on a GPU (bench/gpu.py).
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

DRIVERS = {11: 450, 12: 525, 13: 580}  # CUDA of a build of torch: NVIDIA's first driver that runs it
WATCHED = 3  # steps that are timed; the one before them warms up


def choose(given: str | None) -> str:
    """The device of a run: the given one, or the GPU, or the CPU with a line on stderr if there is a useless GPU."""
    if given is not None:
        return given
    if torch.cuda.is_available():
        return "cuda"
    if line := useless_gpu():
        print(line, file=sys.stderr, flush=True)
    return "cpu"


def useless_gpu() -> str:
    """A line about a GPU that is there and that torch cannot use, and what to do; "" where there is none."""
    driver = driver_version()
    if driver is None or torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    head = f"an NVIDIA GPU is here (driver {driver}), and torch {torch.__version__} cannot use it: "
    release = torch.__version__.split("+")[0]
    other = (
        f"install torch {release} for another CUDA into a Python of your own (pip install torch=={release} torchvision "
        "torchaudio --index-url https://download.pytorch.org/whl/cu126, then the rest of requirements.txt) and start "
        "with PYTHON=/path/to/python bash run.sh .."
    )
    tail = "This run uses the CPU (--device cpu says that you mean it)"
    if torch.version.cuda is None:
        return f"{head}it is a build without CUDA. {other[0].upper()}{other[1:]}. {tail}"
    needed = DRIVERS.get(int(torch.version.cuda.split(".")[0]))
    if needed and int(driver.split(".")[0]) < needed:
        why = f"it is built for CUDA {torch.version.cuda}, which wants driver {needed} or newer. Update the driver, or"
        return f"{head}{why} {other}. {tail}"
    why = f"its CUDA {torch.version.cuda} should run with that driver. Look at what `nvidia-smi` says, and whether"
    return f"{head}{why} this user or container may open /dev/nvidia0. {tail}"


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Of the NVIDIA driver that runs here, such as "535.183.01"; None without one."""
    if file.exists():
        found = re.search(r"Kernel Module[^\d]*(?:for \S+\s+)?(\d+(?:\.\d+)+)", file.read_text(errors="replace"))
        if found:
            return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None  # no such program, or a driver that does not answer
    found = re.match(r"\d+(\.\d+)+", said)
    return found[0] if found else None


def warn_of_days(names: list[str], steps: int, say: Callable[[str], None] | None = None) -> None:
    """Says that full-size encoders on a CPU take long; how long, after the first steps of the first of them.

    names: encoders to be trained. steps: optimiser steps of each. Call it only where the user did not ask for the CPU.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    if not names:
        return
    say(
        f"full-size encoders on a CPU: {len(names)} x {steps:,} optimiser steps are meant for a GPU and may take weeks "
        "here. An estimate follows after the first steps; --device cpu says that you mean it, --encoders tiny is small"
    )
    times = []

    def watch(optimizer, args, kwargs) -> None:
        if len(times) > WATCHED:  # it stays: torch cannot lose a hook while it calls them
            return
        times.append(time.perf_counter())
        if len(times) == 1 + WATCHED:
            say(estimate(names, steps, (times[-1] - times[0]) / WATCHED))

    register_optimizer_step_post_hook(watch)


def estimate(names: list[str], steps: int, seconds: float) -> str:
    """A line: how long `steps` steps of `seconds` each are, for the first of the encoders."""
    hours = steps * seconds / 3600
    time_ = f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"
    rest = f"; {len(names) - 1} more follow" if len(names) > 1 else ""
    return f"{names[0]}: {seconds:.1f} s a step, {steps:,} steps: about {time_} for this encoder on this CPU{rest}"
