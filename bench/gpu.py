"""What the CUDA side does, in one command: `python -m bench.gpu`, within 8 minutes on one card.

    python -m bench.gpu                       results to bench/results/gpu/<card>.json and .md (.png with matplotlib)
    python -m bench.gpu --only "stage 2"      one part of it
    python -m bench.gpu --device cpu --toy    every part at toy size on a CPU: does it run? Times: not measured

It needs torch, torchvision, torchaudio, transformers, numpy, safetensors and tqdm. What needs more is skipped, and a
row says so. Each result is written as soon as it is there: a run cut short keeps what it has. Exit code 1 if a
comparison failed or a part broke.

gpu_correctness.py  CUDA against the CPU; a kill and a second start
gpu_stage2.py       a step and an epoch of stage 2, the ways to attend
gpu_encoders.py     the encoders at full size; what the data path delivers
gpu_grid.py         the benchmark's grid
gpu_hours.py        hours of the whole recipe, from these
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.bare import OPTIONAL, missing_package
from data import replace_file
from extras import machine

RESULTS = Path(__file__).parent / "results" / "gpu"
NOT_MEASURED = "not measured"


class OutOfTime(Exception):
    """The minutes of the whole run are over."""


class Bench:
    """The run: its device, its size, its clock, and its rows of results, which are on disk at any moment."""

    def __init__(self, device: torch.device, toy: bool, out: Path, minutes: float):
        self.device, self.toy, self.out = device, toy, out
        self.begun, self.minutes = time.monotonic(), minutes
        self.cuda = device.type == "cuda"
        self.part = ""
        self.rows: list[dict] = []
        self.environment = environment(device, toy)
        self.write()

    def row(self, name: str, **facts: Any) -> dict:
        """Keeps and prints a result. Errors: OutOfTime, after it is kept."""
        row = {"part": self.part, "name": name, **facts}
        self.rows.append(row)
        self.write()
        print(as_line(row), flush=True)
        if time.monotonic() - self.begun > 60 * self.minutes:
            raise OutOfTime
        return row

    def write(self) -> None:
        text = json.dumps({"environment": self.environment, "rows": self.rows}, indent=1) + "\n"
        self.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.out, lambda part: part.write_text(text))

    def seconds(self, run: Callable[[], Any], rounds: int = 5, warmup: int = 2) -> float | str:
        """The median time of `run`, until its work on the card is done. Toy: runs it once, and measures nothing."""
        if self.toy:
            run()
            return NOT_MEASURED
        times = []
        for _ in range(warmup + rounds):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[warmup:])

    def peak(self, run: Callable[[], Any]) -> tuple[int | str, int | str]:
        """Bytes that `run` takes at most: of tensors, what was there before included; and reserved by torch."""
        if not self.cuda:
            run()
            return NOT_MEASURED, NOT_MEASURED
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def found(self, part: str, **facts: Any) -> list[dict]:
        """The rows so far of a part with these facts."""
        return [r for r in self.rows if r["part"] == part and all(r.get(k) == v for k, v in facts.items())]


def environment(device: torch.device, toy: bool) -> dict:
    gpu = {}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        gpu = {"gpu": card.name, "gpu bytes": card.total_memory, "driver": machine.driver_version()}
    return {
        **gpu,
        "device": device.type,
        "toy": toy,
        "cpu cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "missing packages": [name for name in OPTIONAL if find_spec(name) is None],
    }


def as_line(row: dict) -> str:
    def value(x: Any) -> str:
        return f"{x:.4g}" if isinstance(x, float) else str(x)

    facts = ", ".join(f"{k} {value(x)}" for k, x in row.items() if k not in ("part", "name"))
    return f"{row['part']}: {row['name']}: {facts}"


def hours(bench: Bench) -> None:
    """Of the whole recipe, from the rows of the other parts."""
    from bench.gpu_hours import BATCH, Times, recipe, table
    from bench.gpu_stage2 import CORPORA

    steps = bench.found("encoders", name="step", checkpointing=False, batch=BATCH)
    step = {r["encoder"]: r["seconds"] for r in steps}
    encode = {r["encoder"]: r["seconds per utterance"] for r in bench.found("encoders", name="encoding")}
    decode = [r["seconds per utterance"] for r in bench.found("data path", name="decoding")]
    decode = decode[0] if decode and isinstance(decode[0], float) else None
    for corpus in CORPORA:
        epochs = [r.get("seconds of an epoch") for r in bench.found("stage 2", way="as it stands", corpus=corpus.name)]
        numbers = [*step.values(), *encode.values(), *epochs]
        if len(step) < 3 or not epochs or not all(isinstance(x, float) for x in numbers):
            bench.row(f"the recipe on {corpus.name}", result=NOT_MEASURED)
            continue
        lines = table(recipe(corpus.utterances(), Times(step, encode, epochs[0], decode)))
        bench.row(f"the recipe on {corpus.name}", arithmetic=lines)


def parts() -> dict[str, Callable[[Bench], None]]:
    from bench import gpu_correctness, gpu_encoders, gpu_grid, gpu_stage2

    return {
        "correctness": gpu_correctness.measure,
        "stage 2": gpu_stage2.measure,
        "encoders": gpu_encoders.measure,
        "data path": gpu_encoders.measure_data_path,
        "grid": gpu_grid.measure,
    }


def run_parts(bench: Bench, wanted: dict[str, Callable[[Bench], None]]) -> bool:
    """Whether nothing broke and every comparison held. A part that fails costs the others nothing."""
    whole = True
    for bench.part, measure in wanted.items():
        start = time.monotonic()
        try:
            if start - bench.begun > 60 * bench.minutes:
                raise OutOfTime
            measure(bench)
        except OutOfTime:
            note(bench, result=NOT_MEASURED, why=f"the {bench.minutes:g} minutes were over")
        except Exception as e:  # kept as a row, printed, and the exit code says it
            if package := missing_package(e):
                note(bench, result=NOT_MEASURED, why=f"{package} is missing on this machine")
                continue
            traceback.print_exc()
            note(bench, result="broken", why=f"{type(e).__name__}: {e}".splitlines()[0][:300])
            whole = False
        print(f"{bench.part}: {time.monotonic() - start:.0f} s", flush=True)
    return whole and all(r.get("equal", True) for r in bench.rows)


def note(bench: Bench, **facts: Any) -> None:
    """A row about the part itself; time does not matter to it."""
    row = {"part": bench.part, "name": "rest of the part", **facts}
    bench.rows.append(row)
    bench.write()
    print(as_line(row), flush=True)


def markdown(bench: Bench) -> str:
    """The rows as a table, and the arithmetic of the hours."""
    about = ", ".join(f"{k}: {v}" for k, v in bench.environment.items())
    text = [f"Made by `python -m bench.gpu`. {about}", "", "| part | what | result |", "|---|---|---|"]
    for row in bench.rows:
        facts = as_line(row).removeprefix(f"{row['part']}: {row['name']}: ")
        text.append(f"| {row['part']} | {row['name']} | {facts if 'arithmetic' not in row else 'below'} |")
    for row in bench.rows:
        if "arithmetic" in row:
            text += ["", f"## {row['name']}", "", *(f"- {line}" for line in row["arithmetic"])]
    return "\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if a comparison failed or a part broke; 2 without a usable GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--toy", action="store_true", help="every part at toy size; no time is measured")
    parser.add_argument("--minutes", type=float, default=8.0, help="then the rest is left out (default: 8)")
    parser.add_argument("--only", help="one part")
    parser.add_argument("--out", type=Path, help="a .json file (default: results/gpu/<card>.json)")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.toy:
        parser.error("--device cpu needs --toy: these sizes are a GPU's")
    if args.device == "cuda" and not torch.cuda.is_available():
        print(machine.useless_gpu() or "no CUDA GPU here; --device cpu --toy tries every part", file=sys.stderr)
        return 2
    wanted = parts()
    if args.only:
        if args.only not in wanted:
            parser.error(f"--only wants one of {', '.join(wanted)}")
        wanted = {args.only: wanted[args.only]}
    device = torch.device(args.device)
    name = "toy" if args.toy else torch.cuda.get_device_name().replace("NVIDIA", "").strip().replace(" ", "-").lower()
    bench = Bench(device, args.toy, args.out or RESULTS / f"{name}.json", args.minutes)
    whole = run_parts(bench, wanted)
    bench.part, bench.minutes = "hours", float("inf")
    hours(bench)
    bench.out.with_suffix(".md").write_text(markdown(bench))
    figure(bench)
    print(f"{bench.out}: {len(bench.rows)} rows{'' if whole else ', and something is wrong: see above'}")
    return 0 if whole else 1


def figure(bench: Bench) -> None:
    """Utterances per second of stage 2, a bar per way; where matplotlib and measured times are at hand."""
    speeds = {
        (r["corpus"], r["way"]): r["utterances"] / r["seconds of a step"]
        for r in bench.found("stage 2", name="step")
        if isinstance(r["seconds of a step"], float)
    }
    if not speeds or find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(corpus for corpus, _ in speeds))
    fig, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 3.5), layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], names):
        bars = {way: speed for (corpus, way), speed in speeds.items() if corpus == name}
        ax.barh(list(bars), list(bars.values()), color="white", edgecolor="black")
        ax.invert_yaxis()
        ax.set_xlabel(f"{name}: utterances per second of a step")
    fig.savefig(bench.out.with_suffix(".png"), dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    sys.exit(main())
