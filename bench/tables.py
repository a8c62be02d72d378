"""results/<machine>.json as text: the verdicts for the terminal, and everything as results/<machine>.md.

Numbers come from the JSON only; what the machine did not measure reads "not measured".
"""

import json
import math
import re
from pathlib import Path

from bench.grid import COUNTED, FRAMES, MAGT_, MATCHED, PUBLISHED, PUBLISHED_FRAMES, TIMED, UTTERANCES
from bench.modes import MODES, STAGE2_MODES
from bench.verdicts import per_utterance, select, verdicts

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"


def results_path(environment: dict) -> Path:
    """cpu.json, or by the GPU's name: "NVIDIA H200" gives h200.json."""
    if environment["device"] == "cpu":
        return RESULTS / "cpu.json"
    name = environment["gpu"].lower().removeprefix("nvidia ")
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', name).strip('-')}.json"


def load(path: Path) -> tuple[dict, list[dict]]:
    """Environment and rows."""
    results = json.loads(path.read_text())
    return results["environment"], results["rows"]


def where(environment: dict) -> str:
    """One line: what has to stand beside every number."""
    facts = {k: v for k, v in environment.items() if k not in ("device", "gemm_flops_per_s")}
    rates = environment["gemm_flops_per_s"].items()
    facts["GFLOP/s of matrix products"] = ", ".join(f"{rate / 1e9:,.0f} ({name})" for name, rate in rates)
    return f"Measured on {environment['device']}; " + ", ".join(f"{k}: {v}" for k, v in facts.items())


def verdict_text(path: Path) -> str:
    """For the terminal."""
    environment, rows = load(path)
    lines = [where(environment), "A multiply-add is 2 FLOPs.", ""]
    for claim, measured, verdict in verdicts(rows):
        lines += [f"* {claim}", f"    {measured}", f"    -> {verdict}"]
    return "\n".join(lines)


def markdown(path: Path) -> str:
    """The whole report."""
    environment, rows = load(path)
    head = (
        f"{where(environment)}.\n\n"
        "Made by `pytest bench/ --benchmark-only`, and again from the JSON by `python -m bench.plots`. A multiply-add "
        "is 2 FLOPs; FLOPs are those of the matrix products of a forward pass. Bytes are what autograd keeps for the "
        "backward pass. Times are medians, +- the interquartile range.\n"
    )
    sections = {
        "Verdicts on section 4.7": verdict_table(rows),
        "All FLOPs, MAGT over MulT matched": ratio_table(rows),
        "The grid": grid_table(rows),
        "Real conversations: an epoch of the training set in batches of 16 conversations": corpus_table(rows),
        "Losses, forward and backward": loss_table(rows),
        "Stage 2: a step on 16 conversations": stage2_table(rows),
        "Inference latency of one conversation": latency_table(rows),
        "The encoders, a batch of 4 utterances": encoder_table(rows),
    }
    parts = [f"# Benchmark results: {path.stem}\n", head, *(f"## {name}\n\n{text}" for name, text in sections.items())]
    return "\n".join(parts)


