"""README.md and docs/ from the stored results: every table and every measured number in them.

    python -m extras.docs          # fills the pages again from docs/figures/ and bench/results/

In a page a block stands between <!-- table NAME --> or <!-- text NAME --> and <!-- end -->; BLOCKS below says how each
is made. Whatever was not measured reads "not measured". A sentence with a verdict is computed here, so that it says
what the numbers say. tests/test_readme.py holds that running this changes nothing.

Not here: what is in docs/figures/ (gather.py), and the measuring.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from data import replace_file
from extras.experiments import comparison_table
from extras.report import results_table

ROOT = Path(__file__).parent.parent
FIGURES, BENCH = ROOT / "docs" / "figures", ROOT / "bench" / "results"
NOT_MEASURED = "not measured"
BLOCK = re.compile(r"(<!-- (?:table|text) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MAIN = "T+A_KD+V"  # the paper's best set of features
CONTEXT, CONCAT, MAGT = "Context", "Concat", "MAGT"


class NotMeasured(Exception):
    """A result that nobody has stored yet."""


def stored(name: str) -> dict:
    """docs/figures/<name>.json."""
    path = FIGURES / f"{name}.json"
    if not path.exists():
        raise NotMeasured(name)
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> list[str]:
    if not path.exists():
        raise NotMeasured(path.name)
    return path.read_text(encoding="utf-8").splitlines()


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


# Runs


def number(row: dict, score: str = "weighted_f1") -> str:
    """Mean ± deviation of a row of metrics.json."""
    many = len(row.get("seeds", [])) > 1
    return f"{row[score]['mean']:.2f}" + (f" ± {row[score]['std']:.2f}" if many else "")


def cells(row: dict) -> list[str]:
    selected = f"{row['test_selected']['weighted_f1']['mean']:.2f}" if "test_selected" in row else ""
    return [number(row, "accuracy"), number(row), number(row, "macro_f1"), selected]


def short_table(run: str) -> str:
    """The rows that matter most: single modalities, and the fusions over the paper's best set of features."""
    metrics = stored(run)
    rows = metrics["rows"]
    kept = [name for name in rows if " " not in name and (len(rows) < 9 or name in MAIN.split("+"))]
    kept += [name for name in rows if " " in name and (len(rows) < 9 or name.endswith(f" {MAIN}"))]
    return results_table(metrics | {"rows": {name: rows[name] for name in kept}})


def sets(comparisons: list[dict], a: str, b: str) -> list[dict]:
    """Those of `experiments.compare` that set a against b, one per set of features."""
    return [c for c in comparisons if re.fullmatch(rf"{a} \S+ - {b}", c["pair"])]


def verdict(comparisons: list[dict], a: str, b: str) -> str:
    """ "MAGT lies below Concat in 4 of 4 sets of features, by 2.86 to 3.37; 4 of the 4 intervals hold 0."""
    found = sets(comparisons, a, b)
    if not found:
        raise NotMeasured(f"{a} - {b}")
    below = [c for c in found if c["difference"] < 0]
    side, word = (below, "below") if 2 * len(below) > len(found) else ([c for c in found if c not in below], "above")
    sizes = sorted(abs(c["difference"]) for c in side)
    size = f"{sizes[0]:.2f}" + (f" to {sizes[-1]:.2f}" if len(sizes) > 1 else "")
    doubt = sum(c["low"] <= 0 <= c["high"] for c in found)
    if len(found) == 1:
        (c,) = found
        held = "holds 0, so it may be the choice of test conversations" if doubt else "does not hold 0"
        return f"{a} lies {size} {word} {b}; the 95 % interval, {c['low']:+.2f} to {c['high']:+.2f}, {held}."
    sets_ = f"{len(side)} of {len(found)} sets of features"
    return f"{a} lies {word} {b} in {sets_}, by {size}; {doubt} of the {len(found)} intervals hold 0."


def demo_text() -> str:
    metrics = stored("demo-metrics")
    only = [c for c in metrics["comparisons"] if f" {MAIN} " in c["pair"]]
    return f"{verdict(only, MAGT, CONCAT)} {machine_of('demo-metrics')}"


def ablation_text() -> str:
    comparisons = stored("demo-metrics")["comparisons"]
    return " ".join(verdict(comparisons, *pair) for pair in ((CONTEXT, CONCAT), (MAGT, CONCAT), (MAGT, CONTEXT)))


def machine_of(run: str) -> str:
    return f"({stored(run)['machine']}; all numbers: `docs/figures/{run}.json`.)"


