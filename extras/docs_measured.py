"""The pieces of README.md and docs/ that come from the benchmark, the speed, the losses and the exercises.

Not here: runs (docs_runs.py).
"""

from statistics import median

from extras.anatomy_page import BIASED
from extras.docs_stored import BENCH, FIGURES, NOT_MEASURED, NotMeasured, lines_of, stored, table

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


def own_row() -> str:
    """What a user should try on a corpus of her own, from the study of docs/anatomy.md."""
    said, gains = [], []
    for name, where in (("demo", "the made-up demo"), ("mosi", "CMU-MOSI")):
        row = [row for row in stored(f"anatomy-{name}")["rows"] if row["model"] == BIASED][-1]  # the most modalities
        c = row["against MAGT"]
        gains.append(c["low"] > 0)
        said.append(f"{c['difference']:+.2f} ({c['low']:+.2f} to {c['high']:+.2f}) on {where}")
    advice = "Try it on a corpus of your own" if all(gains) else "No sure gain: try both on a corpus of your own"
    return (
        "One learned number per stream and head, which tells an utterance its own row in the other modalities, changes "
        f"MAGT's W-F1 by {' and '.join(said)}; 95 % intervals in brackets. {advice}, with `--anatomy`."
    )


def never_measured() -> str:
    """What was never measured, as far as stored files can tell."""
    found = [*BENCH.glob("*.json"), *(BENCH / "gpu").glob("*.json")]
    cards = sorted({path.stem for path in found} - {"cpu", "toy"})  # toy: bench.gpu tried at toy sizes
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


def hostile_text() -> str:
    """How many cases `python -m tests.hostile` tried, of which kinds, and how many failed."""
    found = stored("hostile")
    counts, failures = found["counts"], found["failures"]
    failed = {kind: sum(line.startswith(f"{kind}: ") for line in failures) for kind in counts}
    rows = [[kind, f"{n:,}", str(failed[kind])] for kind, n in counts.items()]
    return (
        f"{table(['damaged at random', 'cases', 'failed'], rows)}\n\nThe last run: {sum(counts.values()):,} cases in "
        f"{found['seconds']:,} s, seed {found['seed']}; {len(failures) or 'none'} failed (`docs/figures/hostile.json`)."
    )
