"""The pieces of README.md and docs/ that come from runs: tables of scores, and the sentences beside them.

Not here: the benchmark, the speed, the losses and the exercises (docs_measured.py).
"""

import re

from extras.docs_stored import FIGURES, NOT_MEASURED, NotMeasured, lines_of, stored, table
from extras.report import results_table

MAIN = "T+A_KD+V"  # the paper's best set of features
CONTEXT, CONCAT, MAGT = "Context", "Concat", "MAGT"


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
    """Does the conversation add to a prompt that holds the past already? From the intervals of gather.py."""
    compared, alone = stored("meld-words")["comparisons"], stored("meld-metrics")["rows"]["T"]
    parts = ["Does the conversation add to a prompt that holds the past already?"]
    for c in sorted(compared, key=lambda c: -c["difference"]):
        (name,) = re.findall(rf"^({MAGT}|{CONTEXT}) ", c["pair"]) or [None]
        if name is None:
            continue
        answer = "no clear answer" if c["low"] <= 0 <= c["high"] else "yes" if c["low"] > 0 else "no, it takes away"
        gap = f"{c['difference']:+.2f}, 95 % interval {c['low']:+.2f} to {c['high']:+.2f}"
        parts.append(f"{name} against the words alone: {answer} ({gap}).")
    if len(parts) == 1:
        raise NotMeasured("meld-words")
    single = "The encoder was trained once, so its own luck is in none of these intervals."
    return " ".join([*parts, f"The words alone have {number(alone)}. {single} {machine_of('meld-metrics')}"])


def options_table() -> str:
    """MELD's stage 2 on the same features: as it is, causal, with class weights."""
    runs = {"as it is": stored("meld-metrics")["rows"]}
    for what, name in (("causal", "meld-causal"), ("class weights", "meld-weights")):
        try:
            runs[what] = stored(name)["rows"]
        except NotMeasured:
            runs[what] = None
    if runs["causal"] is runs["class weights"] is None:
        raise NotMeasured("meld-causal")
    rows = []
    for fusion in (name for name in runs["as it is"] if " " in name):
        for what, found in runs.items():
            row = (found or {}).get(fusion)
            rows.append([fusion, what, *(cells(row) if row else [NOT_MEASURED, "", "", ""])])
    return table(["model", "stage 2", "accuracy", "W-F1", "M-F1", "W-F1, test-selected"], rows)


def options_text() -> str:
    """What the past alone costs MAGT on MELD, and what class weights do to both scores."""
    base = stored("meld-metrics")["rows"]
    (name,) = [row for row in base if row.startswith(f"{MAGT} ")]
    says = []
    for run, what in (("meld-causal", "Reading the past alone"), ("meld-weights", "Class weights")):
        row = stored(run)["rows"][name]
        gaps = [row[k]["mean"] - base[name][k]["mean"] for k in ("weighted_f1", "macro_f1")]
        noise = [max(row[k]["std"], base[name][k]["std"]) for k in ("weighted_f1", "macro_f1")]
        how = [f"{gap:+.2f} of {score} (deviation {n:.2f})" for gap, n, score in zip(gaps, noise, ("W-F1", "M-F1"))]
        says.append(f"{what} changes {MAGT} by {how[0]} and {how[1]}.")
    return " ".join([*says, "(`docs/figures/meld-causal.json`, `docs/figures/meld-weights.json`.)"])


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


def precision_table() -> str:
    """CMU-MOSI in float32 and in bfloat16."""
    found = [("float32", stored("mosi-metrics")), ("bfloat16", stored("mosi-bfloat16"))]
    names = [name for name in found[0][1]["rows"] if name in found[1][1]["rows"]]
    rows = [[name, precision, *cells(run["rows"][name])] for name in names for precision, run in found]
    return table(["model", "precision", "accuracy", "W-F1", "M-F1", "W-F1, test-selected"], rows)


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
        f"{noise:.2f} (`docs/figures/demo-causal.json`)."
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