def meld_text() -> str:
    """Does the conversation add to a prompt that holds the past already?"""
    metrics = stored("meld-metrics")
    rows = metrics["rows"]
    alone, fused = rows["T"], {name: row for name, row in rows.items() if name.split()[-1] == "T" and " " in name}
    name = max(fused, key=lambda n: fused[n]["weighted_f1"]["mean"])
    best = fused[name]["weighted_f1"]
    gain = best["mean"] - alone["weighted_f1"]["mean"]
    says = f"the best fusion, {name.split()[0]}, has {number(fused[name])}, the words alone {number(alone)}"
    if gain <= 0:
        answer = f"No: {says}."
    elif gain < 2 * best["std"]:
        answer = f"Not beyond the deviation over seeds: {says}."
    else:
        answer = f"Yes, by {gain:.2f}: {says}."
    compared = metrics.get("comparisons") or []
    pairs = [(a, b) for a, b in ((MAGT, CONCAT), (MAGT, CONTEXT)) if sets(compared, a, b)]
    more = " ".join(verdict(compared, *pair) for pair in pairs)
    question = "Does the conversation add to a prompt that holds the past already?"
    return " ".join(part for part in (question, answer, more, machine_of("meld-metrics")) if part)


def per_class(run: str) -> str:
    classes = stored(run)["per_class"]
    rows = [
        [name, *(f"{row[k]:.1f}" for k in ("precision", "recall", "f1")), str(row["support"])]
        for name, row in classes.items()
    ]
    return table(["class", "precision", "recall", "F1", "utterances"], rows)


def mosi_text() -> str:
    rows = stored("mosi-metrics")["rows"]
    magt, concat = (next(row for name, row in rows.items() if name.startswith(f)) for f in (MAGT, CONCAT))
    gap = magt["weighted_f1"]["mean"] - concat["weighted_f1"]["mean"]
    noise = max(magt["weighted_f1"]["std"], concat["weighted_f1"]["std"])
    word = "above" if gap > 0 else "below"
    how = "within" if abs(gap) <= noise else "more than"
    says = f"MAGT lies {abs(gap):.2f} {word} Concat, {how} the deviation over seeds ({noise:.2f})."
    return f"{says} {machine_of('mosi-metrics')}"


def demo_files() -> str:
    (line,) = [note for note in stored("demo-metrics")["notes"] if "conversations" in note]
    return f"The demo has {line}."


def two_runs(other: str, names: tuple[str, str]) -> str:
    main = f"{MAGT} {MAIN}"
    found = zip(("demo-metrics", other), names)
    rows = [[f"{main}, {what}", *cells(stored(run)["rows"][main])] for run, what in found]
    return table(["", "accuracy", "W-F1", "M-F1", "W-F1, test-selected"], rows)


def causal_text() -> str:
    whole, causal = (stored(run)["rows"][f"{MAGT} {MAIN}"]["weighted_f1"] for run in ("demo-metrics", "demo-causal"))
    gap, noise = causal["mean"] - whole["mean"], max(whole["std"], causal["std"])
    size = "less than" if abs(gap) < noise else "about" if abs(gap) < 1.5 * noise else "more than"
    return (
        f"On the demo the future is worth {-gap:.2f} points of W-F1, {size} the larger deviation over seeds, "
        f"{noise:.2f} (`docs/figures/demo-causal.json`). On real corpora: not measured."
    )


def weights_table() -> str:
    before, after = stored("demo-metrics")["rows"], stored("demo-weights")["rows"]
    rows = [
        [name, number(before[name]), number(before[name], "macro_f1"), number(row), number(row, "macro_f1")]
        for name, row in after.items()
        if name in before
    ]
    return table(["model", "W-F1", "M-F1", "with class weights: W-F1", "M-F1"], rows)


def weights_text() -> str:
    classes = stored("demo-weights")["per_class"]
    rare = min(classes, key=lambda name: classes[name]["support"])
    total = sum(row["support"] for row in classes.values())
    return (
        "(`docs/figures/demo-weights.json`.) Each encoder was trained once, so the difference of one encoder is as "
        f"much its luck as the weights'. The demo's classes are not very unequal: its rarest, {rare}, has "
        f"{classes[rare]['support']} of {total} test utterances."
    )


def presets() -> list[list[str]]:
    lines = [line for line in lines_of(FIGURES / "demo-presets.md") if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines]


def presets_text() -> str:
    """Which differences lie beyond what another choice of test conversations could do."""
    clear, collapsed = [], False
    for row in presets()[3:]:
        low, high = (float(x) for x in re.findall(r"[+-]\d+\.\d+", row[4]))
        if not low <= 0 <= high:
            clear.append(f"{row[0].split(':')[0]} ({row[3].split(' ')[0]})")
        collapsed = collapsed or (row[0].startswith("15") and high < -10)
    text = f"Intervals without 0: {', '.join(clear) or 'none'}."
    if collapsed:
        text += (
            " With gradient flowing into the teacher (15) stage 2 collapses, and so does the whole preset: the teacher "
            "gives in to its students. Expect that on real corpora too."
        )
    return text


