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

import numpy as np
import torch
from tqdm import tqdm

import magtkd
from data import Conversations, FeatureFile, InputError, read_features, replace_file, standardise
from extras import report
from extras.variants import Released, released
from fusion import MAGT
from magtkd import CONFIGS, Config, Run, feature_sets, number, open_run, read_config, run_command, train_fusion

GRID = (0.0, 0.3, 0.7, 1.0)  # with a modality switched off, and the paper's order of size for IEMOCAP


@dataclasses.dataclass(frozen=True)
class Study:
    config: Config
    corpus: str  # its Table 1 and its differences; "demo": synthetic
    file: FeatureFile
    run: Run
    seeds: range
    device: torch.device

    def train(self, name: str, cells: dict[str, tuple[Config, Released]]) -> dict[str, list[dict]]:
        """Trains MAGT with each cell's options and each seed; each training leaves a file in the folder `name`."""
        folder = self.run.out / name
        folder.mkdir(exist_ok=True)
        kinds = [k for k in self.file.features if k.removesuffix("_kd") in self.config.modalities]
        data = Conversations(self.file, *feature_sets(kinds, False), self.device)
        results: dict[str, list[dict]] = {cell: [] for cell in cells}
        todo = [(cell, *how, seed) for cell, how in cells.items() for seed in self.seeds]
        for cell, config, how, seed in tqdm(todo, desc=name, unit=" trainings", disable=None):
            build = MAGT if how == Released() else how.model  # the same weights; the file says MAGT
            variant = {"loss": how.loss, "adjust": how.recipe, "keep_weights": False}
            path = folder / f"{cell}-seed{seed}"
            results[cell].append(train_fusion("MAGT", build, data, config, path, seed, self.run, **variant))
        return results


def sweep(study: Study, values: list[float]) -> str:
    """Figure 5: MAGT over a grid of alpha and beta. Leaves sweep.md and a figure; returns the table of W-F1."""
    values, out, many = sorted(set(values)), study.run.out, len(study.seeds) > 1
    names = {(a, b): f"alpha{a!r}-beta{b!r}".replace(".", "_") for a in values for b in values}
    cells = {n: (dataclasses.replace(study.config, alpha=a, beta=b), Released()) for (a, b), n in names.items()}
    results = study.train("sweep", cells)
    cell = {weights: report.summary(results[name]) for weights, name in names.items()}
    best = max(cell, key=lambda weights: cell[weights]["dev_f1"]["mean"])
    f1, head = {weights: x["weighted_f1"] for weights, x in cell.items()}, [f"{x:g}" for x in values]
    lines = [[f"**{a:g}**", *(report.spread(f1[a, b], many) for b in values)] for a in values]
    table = report.table(["alpha \\ beta", *head], lines)
    means = np.array([[f1[a, b]["mean"] for b in values] for a in values])
    side = 1.8 + 0.75 * len(values)
    with report.figure(out / "figures" / "sweep.png", 1, side, side) as (_, (ax,)):
        report.grid(ax, means, "{:.1f}", means.min() - 1, means.max() + 1, head)
        ax.plot(values.index(best[1]), values.index(best[0]) + 0.3, "k^", markeredgecolor="white")
        ax.set(xlabel="beta (video)", ylabel="alpha (audio)", title="W-F1 on test; triangle: best on dev")
    text = f"""# MAGT over a grid of alpha and beta

{report.SYNTHETIC * (study.corpus == "demo")}W-F1 on test, the epoch chosen on dev; seeds: {len(study.seeds)}.

{table}

From the lowest to the highest cell: {means.max() - means.min():.2f}.
Standard deviation over the seeds of a cell: {np.mean([x["std"] for x in f1.values()]):.2f}.
Dev would choose alpha {best[0]:g}, beta {best[1]:g} (triangle): test {f1[best]["mean"]:.2f}.

![W-F1 over alpha and beta](figures/sweep.png)
"""
    replace_file(out / "sweep.md", lambda path: path.write_text(text, encoding="utf-8"))
    return f"{table}\n\nMore: {out / 'sweep.md'}"


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
        "row13": ("13: more dropout, initial weights", only("more_dropout", "initial_weights")),
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
        found = report.summary(results[name])
        shown = [report.spread(x) for x in (found["weighted_f1"], found["macro_f1"])]
        change = report.moved(c) if name != "paper" else ["", ""]
        lines.append([what, *shown, *change, report.spread(found["test_selected"]["weighted_f1"])])
    head = ["row of docs/differences.md", "W-F1", "M-F1", "against the paper", "95 % interval", "test-selected (16)"]
    table = report.table(head, lines)
    text = f"""# The paper's stage 2 against the authors' code

{report.SYNTHETIC * (study.corpus == "demo")}MAGT; seeds: {len(study.seeds)}. Each row changes one thing, the last all.
Differences are of weighted F1, seeds paired, with a bootstrap interval over conversations. Row 16, the epoch chosen on
test, is a column.

{table}
"""
    replace_file(study.run.out / "presets.md", lambda path: path.write_text(text, encoding="utf-8"))
    return f"{table}\n\nMore: {study.run.out / 'presets.md'}"


def open_study(args: argparse.Namespace) -> Study:
    seeds, device = range(args.seeds), torch.device(args.device)
    if args.features:
        file, config = standardise(read_features(args.features))[0], CONFIGS[args.corpus]
        out = args.out or Path("runs") / f"{args.features.stem}-{args.command}"
        run = open_run(out, {"corpus": args.corpus, "features": True, "experiment": args.command}, args.fresh)
        return Study(config, args.corpus, file, run, seeds, device)
    config, options = read_config(args.run)
    if options["features"] or not (args.run / "features.safetensors").is_file():
        raise InputError(f"{args.run} has no features.safetensors; finish the run, or give its file: --features")
    file = read_features(args.run / "features.safetensors")
    return Study(config, options["corpus"], file, open_run(args.run, {}), seeds, device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.sh", description="Experiments on the features of a finished run.")
    add = parser.add_argument
    add("command", choices=["sweep", "presets"], help="sweep: alpha and beta; presets: the authors' differences")
    add("--run", type=Path, default=Path("runs/demo"), help="a finished run (default: runs/demo)")
    add("--features", type=Path, help="instead of a run: a feature file")
    add("--out", type=Path, help="with --features: the folder of the results")
    add("--corpus", choices=list(CONFIGS), default="iemocap", help="with --features: whose Table 1 (default: iemocap)")
    add("--grid", type=number(float, 0, 1000), nargs="+", default=list(GRID), help="sweep (default: 0 0.3 0.7 1)")
    add("--seeds", type=number(int, 1, 100), default=3, help="trainings of each cell (default: 3)")
    add("--device", type=magtkd.device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--fresh", action="store_true", help="with --features: train again")
    args = parser.parse_args(argv)

    def work() -> None:
        study = open_study(args)
        print(f"\n{sweep(study, args.grid) if args.command == 'sweep' else presets(study)}")

    return run_command(args.command, work, "stopped; the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
