"""The paper's experiments beyond Table 3, and what tells their results from noise.

    --ablation          a paired bootstrap over conversations for each pair of fusions; t-SNE (Figure 4); mean gates
    --sweep             W-F1 over a grid of alpha and beta (Figure 5)
    --compare-presets   the paper's reading of stage 2 against the authors' code, one difference at a time

All work on finished features: stage 1 is not repeated. Each training of a sweep or a comparison leaves a file, and a
second start continues after the last one; their weights are not kept.

Not here: the training itself (magtkd.py), the drawing (figures.py).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Conversations, FeatureFile, replace_file
from extras import figures
from extras.context import Context
from extras.released import RELEASED, Differences, build
from extras.report import SCORES, mean_std
from fusion import MAGT
from magtkd import Config, Method, load_fusion, scores, train_fusion

GRID = (0.0, 0.3, 0.7, 1.0)  # with a modality switched off, and the paper's order of size for IEMOCAP
MADE_UP = "**The corpus is made up: these numbers say that the code works, nothing about people.**\n\n"


# Is a difference noise?


def confusions(runs: list[dict], conversation: torch.Tensor, num_classes: int) -> np.ndarray:
    """Counts of (label, prediction) per seed and conversation: int64 [seeds, conversations, C, C].

    runs: per seed {"labels", "predictions"}, of N utterances; conversation: [N], the number of each one's.
    """
    _, number = conversation.unique(return_inverse=True)
    counts = np.zeros((len(runs), int(number.max()) + 1, num_classes, num_classes), dtype=np.int64)
    for seed, run in enumerate(runs):
        np.add.at(counts[seed], (number.numpy(), run["labels"], run["predictions"]), 1)
    return counts


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """In percent, from counts [..., C, C] of (label, prediction); [...]."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(-1), confusion.sum(-2)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return 100 * (f1 * support).sum(-1) / support.sum(-1)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, samples: int = 5000, seed: int = 0) -> tuple[float, float, float]:
    """The difference of weighted F1, a - b, mean over seeds, and its 95 % interval: (difference, low, high).

    a, b: `confusions` of two models on the same utterances, seed by seed. Conversations are drawn with replacement, as
    many as there are, the same for both models and all seeds: utterances of one conversation are no independent cases.
    The interval says how much hangs on the choice of the test conversations; what hangs on the seed, it does not.
    """
    n = a.shape[1]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)  # [samples, n]
    drawn = [weighted_f1(np.einsum("bn,snij->bsij", draws, x, optimize=True)).mean(1) for x in (a, b)]
    difference = (weighted_f1(a.sum(1)) - weighted_f1(b.sum(1))).mean()
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return float(difference), float(low), float(high)


def compare(file: FeatureFile, pairs: list[tuple[str, list[dict], list[dict]]]) -> list[dict]:
    """Per pair (name, runs of a, runs of b): {"pair", "difference" of weighted F1, "std" over seeds, "low", "high"}."""
    conversation = file.conversation[file.split == 2]
    result = []
    for name, *runs in pairs:
        a, b = (confusions(r, conversation, len(file.label_names)) for r in runs)
        difference, low, high = paired_bootstrap(a, b)
        _, std = mean_std((weighted_f1(a.sum(1)) - weighted_f1(b.sum(1))).tolist())
        result.append({"pair": name, "difference": difference, "low": low, "high": high, "std": std})
    return result


def comparison_table(comparisons: list[dict]) -> str:
    lines = ["| pair | difference of W-F1 | 95 % interval |", "|---|---|---|"]
    lines += [
        f"| {c['pair']} | {c['difference']:+.2f} ± {c['std']:.2f} | {c['low']:+.2f} to {c['high']:+.2f} |"
        for c in comparisons
    ]
    return "\n".join(lines)


# The ablation


def with_context(method: Method) -> Method:
    """The same with Context as well, between Concat and MAGT."""
    models = {"Concat": method.models["Concat"], "Context": Context, "MAGT": method.models["MAGT"]}
    return method._replace(models=models)