def sweep_text() -> str:
    (line,) = [line for line in lines_of(FIGURES / "demo-sweep.md") if line.startswith("From the lowest")]
    spread, noise = (float(x) for x in re.findall(r"\d+\.\d+", line)[:2])
    how = "hardly matter on the demo" if spread < 2 * noise else "matter on the demo"
    return f"{line} The two weights {how}. All cells with their deviations, macro F1 too: `docs/figures/demo-sweep.md`."


# The benchmark and the speed


def bench_rows() -> list[list[str]]:
    """The verdicts of bench/results/cpu.md: [claim, measured, verdict]."""
    lines = lines_of(BENCH / "cpu.md")
    start = lines.index("## Verdicts on section 4.7") + 4
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [line.strip("| ").split(" | ") for line in lines[start:end]]


def bench_short() -> str:
    """The claims in three sentences, if the verdicts are those that these sentences say; else the verdicts."""
    rows = bench_rows()

    def of(start: str) -> str:
        return next(row[2] for row in rows if row[0].startswith(start))

    times = [of("Frame-level time"), of("Utterance-level time"), of("Both times")]
    expected = set(times) == {"right for the attention term only"} and of("Space O(").startswith("right")
    crossing = of("From which L on")
    if expected and of("Time ratio MAGT / MulT = U/L^2, all FLOPs").startswith("not so"):
        return (
            "In short: the paper's formulas are right for the attention products and for space, up to a constant. They "
            "leave out the linear layers, which at D = 768 do nearly all the work: with them the advantage is 1/L and "
            f"not U/L^2. And against MulT as published, with d = 40, MAGT takes fewer FLOPs {crossing}."
        )
    return "In short: " + "; ".join(f"{row[0]}: {row[2]}" for row in rows[:7]) + f". MAGT is cheaper {crossing}."


def bench_where() -> str:
    line = next(line for line in lines_of(BENCH / "cpu.md") if line.startswith("Measured on"))
    return line.split(" Made by")[0] + " A multiply-add is 2 FLOPs. The machine is a shared one: times are medians."


def speed() -> dict:
    """docs/figures/speed.json, if it is of the present bench.speed and not of its toy sizes."""
    found = stored("speed")
    if found.get("toy", True):
        raise NotMeasured("speed")
    return found


def speed_stage1() -> str:
    one = speed()["stage1"]
    rows = [[way, f"{median(s):.2f}", f"{min(s):.2f} to {max(s):.2f}"] for way, s in one["seconds"].items()]
    text = table(["caches", "seconds of an epoch", "rounds"], rows)
    large = f"{one['seconds_of_large_teacher']:.0f}"
    return (
        f"{text}\n\n{one['utterances']} made-up utterances, the demo's small encoders. The small teacher costs next to "
        f"nothing; one of RoBERTa-large's size, with random weights, would add {large} s to every epoch."
    )


def speed_stage2() -> str:
    two, rows = speed()["stage2"], []
    for way, seconds in two["seconds"].items():
        if seconds is None:
            rows.append([way, *[NOT_MEASURED] * 4])
            continue
        rate, peak = two["useful_flops"] / median(seconds), two["gemm_flops_per_s"]
        shares = [f"{100 * rate / r:.0f} %" for r in (peak["layers"], max(peak.values()))]
        rows.append([way, f"{two['utterances'] / median(seconds):.0f}", f"{median(two['loss'][way]):.3f}", *shares])
    head = ["attention, precision", "utterances per second", "loss of the epoch", "of products of its own size"]
    return table([*head, "of the best product"], rows)


def speed_padding() -> str:
    rows = [[what, *(f"{100 * x:.1f} %" for x in share.values())] for what, share in speed()["padding"].items()]
    return table(["padding in batches of 16", "at random", "of similar length"], rows)


def speed_where() -> str:
    found = speed()["machine"]
    versions = f"torch {found['torch']}, Python {found['python']}"
    return f"{found['cpu']}, {found['threads']} threads, {versions}; all numbers: `docs/figures/speed.json`."


def never_measured() -> str:
    """What was never measured, as far as stored files can tell."""
    cards = sorted(path.stem for path in BENCH.glob("*.json") if path.stem != "cpu")
    page = "[docs/gpu.md](docs/gpu.md)"
    gpu = f"More than one GPU; one was ({', '.join(cards)}): {page}" if cards else f"Any GPU; what is known: {page}"
    meld = " (its words alone were)" * (FIGURES / "meld-metrics.json").exists()
    return (
        f"- **IEMOCAP, and MELD with sound and pictures**{meld}: no copy was at hand. So the full-size encoders in a "
        f"whole run, their time and their memory.\n- {gpu}.\n"
        "- The authors' published feature pickles (files in their layout were tried).\n"
        "- Systems other than Linux; Python other than 3.11."
    )


