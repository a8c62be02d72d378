"""Two experiments on the features of a finished run, or on a feature file; stage 1 is not repeated.

    bash run.sh sweep --run runs/demo          W-F1 over a grid of alpha and beta (Figure 5)
    bash run.sh presets --run runs/demo        what each of the authors' differences in stage 2 is worth
    bash run.sh sweep --features my.safetensors --out runs/my-sweep --corpus iemocap

Each training leaves a file in the run's folder, under sweep/ or presets/; a second start resumes after the last one.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import magtkd
from data import Conversations, FeatureFile, InputError, read_features, replace_file, scores, standardise
from extras import report
from extras.variants import Released, released
from fusion import MAGT
from magtkd import CONFIGS, Config, Run, feature_sets, number, open_run, read_config, run_command, train_fusion

GRID = (0.0, 0.3, 0.7, 1.0)  # with a modality switched off, and the paper's order of size for IEMOCAP
MOST = 12  # values of a sweep: it trains each with each


@dataclasses.dataclass(frozen=True)
class Study:
    """What both experiments work on."""

    config: Config
    corpus: str  # whose differences --preset released has
    file: FeatureFile
    run: Run
    seeds: range
    device: torch.device
    synthetic: bool

    def train(self, name: str, cells: dict[str, tuple[Config, Released]]) -> dict[str, list[dict]]:
        """Trains MAGT with each configuration and each seed. Returns the results of train_fusion, by cell.

        name: a folder in the run's. cells: file name -> options and differences.
        """
        folder = self.run.out / name
        folder.mkdir(exist_ok=True)
        (kinds,) = feature_sets(
            [k for k in self.file.features if k.removesuffix("_kd") in self.config.modalities], False
        )
        data = Conversations(self.file, kinds, self.device)
        results: dict[str, list[dict]] = {cell: [] for cell in cells}
        todo = [(cell, *how, seed) for cell, how in cells.items() for seed in self.seeds]
        for cell, config, how, seed in tqdm(todo, desc=name, unit=" trainings", disable=None):
            build = MAGT if how == Released() else how.model  # the same weights; the file says MAGT
            variant = {"loss": how.loss, "adjust": how.recipe, "keep_weights": False}
            results[cell].append(
                train_fusion("MAGT", build, data, config, folder / f"{cell}-seed{seed}", seed, self.run, **variant)
            )
        return results


def summary(runs: list[dict]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds of the scores on test, and of weighted F1 on dev."""
    test = [scores(r["labels"], r["predictions"]) for r in runs]
    found = {s: report.mean_std([x[s] for x in test]) for s in ("weighted_f1", "macro_f1")}
    return found | {"dev": report.mean_std([r["dev_f1"] for r in runs])}


def sweep(study: Study, values: list[float]) -> str:
    """Figure 5: MAGT over a grid of alpha and beta. Leaves sweep.md and a figure; returns the table of W-F1."""
    values, out, many = sorted(set(values)), study.run.out, len(study.seeds) > 1
    names = {(a, b): f"alpha{a!r}-beta{b!r}".replace(".", "_") for a in values for b in values}
    cells = {n: (dataclasses.replace(study.config, alpha=a, beta=b), Released()) for (a, b), n in names.items()}
    results = study.train("sweep", cells)
    cell = {weights: summary(results[name]) for weights, name in names.items()}
    best = max(cell, key=lambda weights: cell[weights]["dev"][0])
    head = [f"{x:g}" for x in values]
    tables = [
        report.table(
            [f"{title}, alpha \\ beta", *head],
            [[f"**{a:g}**", *(report.spread(cell[a, b][key], many) for b in values)] for a in values],
        )
        for key, title in (("weighted_f1", "W-F1"), ("macro_f1", "M-F1"))
    ]
    means = np.array([[cell[a, b]["weighted_f1"][0] for b in values] for a in values])
    (out / "figures").mkdir(exist_ok=True)
    with plt.rc_context(report.STYLE):
        fig, ax = plt.subplots(figsize=(1.8 + 0.75 * len(values),) * 2)
        report.grid(ax, means, "{:.1f}", means.min() - 1, means.max() + 1, head, head)
        corner = (values.index(best[1]) - 0.5, values.index(best[0]) - 0.5)
        ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, linewidth=3, edgecolor="black"))
        ax.set(xlabel="beta (video)", ylabel="alpha (audio)", title="W-F1 on test; framed: best on dev")
        report.save(fig, out / "figures" / "sweep.png")
    noise = np.mean([found["weighted_f1"][1] for found in cell.values()])
    synthetic = report.SYNTHETIC if study.synthetic else ""
    text = f"""# MAGT over a grid of alpha and beta

{synthetic}Weighted and macro F1 on test, the epoch chosen on dev; {len(study.seeds)} seeds.

{tables[0]}

{tables[1]}

From the lowest to the highest cell: {means.max() - means.min():.2f}.
Standard deviation over the seeds of a cell: {noise:.2f}.
Dev would choose alpha {best[0]:g}, beta {best[1]:g} (framed): test {cell[best]["weighted_f1"][0]:.2f}.

![W-F1 over alpha and beta](figures/sweep.png)
"""
    replace_file(out / "sweep.md", lambda path: path.write_text(text, encoding="utf-8"))
    return f"{tables[0]}\n\nMore: {out / 'sweep.md'}"


