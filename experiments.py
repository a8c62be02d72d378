"""The paper's experiments beyond Table 3, and what tells their results from noise.

    --ablation          a paired bootstrap over conversations for each pair of fusions; t-SNE (Figure 4); mean gates
    --sweep             W-F1 over a grid of alpha and beta (Figure 5)
    --compare-presets   the paper's reading of stage 2 against the authors' code, one difference at a time

All work on finished features: stage 1 is not repeated. Each training of a sweep or a comparison leaves a file, and a
second start goes on after the last one; their weights are not kept.

Not here: the training itself (stage2.py), the drawing (figures.py).
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import figures
from checkpoint import replace
from features import Features
from fusion import MAGT
from report import SCORES, mean_std, scores
from stage2 import Conversations, load_fusion, train_fusion
from training import PRESETS, Config, Preset

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


def compare(features: Features, pairs: list[tuple[str, list[dict], list[dict]]]) -> list[dict]:
    """Per pair (name, runs of a, runs of b): {"pair", "difference" of weighted F1, "std" over seeds, "low", "high"}."""
    conversation = features.conversation[features.split == 2]
    result = []
    for name, *runs in pairs:
        a, b = (confusions(r, conversation, len(features.label_names)) for r in runs)
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


def ablation(features: Features, rows: dict[str, list[dict]], out: Path) -> tuple[list[dict], str]:
    """Compares the fusions over each feature set, and draws t-SNE and gates. Returns (comparisons, report section)."""
    pairs = []
    for row, runs in rows.items():
        if row.startswith("MAGT"):
            others = {f: row.replace("MAGT", f) for f in ("Concat", "Context")}
            pairs += [(f"{row} - {f}", runs, rows[other]) for f, other in others.items()]
            pairs.append((f"{others['Context']} - Concat", rows[others["Context"]], rows[others["Concat"]]))
    comparisons = compare(features, pairs)
    gates = {}
    for row, runs in rows.items():
        if row.startswith("MAGT"):
            places = [out / "fusion" / f"{row.replace(' ', '-')}-seed{r['seed']}.safetensors" for r in runs]
            gates[row] = np.mean([mean_gates(*load_fusion(place), features) for place in places], axis=0)
    figures.gate_figure(out / "figures" / "gates.png", gates)
    section = f"## Is it noise?\n\n{comparison_table(comparisons)}\n\n"
    section += (
        "Differences of weighted F1 on test, seeds paired; ± is their standard deviation over seeds. The interval "
    )
    section += "is a paired bootstrap over conversations: one that holds 0 may be the choice of test conversations.\n\n"
    section += "## Whom do the anchors listen to?\n\nThe mean gate of each stream on test (Eq. 21): 1 lets all of what "
    section += "an anchor read from a source pass, 0 nothing.\n\n![Mean gates](figures/gates.png)\n"
    if figures.tsne_figure(out / "figures" / "tsne.png", features):
        section += "\n## Features\n\nEach encoder's vectors of test in two dimensions (Figure 4).\n\n"
        section += "![t-SNE of the features](figures/tsne.png)\n"
    return comparisons, section


@torch.inference_mode()
def mean_gates(model: MAGT, kinds: tuple[str, ...], features: Features) -> np.ndarray:
    """The mean of each stream's gate (Eq. 21) over the utterances of test and the width: [anchors, sources].

    Both in the order of model.config.widths. Read by hooks on the gates' linear layers; model on the CPU.
    """
    data = Conversations(features, kinds, torch.device("cpu"))
    said: dict[str, list[torch.Tensor]] = {name: [] for name in model.anchor}
    handles = [
        layer.register_forward_hook(lambda _, __, out, said=said[name]: said.append(out))
        for name, anchor in model.anchor.items()
        for layer in set(anchor.gate.values())  # a shared one says a value per stream, in their order
    ]
    total, count = torch.zeros(len(said), len(kinds)), 0
    for conversation in data.of_split[2]:
        model(*data.batch([conversation]).inputs)
        for i, outs in enumerate(said.values()):
            gate = torch.stack(outs)  # [sources, U, D]
            total[i] += torch.sigmoid(gate.relu() if model.config.relu_gate else gate).mean(-1).sum(1)
            outs.clear()
        count += int(data.lengths[conversation])
    for handle in handles:
        handle.remove()
    return (total / count).numpy()


# Many trainings of MAGT


def train_cells(
    cells: dict[str, Config],
    features: Features,
    kinds: tuple[str, ...],
    seeds: range,
    place: Path,
    device: torch.device,
) -> dict[str, list[dict]]:
    """Trains MAGT with each configuration and seed; returns the results of train_fusion. Only they are kept.

    cells: file name (without a dot) -> configuration.
    """
    place.mkdir(exist_ok=True)
    data, C = Conversations(features, kinds, device), len(features.label_names)
    results: dict[str, list[dict]] = {name: [] for name in cells}
    todo = [(name, config, seed) for name, config in cells.items() for seed in seeds]
    for name, config, seed in tqdm(todo, desc=place.name, unit=" trainings", disable=None):
        file = place / f"{name}-seed{seed}"
        results[name].append(train_fusion("MAGT", data, C, config, file, seed, device))
        file.with_suffix(".safetensors").unlink(missing_ok=True)
    return results


def summary(runs: list[dict]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over seeds of each score on test, and of weighted F1 on dev."""
    test = [scores(r["labels"], r["predictions"]) for r in runs]
    return {s: mean_std([x[s] for x in test]) for s in SCORES} | {"dev": mean_std([r["dev_f1"] for r in runs])}


