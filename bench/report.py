"""Numbers, tables and the figure, from results/<device>.json; `python -m bench.report` makes .md and .png again."""

import json
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from bench import cases
from bench.cases import CASES, FRAME_MODELS, FRAMES, MAGT_L, MAGT_U, REFERENCE, UTTERANCES, Case
from extras.report import table

RESULTS = Path(__file__).parent / "results"
MEASURES = {  # name -> kind and key of a row
    "attention FLOPs": ("count", "flops_attention"),
    "all FLOPs": ("count", "flops"),
    "inference, time": ("inference", "seconds"),
    "inference, peak": ("inference", "peak_bytes"),
    "training, time": ("training", "seconds"),
    "training, bytes kept": ("count", "bytes"),
    "kept without dropout": ("count", "bytes_no_dropout"),
}


def save(environment: dict, rows: list[dict]) -> Path:
    """Writes results/<device>.json (a line per row), .md and .png."""
    path = RESULTS / f"{environment['device']}.json"
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"environment": {json.dumps(environment, indent=1)},\n"rows": [\n{lines}\n]}}\n')
    render(path)
    return path


def load(path: Path) -> tuple[dict, list[dict]]:
    results = json.loads(path.read_text())
    return results["environment"], results["rows"]


def render(path: Path) -> None:
    environment, rows = load(path)
    path.with_suffix(".md").write_text(markdown(environment, rows))
    figure(environment, rows, path.with_suffix(".png"))


def find(rows: list[dict], kind: str, case: Case) -> dict:
    return next(row for row in rows if row["kind"] == kind and row["case"] == str(case))


def cost(rows: list[dict], case: Case, measure: str) -> float:
    """Per utterance, in FLOPs, seconds (the median over the rounds) or bytes."""
    kind, key = MEASURES[measure]
    row = find(rows, kind, case)
    return (statistics.median(row[key]) if key == "seconds" else row[key]) / row["samples"]


def ratio(rows: list[dict], case: Case, measure: str) -> tuple[float, float, float]:
    """The cost over that of the reference: median over the paired rounds, lowest, highest; counts have no range."""
    kind, key = MEASURES[measure]
    if key != "seconds":
        return (cost(rows, case, measure) / cost(rows, REFERENCE, measure),) * 3
    row = find(rows, kind, case)
    pairs = zip(row["seconds"], row["reference_seconds"])
    found = [a / row["samples"] / (b / row["reference_samples"]) for a, b in pairs]
    return statistics.median(found), min(found), max(found)


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
    ratios = {L: ratio(rows, Case(model, L), measure) for L in FRAMES}
    crossed = [crossing({L: found[part] for L, found in ratios.items()}) for part in range(3)]
    names = {0.0: f"below {FRAMES[0]}", math.inf: f"above {FRAMES[-1]}"}
    middle, last, first = (names.get(L, f"{L:.0f}") for L in crossed)  # a high ratio crosses first
    return middle if first == last else f"{middle} ({first} to {last})"


def exponent(rows: list[dict], model: str, measure: str) -> float:
    """The slope of log cost per utterance over log L, by least squares."""
    costs = [cost(rows, Case(model, L), measure) for L in FRAMES]
    return statistics.linear_regression([math.log(L) for L in FRAMES], [math.log(y) for y in costs]).slope