# The losses on random features


def losses_table() -> str:
    rows = [
        [str(r["B"]), f"{r['L_s']:.2f}", f"{r['L_f']:.3f}", f"{r['L_f raw']:.0f}"] for r in stored("losses")["rows"]
    ]
    return table(["B", "L_s, tau 2", "L_f with cosines, tau 1", "L_f with raw products, tau 1"], rows)


def losses_text() -> str:
    by = {r["B"]: r for r in stored("losses")["rows"]}
    ratio = by[16]["L_s"] / by[16]["L_f"]
    return (
        f"On random features and logits, B = 16, L_s is {ratio:.0f} times L_f with cosines ({by[16]['L_s']:.1f} and "
        f"{by[16]['L_f']:.2f}). With raw products L_f is {by[16]['L_f raw']:.0f}, that is "
        f"{by[16]['L_f raw'] / by[16]['L_s']:.1f} times L_s. Eq. 14 and 24 add the two without weights."
    )


# The exercises of docs/course.md


def course_table() -> str:
    rows = []
    for name, row in stored("course")["rows"].items():
        t, f1 = row["terms"], [f"{row[k]['mean']:.2f} ± {row[k]['std']:.2f}" for k in ("weighted_f1", "macro_f1")]
        pairs = [f"{t['l_s_audio']:.2f}", f"{t['l_f_audio']:.3f}"]
        rows.append([name, *f1, f"{row['answers']:.1f}", f"{t['l_ce']:.2f}", *pairs])
    head = ["", "W-F1", "M-F1", "different answers", "L_CE, last epoch", "L_s, audio", "L_f, audio"]
    return table(head, rows)


def course_text(name: str) -> str:
    """What an exercise did to W-F1."""
    rows = stored("course")["rows"]
    base, row = rows["the paper"]["weighted_f1"], rows[name]["weighted_f1"]
    gap, noise = row["mean"] - base["mean"], max(row["std"], base["std"])
    how = "within the deviation over seeds" if abs(gap) <= noise else f"{'up' if gap > 0 else 'down'} by {abs(gap):.2f}"
    return f"Measured: W-F1 {row['mean']:.2f}, the paper's {base['mean']:.2f}: {how}."


# The blocks

BLOCKS: dict[str, Callable[[], str]] = {
    "meld": partial(short_table, "meld-metrics"),
    "meld-verdict": meld_text,
    "meld-classes": partial(per_class, "meld-metrics"),
    "meld-predict": lambda: fenced(FIGURES / "meld-predict.txt"),
    "mosi": partial(short_table, "mosi-metrics"),
    "mosi-verdict": mosi_text,
    "demo": partial(short_table, "demo-metrics"),
    "demo-verdict": demo_text,
    "demo-files": demo_files,
    "demo-predict": lambda: fenced(FIGURES / "demo-predict.txt"),
    "ablation": lambda: results_table(stored("demo-metrics")),
    "ablation-verdict": ablation_text,
    "bootstrap": lambda: comparison_table(stored("demo-metrics")["comparisons"]),
    "presets": lambda: table(presets()[0], presets()[2:]),
    "presets-verdict": presets_text,
    "sweep-verdict": sweep_text,
    "causal": partial(two_runs, "demo-causal", ("whole conversation", "causal")),
    "causal-verdict": causal_text,
    "weights": weights_table,
    "weights-verdict": weights_text,
    "bench": lambda: table(["claim or question", "measured", "verdict"], bench_rows()),
    "bench-short": bench_short,
    "bench-where": bench_where,
    "speed-stage1": speed_stage1,
    "speed-stage2": speed_stage2,
    "speed-padding": speed_padding,
    "speed-where": speed_where,
    "never": never_measured,
    "losses": losses_table,
    "losses-verdict": losses_text,
    "course": course_table,
    "course-1": partial(course_text, "1. gradient into the teacher"),
    "course-2": partial(course_text, "2. raw dot products in L_f"),
    "course-3": lambda: " ".join(course_text(name) for name in ("3. gates closed", "3. gates open")),
    "course-4": partial(course_text, "4. Context instead of MAGT"),
}


def fenced(path: Path) -> str:
    return "\n".join(["```", *lines_of(path), "```"])


def block(name: str) -> str:
    try:
        return BLOCKS[name]()
    except NotMeasured:
        return f"{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}."


def fill(page: str) -> str:
    """A page with all its blocks made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(found[2])}\n{found[3]}", page)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m extras.docs", description=__doc__.split("\n\n")[0]).parse_args(argv)
    for path in pages():
        before = path.read_text(encoding="utf-8")
        if (after := fill(before)) != before:
            replace_file(path, lambda part, after=after: part.write_text(after, encoding="utf-8"))
            print(f"filled again: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