def sweep(
    config: Config,
    features: Features,
    kinds: tuple[str, ...],
    seeds: range,
    grid: list[float],
    out: Path,
    device: torch.device,
    made_up: bool,
) -> str:
    """Figure 5: MAGT over a grid of alpha and beta. Leaves out/sweep.md and a figure; returns the table of W-F1."""
    grid = sorted(set(grid))
    names = {(a, b): f"alpha{a:g}-beta{b:g}".replace(".", "_") for a in grid for b in grid}
    cells = {name: dataclasses.replace(config, alpha=a, beta=b) for (a, b), name in names.items()}
    results = train_cells(cells, features, kinds, seeds, out / "sweep", device)
    cell = {place: summary(results[name]) for place, name in names.items()}
    best = max(cell, key=lambda place: cell[place]["dev"][0])

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
    noise = np.mean([cell[place]["weighted_f1"][1] for place in cell])
    text = f"# MAGT over a grid of alpha and beta\n\n{MADE_UP if made_up else ''}"
    text += f"Weighted and macro F1 on test, {len(seeds)} seeds, the epoch chosen on dev.\n\n" + "\n\n".join(tables)
    text += f"\n\nFrom the lowest to the highest cell: {spread:.2f}; deviation over the seeds of a cell: {noise:.2f}. "
    text += f"Dev would choose alpha {best[0]:g}, beta {best[1]:g} (framed): test {cell[best]['weighted_f1'][0]:.2f}.\n"
    text += "\n![W-F1 over alpha and beta](figures/sweep.png)\n"
    replace(out / "sweep.md", lambda part: part.write_text(text, encoding="utf-8"))
    return tables[0]


def differences(corpus: str) -> dict[str, tuple[str, Preset]]:
    """The paper's stage 2, each row of the README's "Differences" alone, and all: file name -> (what, preset)."""
    released = PRESETS["released"][corpus]
    losses = {"branch_cross_entropy": released.branch_cross_entropy, "feature_loss": released.feature_loss}
    return {
        "paper": ("the paper", Preset()),
        "row9": ("9: one block and gate for the text anchor", Preset({"shared_text_anchor": True})),
        "row10": ("10: ReLU inside the gate", Preset({"relu_gate": True})),
        "row11": ("11: positions and speakers twice", Preset({"tags_twice": True})),
        "row14": ("14: cross entropy on the branches", Preset(**losses)),
        "row15": ("15: gradient into the teacher", Preset(detach_teacher=released.detach_teacher)),
        "row17": ("17: half of the steps are warm-up", Preset(warmup=released.warmup)),
        "row22": ("22: no LayerNorm on the input", Preset({"input_norm": False})),
        "released": ("all of them: --preset released", released),
    }


def compare_presets(
    config: Config,
    features: Features,
    kinds: tuple[str, ...],
    seeds: range,
    corpus: str,
    out: Path,
    device: torch.device,
    made_up: bool,
) -> str:
    """MAGT as the paper describes it against the authors' code. Leaves presets.md in `out`; returns the table."""
    rows = differences(corpus)
    cells = {name: dataclasses.replace(config, preset=preset) for name, (_, preset) in rows.items()}
    results = train_cells(cells, features, kinds, seeds, out / "presets", device)
    compared = compare(features, [(name, runs, results["paper"]) for name, runs in results.items()])
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
    text = f"# The paper's stage 2 against the authors' code\n\n{MADE_UP if made_up else ''}"
    text += (
        f"MAGT, {len(seeds)} seeds. Each row changes one thing; the last changes all. Differences are of weighted F1, "
    )
    text += (
        "seeds paired, with a bootstrap interval over conversations. Row 16, the epoch chosen on test, is a column.\n\n"
    )
    text += f"{table}\n"
    replace(out / "presets.md", lambda part: part.write_text(text, encoding="utf-8"))
    return table
