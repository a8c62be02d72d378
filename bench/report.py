"""Numbers, tables and the figure, from results/<device>.json; `python -m bench.report` makes .md and .png again.

Ratios are over MAGT over utterances at U = 64, per utterance: above 1, MAGT over utterances costs less. A time ratio is
the median over the rounds, each of which times both; in brackets the range of the rounds, which is a 94 % interval of
the median.
"""

import json
import math
import re
import statistics
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from bench import cases
from bench.cases import FRAME_MODELS, FRAMES, MAGT_L, MAGT_U, REFERENCE, UTTERANCES, WIDTHS, Case

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured"


def results_path(environment: dict) -> Path:
    """cpu.json, or by the GPU's name: "NVIDIA H200" gives h200.json."""
    if environment["device"] == "cpu":
        return RESULTS / "cpu.json"
    name = environment["gpu"].lower().removeprefix("nvidia ")
    return RESULTS / f"{re.sub('[^a-z0-9]+', '-', name).strip('-')}.json"


def save(path: Path, environment: dict, rows: list[dict]) -> None:
    """Writes .json (a line per row), .md and .png."""
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"environment": {json.dumps(environment, indent=1)},\n"rows": [\n{lines}\n]}}\n')
    render(path)


def render(path: Path) -> None:
    environment, rows = load(path)
    path.with_suffix(".md").write_text(markdown(environment, rows))
    figure(environment, rows, path.with_suffix(".png"))


def load(path: Path) -> tuple[dict, list[dict]]:
    """Environment and rows; lengths of text/audio/video as tuples."""
    results = json.loads(path.read_text())
    for row in results["rows"]:
        if isinstance(row.get("length"), list):
            row["length"] = tuple(row["length"])
    return results["environment"], results["rows"]


def select(rows: list[dict], kind: str, model: str) -> dict:
    """{length: row} of a model."""
    return {row["length"]: row for row in rows if (row["kind"], row.get("model")) == (kind, model)}


MEASURES = {  # name -> kind and key of a row, unit
    "attention FLOPs": ("count", "flops_attention", "M"),
    "all FLOPs": ("count", "flops", "M"),
    "inference, time": ("inference", "seconds", "ms"),
    "inference, peak": ("inference", "peak_bytes", "MB"),
    "training, time": ("training", "seconds", "ms"),
    "training, bytes kept": ("count", "bytes", "MB"),
    "kept without dropout": ("count", "bytes_no_dropout", "MB"),
    "kept if attention is not fused": ("count", "bytes_unfused", "MB"),
}
UNITS = {"M": 1e6, "ms": 1e-3, "MB": 1e6}


def per_utterance(row: dict, key: str) -> Fraction | float:
    """Exact for counts; for "seconds" the median over the rounds."""
    if key == "seconds":
        return statistics.median(row["seconds"]) / row["samples"]
    return Fraction(row[key], row["samples"])


class Ratio(NamedTuple):
    """Median over the rounds, lowest and highest; three equal numbers for what is counted."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g}" + (f" ({self.low:.3g} to {self.high:.3g})" if self.low < self.high else "")


def ratio(rows: list[dict], model: str, length: int | tuple, measure: str) -> Ratio:
    """The model's cost over that of the reference, per utterance."""
    kind, key, _ = MEASURES[measure]
    row, base = select(rows, kind, model)[length], select(rows, kind, MAGT_U)[REFERENCE.length]
    if key != "seconds":
        return Ratio(*[float(per_utterance(row, key) / per_utterance(base, key))] * 3)
    pairs = zip(row["seconds"], row["reference_seconds"])
    found = [a / row["samples"] / (b / row["reference_samples"]) for a, b in pairs]
    return Ratio(statistics.median(found), min(found), max(found))


def crossing(ratios: dict[int, float]) -> float:
    """The L where the ratio rises to 1, between measured lengths on log axes; 0 below the first, inf above the last."""
    points = sorted(ratios.items())
    if points[0][1] > 1:
        return 0.0
    for (low, before), (high, after) in zip(points, points[1:]):
        if before <= 1 < after:
            return low * (high / low) ** (-math.log(before) / math.log(after / before))
    return math.inf