def ablation(file: FeatureFile, rows: dict[str, list[dict]], out: Path) -> dict:
    """Compares the fusions over each feature set, and draws t-SNE and gates.

    Returns for the report: {"comparisons": of `compare`, "section": Markdown}.
    """
    pairs, gates = [], {}
    (out / "figures").mkdir(exist_ok=True)
    for row, runs in rows.items():
        if row.startswith("MAGT"):
            concat, context = (row.replace("MAGT", other) for other in ("Concat", "Context"))
            pairs += [(f"{row} - Concat", runs, rows[concat]), (f"{row} - Context", runs, rows[context])]
            pairs.append((f"{context} - Concat", rows[context], rows[concat]))
            paths = [out / "fusion" / f"{row.replace(' ', '-')}-seed{r['seed']}.safetensors" for r in runs]
            gates[row] = np.mean([mean_gates(*load_fusion(path, build), file) for path in paths], axis=0)
    comparisons = compare(file, pairs)
    figures.gate_figure(out / "figures" / "gates.png", gates)
    section = f"## Is it noise?\n\n{comparison_table(comparisons)}\n\n"
    section += (
        "Differences of weighted F1 on test, seeds paired; ± is their standard deviation over seeds. The interval "
    )
    section += "is a paired bootstrap over conversations: one that holds 0 may be the choice of test conversations.\n\n"
    section += "## Whom do the anchors listen to?\n\nThe mean gate of each stream on test (Eq. 21): 1 lets all of what "
    section += "an anchor read from a source pass, 0 nothing.\n\n![Mean gates](figures/gates.png)\n"
    if figures.tsne_figure(out / "figures" / "tsne.png", file):
        section += "\n## Features\n\nEach encoder's features of test in two dimensions (Figure 4).\n\n"
        section += "![t-SNE of the features](figures/tsne.png)\n"
    return {"comparisons": comparisons, "section": section}


@torch.inference_mode()
def mean_gates(model: MAGT, kinds: tuple[str, ...], file: FeatureFile) -> np.ndarray:
    """The mean of each stream's gate (Eq. 21) over the utterances of test and the width: [anchors, sources].

    Both in the order of model.config.widths. Read by wrapping Anchor.alpha; model on the CPU.
    """
    data = Conversations(file, kinds, torch.device("cpu"))
    names = list(model.config.widths)
    total = np.zeros((len(names), len(names)))

    def listen(anchor, row: int):
        alpha = type(anchor).alpha

        def heard(source: str, h: torch.Tensor) -> torch.Tensor:
            gate = alpha(anchor, source, h)  # [N, D]
            total[row, names.index(source)] += float(gate.mean(-1).sum())
            return gate

        anchor.alpha = heard

    for row, name in enumerate(names):
        listen(model.anchor[name], row)
    batch = data.batch(data.splits["test"])
    model(*batch.inputs)
    for anchor in model.anchor.values():
        del anchor.alpha
    return total / len(batch.labels)


# Many trainings of MAGT


@dataclass(frozen=True)
class Study:
    """What a sweep and a comparison work on."""

    config: Config
    method: Method
    file: FeatureFile
    kinds: tuple[str, ...]  # of features
    seeds: range
    out: Path  # the run's folder
    device: torch.device
    made_up: bool

    def train(self, name: str, cells: dict[str, tuple[Config, Method]]) -> dict[str, list[dict]]:
        """Trains MAGT with each configuration, method and seed. Returns the results of train_fusion, which are kept.

        name: a folder of the run. cells: file name (without a dot) -> (configuration, method).
        """
        folder = self.out / name
        folder.mkdir(exist_ok=True)
        data, C = Conversations(self.file, self.kinds, self.device), len(self.file.label_names)
        results: dict[str, list[dict]] = {cell: [] for cell in cells}
        todo = [(cell, *how, seed) for cell, how in cells.items() for seed in self.seeds]
        for cell, config, method, seed in tqdm(todo, desc=name, unit=" trainings", disable=None):
            path = folder / f"{cell}-seed{seed}"
            results[cell].append(train_fusion("MAGT", data, C, config, path, seed, method))
            Path(f"{path}.safetensors").unlink(missing_ok=True)
        return results