def differences(corpus: str) -> dict[str, tuple[str, Released]]:
    """The paper's stage 2, each row of docs/differences.md alone, and all: file name -> (what, differences)."""
    everything = released(corpus)

    def only(*names: str) -> Released:
        return Released(**{name: getattr(everything, name) for name in names})

    return {
        "paper": ("the paper", only()),
        "row9": ("9: one block and gate for the text anchor", only("shared_text_anchor")),
        "row10": ("10: ReLU inside the gate", only("relu_gate")),
        "row11": ("11: positions and speakers twice", only("added_twice")),
        "row13": ("13: more dropout, Xavier", only("more_dropout", "xavier")),
        "row14": ("14: cross entropy on the branches", only("branch_cross_entropy", "feature_loss")),
        "row15": ("15: gradient into the teacher", only("detach_teacher")),
        "row17": ("17: half of the steps are warm-up, no decay", only("schedule")),
        "row22": ("22: no LayerNorm on the input", only("input_norm")),
        "row23": ("23: weight decay 1e-6, clip 10", only("optimizer")),
        "released": ("all of them: --preset released", everything),
    }


def presets(study: Study) -> str:
    """MAGT as the paper describes it against the authors' code. Leaves presets.md in the run; returns the table."""
    rows = differences(study.corpus)
    results = study.train("presets", {name: (study.config, how) for name, (_, how) in rows.items()})
    compared = report.compare(study.file, [(name, runs, results["paper"]) for name, runs in results.items()])
    lines = []
    for (name, (what, _)), c in zip(rows.items(), compared):
        found = summary(results[name])
        selected = report.mean_std([r["test_selected"]["weighted_f1"] for r in results[name]])
        moved = [f"{c['difference']:+.2f} ± {c['std']:.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}"]
        shown = [report.spread(found[k]) for k in ("weighted_f1", "macro_f1")]
        lines.append([what, *shown, *(moved if name != "paper" else ["", ""]), report.spread(selected)])
    head = [
        "row of docs/differences.md",
        "W-F1",
        "M-F1",
        "against the paper",
        "95 % interval",
        "W-F1, test-selected (16)",
    ]
    table = report.table(head, lines)
    synthetic = report.SYNTHETIC if study.synthetic else ""
    text = f"""# The paper's stage 2 against the authors' code

{synthetic}MAGT, {len(study.seeds)} seeds. Each row changes one thing, the last row changes all.
Differences are of weighted F1, seeds paired, with a bootstrap interval over conversations. Row 16, the epoch chosen on
test, is a column.

{table}
"""
    replace_file(study.run.out / "presets.md", lambda path: path.write_text(text, encoding="utf-8"))
    return f"{table}\n\nMore: {study.run.out / 'presets.md'}"


def open_study(args: argparse.Namespace) -> Study:
    seeds, device = range(args.seed, args.seed + args.seeds), torch.device(args.device)
    if args.features:
        file, config = standardise(read_features(args.features))[0], CONFIGS[args.corpus]
        out = args.out or Path("runs") / f"{args.features.stem}-{args.command}"
        run = open_run(out, {"corpus": args.corpus, "features": True, "experiment": args.command}, args.fresh)
        return Study(config, args.corpus, file, run, seeds, device, synthetic=False)
    config, options = read_config(args.run)
    if options["features"] or not (args.run / "features.safetensors").is_file():
        raise InputError(
            f"{args.run} has no features.safetensors; finish the run, or give its feature file: --features"
        )
    made_with = magtkd.read_json(args.run / magtkd.MARKER).get("options") or {}
    run = open_run(args.run, made_with, notes={k: x for k, x in options.items() if k not in made_with})
    file, corpus = read_features(args.run / "features.safetensors"), options["corpus"]
    return Study(config, corpus, file, run, seeds, device, synthetic=corpus == "demo")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.sh", description="Experiments on the features of a finished run.")
    add = parser.add_argument
    add("command", choices=["sweep", "presets"], help="sweep: alpha and beta; presets: the authors' differences")
    add("--run", type=Path, default=Path("runs/demo"), help="a finished run (default: runs/demo)")
    add("--features", type=Path, help="instead of a run: a feature file")
    add("--out", type=Path, help="with --features: the folder of the results")
    add("--corpus", choices=list(CONFIGS), default="iemocap", help="with --features: whose Table 1 (default: iemocap)")
    add(
        "--grid",
        type=number(float, 0, 1000),
        nargs="+",
        default=list(GRID),
        help="sweep: the weights (default: 0 0.3 0.7 1)",
    )
    add("--seeds", type=number(int, 1, 100), default=3, help="trainings of each cell (default: 3)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="the first seed (default: 0)")
    add("--device", type=magtkd.device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--fresh", action="store_true", help="with --features: train again")
    args = parser.parse_args(argv)
    if len(args.grid) > MOST:
        parser.error(f"--grid takes {MOST} weights at most: it trains each with each")

    def work() -> None:
        study = open_study(args)
        print(f"\n{sweep(study, args.grid) if args.command == 'sweep' else presets(study)}")

    return run_command(args.command, work)


if __name__ == "__main__":
    sys.exit(main())