def costs_less_from(rows: list[dict], model: str, measure: str) -> str:
    """The L from which MAGT over utterances costs less than the model; times with their interval."""
    ratios = {L: ratio(rows, model, L, measure) for L in FRAMES}
    crossed = [crossing({L: found[part] for L, found in ratios.items()}) for part in range(3)]
    names = {0.0: f"below {FRAMES[0]}", math.inf: f"above {FRAMES[-1]}"}
    middle, last, first = (names.get(L, f"{L:.0f}") for L in crossed)  # a high ratio crosses first
    return middle if first == last else f"{middle} ({first} to {last})"


def exponent(rows: list[dict], model: str, measure: str) -> float:
    """The slope of log cost over log L per utterance, by least squares.

    For MAGT over utterances: over log U, per conversation, which is U times the cost of an utterance.
    """
    kind, key, _ = MEASURES[measure]
    table, lengths = select(rows, kind, model), UTTERANCES if model == MAGT_U else FRAMES
    cost = [(n if model == MAGT_U else 1) * per_utterance(table[n], key) for n in lengths]
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(y) for y in cost]).slope


def granularity(rows: list[dict]) -> dict[str, tuple[Fraction, Fraction]]:
    """MAGT over utterances over MAGT over frames, in units of the claim: least and largest of all pairs of U and L."""
    over_U, over_L = select(rows, "count", MAGT_U), select(rows, "count", MAGT_L)

    def span(key: str, claim: Callable) -> tuple[Fraction, Fraction]:
        pairs = [(U, L) for U in UTTERANCES for L in FRAMES]
        found = [per_utterance(over_U[U], key) / per_utterance(over_L[L], key) / claim(U, L) for U, L in pairs]
        return min(found), max(found)

    return {
        "attention FLOPs, in U/L^2": span("flops_attention", lambda U, L: Fraction(U, L**2)),
        "all FLOPs, in 1/L": span("flops", lambda U, L: Fraction(1, L)),
        "bytes kept, in 1/L": span("bytes", lambda U, L: Fraction(1, L)),
    }


def encoder_flops(rows: list[dict]) -> float:
    """Of the three encoders for one utterance."""
    return float(sum(per_utterance(row, "flops") for row in rows if row["kind"] == "encoder count"))


def achieved(row: dict) -> float:
    """FLOP/s."""
    return row["flops"] / statistics.median(row["seconds"])


# Text


def where(environment: dict) -> str:
    """What has to stand beside every number."""
    facts = {k: v for k, v in environment.items() if k not in ("device", "matrix_rates")}
    for dtype, rates in environment["matrix_rates"].items():
        facts[f"GFLOP/s of {dtype} products"] = ", ".join(f"{rate / 1e9:,.0f} ({n})" for n, rate in rates.items())
    return f"Measured on {environment['device']}; " + ", ".join(f"{k}: {v}" for k, v in facts.items()) + "."


def markdown(environment: dict, rows: list[dict]) -> str:
    """The whole report."""
    head = (
        "Made by `pytest bench/ --benchmark-only`; again from the JSON by `python -m bench.report`. A multiply-add is "
        "2 FLOPs; FLOPs are those of matrix products, forward. Training is forward and backward with dropout, without "
        "the optimizer; it keeps bytes for the backward pass (with the CPU's fused attention on every machine). Peak: "
        "the most that a call allocates beside weights and inputs. Times are medians."
    )
    ratio_head = (
        f"Per utterance, over MAGT over utterances with U = {REFERENCE.length}: above 1, the model costs more. Times: "
        "median of paired rounds (range of the rounds, a 94 % interval of the median).\n\n"
    )
    frames = [case for case in cases.CASES if case.model in FRAME_MODELS and case.length in FRAMES]
    sections = {
        "MAGT over utterances over MAGT over frames, the same weights, all pairs of U and L": granularity_table(rows),
        "The L from which MAGT over utterances costs less": crossing_table(rows),
        "Exponents in L (of MAGT over utterances: in U, per conversation)": exponent_table(rows),
        "Ratios at lengths of real inputs, text/audio/video": ratio_head + lengths_table(rows),
        "Ratios over the grid": ratio_head + ratio_table(rows, frames),
        "Costs per utterance, and rates": cost_table(environment, rows),
        "A training step of stage 2 on 16 conversations": stage2_table(environment, rows),
        "The encoders of stage 1, a batch of 4 utterances": encoder_table(rows),
    }
    parts = [f"# Benchmark results: {results_path(environment).stem}\n\n{where(environment)}\n\n{head}\n"]
    return "\n".join(parts + [f"## {name}\n\n{text.rstrip()}\n" for name, text in sections.items()])