def granularity(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """MAGT over utterances over MAGT over frames, in units of the claim: least and largest of all pairs of U and L."""
    spans = {}
    for measure, unit in (("attention FLOPs", "U/L^2"), ("all FLOPs", "1/L"), ("training, bytes kept", "1/L")):
        over_U = {U: cost(rows, Case(MAGT_U, U), measure) / (U if unit == "U/L^2" else 1) for U in UTTERANCES}
        over_L = {L: cost(rows, Case(MAGT_L, L), measure) / (L**2 if unit == "U/L^2" else L) for L in FRAMES}
        found = [u / frames for u in over_U.values() for frames in over_L.values()]
        spans[f"{measure}, in {unit}"] = min(found), max(found)
    return spans


def share(environment: dict, row: dict) -> float:
    """Achieved FLOP/s over the machine's rate of matrix products of the same type."""
    return row["flops"] / statistics.median(row["seconds"]) / environment["matrix_rates"][row.get("dtype", "float32")]


def where(environment: dict) -> str:
    """What has to stand beside every number."""
    facts = {k: v for k, v in environment.items() if k not in ("device", "matrix_rates")}
    facts |= {f"GFLOP/s of {k} matrix products": f"{v / 1e9:,.0f}" for k, v in environment["matrix_rates"].items()}
    return f"Measured on {environment['device']}; " + ", ".join(f"{k}: {v}" for k, v in facts.items()) + "."


def crossing_table(rows: list[dict]) -> str:
    body = [[model, *(costs_less_from(rows, model, m) for m in MEASURES)] for model in FRAME_MODELS]
    return table(["than", *MEASURES], body)


def ratio_table(rows: list[dict], of: list[Case]) -> str:
    def cell(median: float, low: float, high: float) -> str:
        return f"{median:.3g}" + (f" ({low:.3g} to {high:.3g})" if low < high else "")

    return table(["", *MEASURES], [[case, *(cell(*ratio(rows, case, m)) for m in MEASURES)] for case in of])


def time_table(environment: dict, rows: list[dict]) -> str:
    """Every timed call and step."""
    body = []
    timed = [row for row in rows if "seconds" in row]
    for row in timed:
        time = statistics.median(row["seconds"])
        line = [row["samples"], f"{1e3 * time / row['samples']:,.2f}", f"{row['flops'] / time / 1e9:,.1f}"]
        line += [f"{share(environment, row):.0%}", f"{row['peak_bytes'] / 1e6:,.0f}"]
        body.append([f"{row['kind']}: {row['case']}", *line])
    missing = [step for step in cases.STEPS if step not in {row["case"] for row in timed}]
    body += [[f"step: {step}", *["not measured"] * 5] for step in missing]
    return table(["", "utterances", "ms per utterance", "GFLOP/s", "share of the type's rate", "peak, MB"], body)


def markdown(environment: dict, rows: list[dict]) -> str:
    """The whole report."""
    spans = [[name, f"{low:.3f}", f"{high:.3f}"] for name, (low, high) in granularity(rows).items()]
    return f"""# Benchmark results: {environment["device"]}

{where(environment)}

Made by `pytest bench/ --benchmark-only`. A multiply-add is 2 FLOPs; FLOPs are those of matrix products, forward. \
Training is forward and backward with dropout, without the optimizer; it keeps bytes for the backward pass (with the \
CPU's fused attention on every machine). Peak: the most that a call allocates beside weights and inputs.

MAGT over utterances over MAGT over frames, the same weights, all pairs of U and L:

{table(["", "least", "largest"], spans)}

The L from which MAGT over utterances costs less:

{crossing_table(rows)}

Ratios per utterance, over MAGT over utterances with U = {REFERENCE.length}: above 1, the model costs more. Times: \
median of paired rounds (range of the rounds, a 94 % interval of the median).

{ratio_table(rows, CASES)}

Times, and rates beside the machine's rate of matrix products of the same type. Steps: stage 2 on 16 conversations \
(MAGT, Eq. 25, backward, clipping, AdamW), and the encoders of stage 1 on 4 utterances, timed on CUDA only.

{time_table(environment, rows)}
"""


LINES = {
    MAGT_L: {"color": "black", "marker": "D"},
    cases.MATCHED: {"color": "black", "marker": "o", "ls": "--", "mfc": "white"},
    cases.PUBLISHED: {"color": "0.45", "marker": "s"},
    cases.RELEASED: {"color": "0.45", "marker": "^", "ls": "--", "mfc": "white"},
}
CLAIMED = {"all FLOPs": 2, "inference, time": 2, "training, time": 2, "inference, peak": 1, "training, bytes kept": 1}


def figure(environment: dict, rows: list[dict], path: Path) -> None:
    """Costs of an utterance and achieved rates against L, with MAGT over utterances as a horizontal line."""
    fig, axes = plt.subplots(2, 3, figsize=(11, 7.5), layout="constrained")
    grid = [REFERENCE, *(Case(model, L) for model in LINES for L in FRAMES)]
    panels = {measure: {case: cost(rows, case, measure) for case in grid} for measure in CLAIMED}
    rates = {case: share(environment, find(rows, "inference", case)) for case in grid}
    for ax, (title, values) in zip(axes.flat, {**panels, "inference, share of the matrix rate": rates}.items()):
        for model, line in LINES.items():
            ax.plot(FRAMES, [values[Case(model, L)] for L in FRAMES], **line, label=model)
        ax.axhline(values[REFERENCE], color="black", lw=2, ls=":", label=str(REFERENCE))
        ax.set(xscale="log", xlabel="L, frames per utterance", title=title)
        if title in CLAIMED:
            claim = [values[Case(MAGT_L, FRAMES[0])] * (L / FRAMES[0]) ** CLAIMED[title] for L in FRAMES]
            ax.plot(FRAMES, claim, color="0.85", lw=7, zorder=0, label="slope claimed in section 4.7")
            ax.set(yscale="log", ylabel=MEASURES[title][1].replace("_", " ") + " per utterance")
        ax.set_xticks(FRAMES, FRAMES)
        ax.minorticks_off()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.suptitle(environment["machine"], fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    for results in sorted(RESULTS.glob("*.json")):
        render(results)
        print(f"{results.stem}: .md and .png written to bench/results/")