def summary(runs: list[dict]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds of each score on test, and of weighted F1 on dev."""
    test = [scores(r["labels"], r["predictions"]) for r in runs]
    return {s: mean_std([x[s] for x in test]) for s in SCORES} | {"dev": mean_std([r["dev_f1"] for r in runs])}


def sweep(study: Study, grid: list[float]) -> str:
    """Figure 5: MAGT over a grid of alpha and beta. Leaves sweep.md and a figure; returns the table of W-F1."""
    grid, out, seeds = sorted(set(grid)), study.out, study.seeds
    names = {(a, b): f"alpha{a:g}-beta{b:g}".replace(".", "_") for a in grid for b in grid}
    configs = {name: dataclasses.replace(study.config, alpha=a, beta=b) for (a, b), name in names.items()}
    results = study.train("sweep", {name: (config, study.method) for name, config in configs.items()})
    cell = {weights: summary(results[name]) for weights, name in names.items()}
    best = max(cell, key=lambda weights: cell[weights]["dev"][0])

    tables = []
    for key, title in (("weighted_f1", "W-F1"), ("macro_f1", "M-F1")):
        lines = [
            f"| {title}, alpha \\ beta | " + " | ".join(f"{b:g}" for b in grid) + " |",
            "|---" * (len(grid) + 1) + "|",
        ]
        for a in grid:
            numbers = [
                f"{m:.2f} ± {s:.2f}" if len(seeds) > 1 else f"{m:.2f}" for m, s in (cell[a, b][key] for b in grid)
            ]
            lines.append(f"| **{a:g}** | " + " | ".join(numbers) + " |")
        tables.append("\n".join(lines))
    means = np.array([[cell[a, b]["weighted_f1"][0] for b in grid] for a in grid])
    figures.heat_figure(out / "figures" / "sweep.png", means, grid, (grid.index(best[0]), grid.index(best[1])))
    spread = means.max() - means.min()
    noise = np.mean([scores["weighted_f1"][1] for scores in cell.values()])
    text = f"# MAGT over a grid of alpha and beta\n\n{MADE_UP if study.made_up else ''}"
    text += f"Weighted and macro F1 on test, {len(seeds)} seeds, the epoch chosen on dev.\n\n" + "\n\n".join(tables)
    text += f"\n\nFrom the lowest to the highest cell: {spread:.2f}; deviation over the seeds of a cell: {noise:.2f}. "
    text += f"Dev would choose alpha {best[0]:g}, beta {best[1]:g} (framed): test {cell[best]['weighted_f1'][0]:.2f}.\n"
    text += "\n![W-F1 over alpha and beta](figures/sweep.png)\n"
    replace_file(out / "sweep.md", lambda part: part.write_text(text, encoding="utf-8"))
    return tables[0]


def differences(corpus: str) -> dict[str, tuple[str, Differences]]:
    """The paper's stage 2, each row of docs/differences.md alone, and all: file name -> (what, differences)."""
    released = RELEASED[corpus]

    def only(*names: str) -> Differences:
        return Differences(**{name: getattr(released, name) for name in names})

    return {
        "paper": ("the paper", only()),
        "row9": ("9: one block and gate for the text anchor", only("shared_text_anchor")),
        "row10": ("10: ReLU inside the gate", only("relu_gate")),
        "row11": ("11: positions and speakers twice", only("tags_twice")),
        "row14": ("14: cross entropy on the branches", only("branch_cross_entropy", "feature_loss")),
        "row15": ("15: gradient into the teacher", only("detach_teacher")),
        "row17": ("17: half of the steps are warm-up", only("warmup")),
        "row22": ("22: no LayerNorm on the input", only("input_norm")),
        "released": ("all of them: --preset released", released),
    }


def compare_presets(study: Study, corpus: str) -> str:
    """MAGT as the paper describes it against the authors' code. Leaves presets.md in the run; returns the table."""
    rows, seeds = differences(corpus), study.seeds
    results = study.train("presets", {name: (study.config, one.method()) for name, (_, one) in rows.items()})
    compared = compare(study.file, [(name, runs, results["paper"]) for name, runs in results.items()])
    lines = ["| row of Differences | W-F1 | M-F1 | against the paper | 95 % interval | W-F1, test-selected (16) |"]
    lines.append("|---|---|---|---|---|---|")
    for (name, (what, _)), c in zip(rows.items(), compared):
        s = summary(results[name])
        selected = mean_std([r["test_selected"]["weighted_f1"] for r in results[name]])
        moved = ["", ""]
        if name != "paper":
            moved = [f"{c['difference']:+.2f} ± {c['std']:.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}"]
        shown = [f"{m:.2f} ± {d:.2f}" for m, d in (s["weighted_f1"], s["macro_f1"])]
        lines.append(f"| {' | '.join([what, *shown, *moved, f'{selected[0]:.2f} ± {selected[1]:.2f}'])} |")
    table = "\n".join(lines)
    text = f"# The paper's stage 2 against the authors' code\n\n{MADE_UP if study.made_up else ''}"
    text += (
        f"MAGT, {len(seeds)} seeds. Each row changes one thing; the last changes all. Differences are of weighted F1, "
    )
    text += (
        "seeds paired, with a bootstrap interval over conversations. Row 16, the epoch chosen on test, is a column.\n\n"
    )
    text += f"{table}\n"
    replace_file(study.out / "presets.md", lambda part: part.write_text(text, encoding="utf-8"))
    return table