def table(head: list, body: list[list]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def granularity_table(rows: list[dict]) -> str:
    body = [[name, f"{float(low):.3f}", f"{float(high):.3f}"] for name, (low, high) in granularity(rows).items()]
    return table(["", "least", "largest"], body)


def crossing_table(rows: list[dict]) -> str:
    body = [[model, *(costs_less_from(rows, model, m) for m in MEASURES)] for model in FRAME_MODELS]
    return table(["than", *MEASURES], body)


def exponent_table(rows: list[dict]) -> str:
    return table(["", *MEASURES], [[model, *(f"{exponent(rows, model, m):.2f}" for m in MEASURES)] for model in WIDTHS])


def lengths_table(rows: list[dict]) -> str:
    return ratio_table(rows, [case for case in cases.CASES if case.length in cases.LENGTHS])


def ratio_table(rows: list[dict], of: list[Case]) -> str:
    body = [[case, *(ratio(rows, case.model, case.length, m) for m in MEASURES)] for case in of]
    return table(["", *MEASURES], body)


def cost_table(environment: dict, rows: list[dict]) -> str:
    body, best = [], max(environment["matrix_rates"]["float32"].values())
    for case in cases.CASES:
        of = {kind: select(rows, kind, case.model)[case.length] for kind in ("count", "inference", "training")}
        costs = [float(per_utterance(of[kind], key)) / UNITS[unit] for kind, key, unit in MEASURES.values()]
        rates = [achieved(of[kind]) for kind in ("inference", "training")]
        line = [case, f"{of['count']['params'] / 1e6:.2f}", *(f"{x:,.3f}" for x in costs)]
        body.append([*line, of["inference"]["samples"], *(f"{x / 1e9:,.1f} ({x / best:.0%})" for x in rates)])
    head = [
        "",
        "weights, M",
        *(f"{name}, {unit}" for name, (_, _, unit) in MEASURES.items()),
        "utterances in a timed call",
    ]
    text = "In brackets after a rate: its share of the machine's best rate of float32 matrix products.\n\n"
    return text + table([*head, "inference, GFLOP/s", "training, GFLOP/s"], body)


def stage2_table(environment: dict, rows: list[dict]) -> str:
    body = []
    for corpus in cases.STAGE2:
        for mode in cases.STAGE2_MODES:
            line = [NOT_MEASURED] * 5
            for row in rows:
                if (row["kind"], row.get("corpus"), row.get("mode")) == ("stage2", corpus, mode):
                    rates, median = environment["matrix_rates"][mode], statistics.median(row["seconds"])
                    line = [row["utterances"], f"{1e3 * median:,.0f}", f"{row['utterances'] / median:,.0f}"]
                    line += [f"{achieved(row) / rate:.0%}" for rate in (max(rates.values()), rates["layers"])]
            body.append([f"{corpus}, {mode}", *line])
    text = (
        "MAGT, Eq. 25, backward, clipping, AdamW. The shares count three forward passes' FLOPs, over the machine's "
        "rate of matrix products of the same type: its best, and at the size of MAGT's layers.\n\n"
    )
    return text + table(["", "utterances", "ms", "utterances/s", "of the best rate", "of the layers' rate"], body)


def encoder_table(rows: list[dict]) -> str:
    body, steps = [], {row["encoder"]: row for row in rows if row["kind"] == "encoder step"}
    for row in (row for row in rows if row["kind"] == "encoder count"):
        line = [row["encoder"], row["vectors"], f"{row['params'] / 1e6:.1f}", f"{row['flops'] / 1e9:,.0f}"]
        step = steps.get(row["encoder"])
        cost = [f"{1e3 * statistics.median(step['seconds']):,.0f}", f"{step['peak_bytes'] / 1e9:.1f}"] if step else None
        body.append([*line, f"{row['bytes'] / 1e9:.2f}", *(cost or [NOT_MEASURED] * 2)])
    ratio = encoder_flops(rows) * REFERENCE.length / REFERENCE.flops(REFERENCE.length).total
    text = (
        f"Published sizes, random weights; bytes with unfused attention. For one utterance the three take "
        f"{encoder_flops(rows) / 1e9:,.0f} GFLOP, {ratio:,.0f} times MAGT.\n\n"
    )
    head = ["encoder", "vectors per utterance", "weights, M", "GFLOP", "kept, GB", "step, ms", "peak of a step, GB"]
    return text + table(head, body)


# The figure

LINES = {
    MAGT_L: {"color": "black", "marker": "D"},
    cases.MATCHED: {"color": "black", "marker": "o", "ls": "--", "mfc": "white"},
    cases.PUBLISHED: {"color": "0.45", "marker": "s"},
    cases.RELEASED: {"color": "0.45", "marker": "^", "ls": "--", "mfc": "white"},
}


def figure(environment: dict, rows: list[dict], path: Path) -> None:
    """Log-log, black and grey: costs of an utterance against L, with MAGT over utterances as a horizontal line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = ["all FLOPs", "inference, time", "training, time", "inference, peak", "training, bytes kept"]
    fig, axes = plt.subplots(2, 3, figsize=(11, 7.5), layout="constrained")
    for ax, measure, power in zip(axes.flat, measures, (2, 2, 2, 1, 1)):
        kind, key, unit = MEASURES[measure]
        lines = {model: select(rows, kind, model) for model in LINES}
        values = {
            model: [float(per_utterance(of[L], key)) / UNITS[unit] for L in FRAMES] for model, of in lines.items()
        }
        claim = [values[MAGT_L][0] * (L / FRAMES[0]) ** power for L in FRAMES]
        ax.plot(
            FRAMES, claim, color="0.85", lw=7, solid_capstyle="butt", zorder=0, label="slope claimed in section 4.7"
        )
        for model, y in values.items():
            ax.plot(FRAMES, y, **LINES[model], label=model)
        level = float(per_utterance(select(rows, kind, MAGT_U)[REFERENCE.length], key)) / UNITS[unit]
        ax.axhline(level, color="black", lw=2, ls=":", label=f"{MAGT_U}, U = {REFERENCE.length}")
        ax.set(yscale="log", ylabel=f"{measure}, {unit} per utterance")
    ax = axes.flat[-1]
    for model in LINES:
        timed = select(rows, "inference", model)
        ax.plot(FRAMES, [achieved(timed[L]) / 1e9 for L in FRAMES], **LINES[model])
    ax.axhline(achieved(select(rows, "inference", MAGT_U)[REFERENCE.length]) / 1e9, color="black", lw=2, ls=":")
    best = max(environment["matrix_rates"]["float32"].values()) / 1e9
    ax.axhline(best, color="black", lw=1, label="float32 matrix product, the machine's best")
    ax.set(ylabel="inference: GFLOP/s", ylim=(0, 1.15 * best))
    for ax in axes.flat:
        ax.set(xscale="log", xlabel="L, frames per utterance")
        ax.set_xticks(FRAMES, FRAMES)
        ax.minorticks_off()
        ax.grid(color="0.92")
    handles = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    machine = environment.get("gpu", environment["cpu"])
    fig.suptitle(f"{machine}, {environment['threads']} threads, torch {environment['torch']}", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    for results in sorted(RESULTS.glob("*.json")):
        render(results)
        print(f"{results.stem}: .md and .png written to bench/results/")