def table(head: list, rows: list[list], numbers: bool = True) -> str:
    """A Markdown table; all columns but the first are set to the right if they hold numbers."""
    lines = [head, ["---", *["--:" if numbers else "---"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def of_kind(rows: list[dict], kind: str, **facts) -> list[dict]:
    return [row for row in rows if row["kind"] == kind and all(row[k] == v for k, v in facts.items())]


def seconds(row: dict, by: int = 1) -> str:
    """Median and interquartile range in ms, divided by a number of samples."""
    middle, spread = 1e3 * row["seconds"] / by, 1e3 * row["seconds_iqr"] / by
    digits = max(0, 2 - math.floor(math.log10(middle)))  # three figures
    return f"{middle:,.{digits}f} +- {spread:,.{digits}f}"


def verdict_table(rows: list[dict]) -> str:
    return table(["claim or question", "measured", "verdict"], [list(v) for v in verdicts(rows)], numbers=False)


def ratio_table(rows: list[dict]) -> str:
    magt, mult = select(rows, "count", MAGT_), select(rows, "count", MATCHED)
    body = [[f"U = {U}", *(f"{magt[U]['flops'] / mult[L]['flops']:.4f}" for L in FRAMES)] for U in UTTERANCES]
    return table(["", *(f"L = {L}" for L in FRAMES)], body)


def grid_table(rows: list[dict]) -> str:
    head = [
        "case",
        "weights, M",
        "attention, MFLOP",
        "linear, MFLOP",
        "kept, MB",
        "kept if attention's weights are, MB",
    ]
    body = []
    for case in COUNTED:
        count, forward, step = (
            select(rows, kind, case.variant, case.width).get(case.length) for kind in ("count", "forward", "step")
        )
        keys = ("flops_attention", "flops_linear", "bytes", "bytes_unfused")
        line = [case, f"{count['params'] / 1e6:.2f}", *(f"{float(per_utterance(count, k)) / 1e6:,.3f}" for k in keys)]
        if case in TIMED:
            peak = f"{step['cuda_peak_bytes'] / 1e6:,.0f}" if "cuda_peak_bytes" in step else NOT_MEASURED
            line += [forward["samples"], seconds(forward, forward["samples"]), seconds(step), peak]
        else:
            line += ["counted only"] * 4
        body.append(line)
    text = (
        "FLOPs and bytes are per utterance. MAGT's conversations have U utterances, MulT's utterances L (or text/audio/"
        "video) frames. A timed call sees S utterances: fewer than 128 where a call would take too long. A step is "
        "forward, backward and AdamW; its cost per utterance falls with S, so it is given whole. The bytes are those "
        "of the CPU's kernels on every machine.\n\n"
    )
    return text + table([*head, "S", "forward, ms per utterance", "step on S, ms", "CUDA peak of a step, MB"], body)


def corpus_table(rows: list[dict]) -> str:
    body, mult = [], select(rows, "count", PUBLISHED)
    for corpus in dict.fromkeys(row["corpus"] for row in of_kind(rows, "corpus")):
        for padded, how in ((True, "padded attention"), (False, "attention per conversation")):
            (row,) = of_kind(rows, "corpus", corpus=corpus, padded=padded)
            body.append(
                [
                    f"{corpus}: MAGT, {how}",
                    f"{row['epoch_attention_rows'] / row['epoch_utterances']:.2f}",
                    f"{row['epoch_flops'] / 1e12:.3f}",
                    f"{row['epoch_flops_attention'] / row['epoch_flops']:.2%}",
                    f"{row['bytes'] / row['utterances'] / 1e6:.3f}",
                    seconds(row, row["utterances"]),
                ]
            )
        for name, lengths in PUBLISHED_FRAMES.items():
            count = mult[lengths]
            (forward,) = (r for n, r in select(rows, "forward", PUBLISHED).items() if n == lengths)
            flops = row["epoch_utterances"] * per_utterance(count, "flops")
            body.append(
                [
                    f"{corpus}: MulT as published, {name} {'/'.join(map(str, lengths))}",
                    "1.00",
                    f"{float(flops) / 1e12:.3f}",
                    f"{count['flops_attention'] / count['flops']:.2%}",
                    f"{float(per_utterance(count, 'bytes')) / 1e6:.3f}",
                    seconds(forward, forward["samples"]),
                ]
            )
    head = ["", "attention's rows per utterance", "TFLOP", "attention's share", "kept, MB per utterance"]
    text = (
        "Conversations have the corpora's own lengths; batches are at random, as in stage 2. Padded attention is one "
        "call per block, on the batch padded to its longest conversation; all other layers work without padding. Bytes "
        "and times are of the batch of median padded size. MulT's lengths are those of its own paper.\n\n"
    )
    return text + table([*head, "forward, ms per utterance"], body)


def loss_table(rows: list[dict]) -> str:
    losses = of_kind(rows, "loss")
    body = [[r["loss"], r["B"], f"{r['flops'] / 1e6:,.1f}", f"{r['bytes'] / 1e6:,.3f}", seconds(r)] for r in losses]
    return table(["loss", "B", "MFLOP", "kept, MB", "ms"], body)


def stage2_table(rows: list[dict]) -> str:
    body = []
    for corpus in dict.fromkeys(row["corpus"] for row in of_kind(rows, "stage2")):
        for mode in STAGE2_MODES:
            line = [NOT_MEASURED] * 5
            for r in of_kind(rows, "stage2", corpus=corpus, mode=mode):
                best, layers = max(r["gemm_flops_per_s"].values()), r["gemm_flops_per_s"]["layers"]
                shares = [f"{r['useful_flops'] / r['seconds'] / rate:.0%}" for rate in (best, layers)]
                line = [r["utterances"], seconds(r), f"{r['utterances'] / r['seconds']:,.0f}", *shares]
            body.append([f"{corpus}, {mode}", *line])
    text = (
        "Forward, Eq. 25 with the teacher detached, backward, clipping, AdamW, on a batch at random. eager: fusion.py "
        "as it stands, attention per conversation, float32; padded: likewise, with padded attention; bfloat16: as "
        "eager, under autocast, measured where the processor multiplies in it; torch.compile and CUDA graph: as eager, "
        "measured on CUDA. The shares count three forward passes without padding and without the losses' own products; "
        "of the rate of the machine's best float32 matrix product, and of products as large as MAGT's.\n\n"
    )
    return text + table(["", "utterances", "ms", "utterances/s", "share of the best rate", "of its own sizes'"], body)


def latency_table(rows: list[dict]) -> str:
    body = []
    for U in dict.fromkeys(row["U"] for row in of_kind(rows, "latency")):
        found = {r["mode"]: seconds(r) for r in of_kind(rows, "latency", U=U)}
        body.append([f"U = {U}", *(found.get(mode, NOT_MEASURED) for mode in MODES)])
    return table(["", *(f"{mode}, ms" for mode in MODES)], body)


def encoder_table(rows: list[dict]) -> str:
    body = []
    for r in of_kind(rows, "encoder count"):
        steps = [seconds(step) for step in of_kind(rows, "encoder step", encoder=r["encoder"])]
        numbers = f"{r['params'] / 1e6:.1f}", f"{r['flops'] / 1e9:,.0f}", f"{r['bytes'] / 1e9:.2f}"
        body.append([r["encoder"], *numbers, *(steps or [NOT_MEASURED])])
    text = "Published sizes, random weights. The bytes are those of attention with its weights stored.\n\n"
    return text + table(["encoder", "weights, M", "GFLOP", "kept, GB", "step, ms"], body)
