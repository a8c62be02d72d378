"""README.md and docs/ from the stored results: every table and every measured number in them.

    python -m extras.docs          # fills the pages again from docs/figures/ and bench/results/

In a page a block stands between <!-- table NAME --> or <!-- text NAME --> and <!-- end -->; BLOCKS below says how each
is made. Whatever was not measured reads "not measured". A sentence with a verdict is computed here, so that it says
what the numbers say. tests/test_readme.py holds that running this changes nothing.

Not here: the pieces themselves (docs_runs.py, docs_measured.py), what is in docs/figures/ (gather.py), the measuring.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data import replace_file
from extras import docs_measured as measured
from extras import docs_runs as runs
from extras.docs_stored import FIGURES, NOT_MEASURED, ROOT, NotMeasured, fenced, picture, stored, table
from extras.experiments import comparison_table
from extras.report import results_table

BLOCK = re.compile(r"(<!-- (?:table|text) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

BLOCKS: dict[str, Callable[[], str]] = {
    "meld": partial(runs.short_table, "meld-metrics"),
    "meld-verdict": runs.meld_text,
    "meld-options": runs.options_table,
    "meld-options-verdict": runs.options_text,
    "meld-words": lambda: comparison_table(stored("meld-words")["comparisons"]),
    "meld-confusion": partial(picture, "meld-confusion.png", "Confusion matrix of MAGT on MELD, words alone"),
    "meld-classes": partial(runs.per_class, "meld-metrics"),
    "meld-predict": lambda: fenced(FIGURES / "meld-predict.txt"),
    "mosi": partial(runs.short_table, "mosi-metrics"),
    "mosi-verdict": runs.mosi_text,
    "precision": runs.precision_table,
    "demo": partial(runs.short_table, "demo-metrics"),
    "demo-verdict": runs.demo_text,
    "demo-files": runs.demo_files,
    "demo-losses": partial(picture, "demo-losses.png", "Losses over the epochs"),
    "demo-tsne": partial(picture, "demo-tsne.png", "t-SNE of the features"),
    "demo-gates": partial(picture, "demo-gates.png", "Mean gates"),
    "demo-confusion": partial(picture, "demo-confusion.png", "Confusion matrix of MAGT on the demo"),
    "demo-sweep": partial(picture, "demo-sweep.png", "W-F1 over alpha and beta"),
    "speed-figure": partial(picture, "speed.png", "Stage 1 with and without the caches; stage 2 in both precisions"),
    "demo-predict": lambda: fenced(FIGURES / "demo-predict.txt"),
    "ablation": lambda: results_table(stored("demo-metrics")),
    "ablation-verdict": runs.ablation_text,
    "bootstrap": lambda: comparison_table(stored("demo-metrics")["comparisons"]),
    "presets": lambda: table(runs.presets()[0], runs.presets()[2:]),
    "presets-verdict": runs.presets_text,
    "sweep-verdict": runs.sweep_text,
    "causal": partial(runs.two_runs, "demo-causal", ("whole conversation", "causal")),
    "causal-verdict": runs.causal_text,
    "weights": runs.weights_table,
    "weights-verdict": runs.weights_text,
    "bench": lambda: table(["claim or question", "measured", "verdict"], measured.bench_rows()),
    "bench-short": measured.bench_short,
    "bench-where": measured.bench_where,
    "speed-stage1": measured.speed_stage1,
    "speed-stage2": measured.speed_stage2,
    "speed-padding": measured.speed_padding,
    "speed-where": measured.speed_where,
    "own-row": measured.own_row,
    "never": measured.never_measured,
    "hostile": measured.hostile_text,
    "losses": measured.losses_table,
    "losses-verdict": measured.losses_text,
    "course": measured.course_table,
    "course-1": partial(measured.course_text, "1. gradient into the teacher"),
    "course-2": partial(measured.course_text, "2. raw dot products in L_f"),
    "course-3": lambda: " ".join(measured.course_text(name) for name in ("3. gates closed", "3. gates open")),
    "course-4": partial(measured.course_text, "4. Context instead of MAGT"),
}


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
