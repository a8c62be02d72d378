"""What comes out of a run: scores, tables, figures. `metrics.json` holds every number, `report.md` shows them.

Accuracy and weighted F1 as in the paper's Tables 2 and 3, macro F1 beside them; a table per class and the confusion
matrix of the main row; the losses over the epochs (Figure 6); differences of weighted F1 with bootstrap intervals; with
--ablation also t-SNE of the features (Figure 4) and mean gates. On a real corpus the paper's row stands beside ours.
"""

import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix, precision_recall_fscore_support

from data import SPLITS, Conversations, FeatureFile, replace_file, scores

matplotlib.use("Agg")  # whatever the environment or a matplotlibrc says
import matplotlib.pyplot as plt  # noqa: E402

STYLE = {
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 9,
    "figure.dpi": 130,
}  # a "$" in a name is no math
SYNTHETIC = "**The corpus is synthetic: these numbers show that the code works, nothing about people.**\n\n"
# Table 3 of the paper: accuracy and weighted F1, in percent.
PAPER = {
    "T": {"IEMOCAP": (67.09, 67.46), "MELD": (62.79, 62.99)},
    "A": {"IEMOCAP": (47.01, 45.91), "MELD": (50.38, 44.80)},
    "V": {"IEMOCAP": (27.84, 26.28), "MELD": (40.91, 36.84)},
    "A_KD": {"IEMOCAP": (50.03, 49.65), "MELD": (49.08, 45.69)},
    "V_KD": {"IEMOCAP": (25.63, 20.21), "MELD": (40.45, 36.06)},
    "Concat T+A+V": {"IEMOCAP": (68.52, 68.64), "MELD": (65.71, 65.06)},
    "Concat T+A+V_KD": {"IEMOCAP": (64.70, 64.38), "MELD": (60.46, 55.74)},
    "Concat T+A_KD+V": {"IEMOCAP": (68.64, 68.70), "MELD": (65.86, 65.18)},
    "Concat T+A_KD+V_KD": {"IEMOCAP": (65.37, 65.19), "MELD": (60.61, 55.67)},
    "MAGT T+A+V": {"IEMOCAP": (68.08, 68.29), "MELD": (66.32, 65.30)},
    "MAGT T+A+V_KD": {"IEMOCAP": (68.08, 68.18), "MELD": (65.79, 64.73)},
    "MAGT T+A_KD+V": {"IEMOCAP": (69.38, 69.59), "MELD": (66.36, 65.32)},
    "MAGT T+A_KD+V_KD": {"IEMOCAP": (68.88, 69.02), "MELD": (65.79, 64.73)},
}
SCORES = ("accuracy", "weighted_f1", "macro_f1")


def main_row(rows) -> str:
    """The row that is shown in detail and whose model `predict` uses: the paper's best, or else the last."""
    names = list(rows)
    return "MAGT T+A_KD+V" if "MAGT T+A_KD+V" in names else names[-1]


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (of a sample, n - 1; 0 for a single seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def machine(device: torch.device) -> str:
    """Processor or GPU, and the versions that numbers depend on."""
    chip = platform.processor() or platform.machine()
    if device.type == "cuda":
        chip = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        chip = found[1] if found else chip
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{chip}{threads}, Python {platform.python_version()}, torch {torch.__version__}"


def table(head: list[str], lines: list[list]) -> str:
    """Markdown. A "|" or the end of a line in a cell is escaped."""
    cells = [[re.sub(r"\s+", " ", str(x)).replace("|", "\\|") for x in line] for line in [head, *lines]]
    cells.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def spread(values: dict | tuple, many: bool = True) -> str:
    mean, std = values.values() if isinstance(values, dict) else values
    return f"{mean:.2f} ± {std:.2f}" if many else f"{mean:.2f}"


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
    """In percent, from counts [..., C, C] of (label, prediction); [...]. For the bootstrap, which needs thousands."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, predicted = confusion.sum(-1), confusion.sum(-2)
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    return 100 * (f1 * support).sum(-1) / support.sum(-1)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, samples: int = 5000, seed: int = 0) -> tuple[float, float, float]:
    """The difference of weighted F1, a - b, mean over seeds, and its 95 % interval: (difference, low, high).

    a, b: `confusions` of two models on the same utterances, with the same number of seeds, or one. Conversations are
    drawn with replacement, as many as there are, the same for both models and all seeds: utterances of a conversation
    are not independent. The interval covers the choice of test conversations, not the variance over seeds.
    """
    n = a.shape[1]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)  # [samples, n]
    drawn = [weighted_f1(np.einsum("bn,snij->bsij", draws, x, optimize=True)).mean(1) for x in (a, b)]
    difference = weighted_f1(a.sum(1)).mean() - weighted_f1(b.sum(1)).mean()
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return float(difference), float(low), float(high)


def compare(file: FeatureFile, pairs: list[tuple[str, list[dict], list[dict]]]) -> list[dict]:
    """Per pair (name, runs of a, runs of b): {"pair", "difference" of weighted F1, "std" over seeds, "low", "high"}."""
    conversation = file.conversation[file.split == SPLITS.index("test")]
    result = []
    for name, *runs in pairs:
        a, b = (confusions(r, conversation, len(file.label_names)) for r in runs)
        difference, low, high = paired_bootstrap(a, b)
        _, std = mean_std((weighted_f1(a.sum(1)) - weighted_f1(b.sum(1))).tolist())
        result.append({"pair": name, "difference": difference, "low": low, "high": high, "std": std})
    return result


def comparison_table(comparisons: list[dict]) -> str:
    lines = [
        [c["pair"], f"{c['difference']:+.2f} ± {c['std']:.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}"]
        for c in comparisons
    ]
    return table(["pair", "difference of W-F1", "95 % interval"], lines)


def pairs_of(rows: dict[str, list[dict]]) -> list[tuple[str, list[dict], list[dict]]]:
    """Which rows are compared: each fusion with T, MAGT and Context with Concat, and MAGT with Context."""
    pairs = []
    for row, runs in rows.items():
        name, _, kinds = row.partition(" ")
        others = {"MAGT": ["Concat", "Context"], "Context": ["Concat"]}.get(name, [])
        for other in (f"{other} {kinds}" for other in others):
            if other in rows:
                pairs.append((f"{row} - {other}", runs, rows[other]))
        if kinds and "T" in rows:
            pairs.append((f"{row} - T", runs, rows["T"]))
    return pairs


# The report


def write_report(out: Path, result: dict) -> str:
    """Writes metrics.json, report.md and figures/*.png into `out`; returns the table of results as text.

    result: "title", "synthetic" (bool), "corpus" (a key of PAPER, or another name), "machine", "weights" (of the main
    row's best model), "notes", "problems" (lists of lines), "file" (the features), "label_names", and "rows": name ->
    list, one entry per seed, of {"seed", "labels", "predictions" (on test, of the epoch chosen on dev), "epoch", for
    stage 2 "test_selected" (scores) and "history" (a dict per epoch)}; with the ablation "section" (Markdown).
    """
    rows, file, names = result["rows"], result["file"], result["file"].label_names
    metrics = {k: result[k] for k in ("title", "synthetic", "corpus", "machine", "weights", "notes", "problems")}
    metrics["rows"] = {name: summary(runs) for name, runs in rows.items()}
    metrics["comparisons"] = compare(file, pairs_of(rows))
    best = main_row(rows)
    runs, classes = rows[best], range(len(names))
    labels, predictions = (np.concatenate([r[what] for r in runs]) for what in ("labels", "predictions"))
    metrics["main_row"] = best
    metrics["confusion"] = confusion_matrix(labels, predictions, labels=classes).tolist()
    parts = precision_recall_fscore_support(labels, predictions, labels=classes, zero_division=0)
    metrics["per_class"] = {
        name: {"precision": 100 * p, "recall": 100 * r, "f1": 100 * f, "support": int(n) // len(runs)}
        for name, p, r, f, n in zip(names, *map(np.ndarray.tolist, parts))
    }
    (out / "figures").mkdir(exist_ok=True)
    caption = f"{result['title']}: {best}, {len(runs)} seed{'s' * (len(runs) > 1)}"
    confusion_figure(out / "figures" / "confusion.png", labels, predictions, names, caption)
    losses = ""
    if histories := [r["history"] for r in runs if "history" in r]:
        loss_figure(out / "figures" / "losses.png", histories, caption)
        losses = "![Losses over the epochs](figures/losses.png)\n"
    per_class = [
        [name, *(f"{row[k]:.1f}" for k in ("precision", "recall", "f1")), row["support"]]
        for name, row in metrics["per_class"].items()
    ]
    results = results_table(metrics)
    problems, notes = (bullets(result[what]) for what in ("problems", "notes"))
    text = f"""# {result["title"]}

{SYNTHETIC if result["synthetic"] else ""}{result["machine"]}.

## Results on test

{results}

{legend(rows)}
W-F1 is the weighted F1, M-F1 the macro F1, in percent; mean ± standard deviation over the seeds of stage 2. The epoch
is chosen on dev. The column "test-selected" chooses it on test, as published figures often do: too optimistic.

## Is a difference noise?

{comparison_table(metrics["comparisons"])}

Seeds are paired; ± is the standard deviation over seeds. The interval is a paired bootstrap over test conversations:
if it contains 0, the difference may come from their choice. It does not include the variance over seeds, nor that of
training the encoders again.

## Per class: {best}

{table(["class", "precision", "recall", "F1", "utterances"], per_class)}

![Confusion matrix](figures/confusion.png)
{losses}
{result.get("section", "")}
## The corpus

{notes}"""
    if problems:
        text += (
            f"\nAudio or video with a problem, {len(result['problems'])} (where missing: zero, masked as a key):\n\n"
        )
        text += problems
    replace_file(out / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=2)))
    replace_file(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    return results


LEGEND = {
    "T": "T, A, V: the encoder of text, audio, video, trained by cross entropy, with its own classifier.",
    "A_KD": "A_KD, V_KD: the encoder distilled from T (Eq. 14).",
    "Concat": "Concat: the baseline of Figure 3, each utterance separately.",
    "Context": "Context: one transformer block over the conversation, no anchors and gates; ours.",
    "MAGT": "MAGT: the paper's model. T+A_KD+V: the features that are fused.",
}


def legend(rows) -> str:
    names = {row.partition(" ")[0] for row in rows}
    return bullets(text for name, text in LEGEND.items() if name in names)


def bullets(lines) -> str:
    return "".join(f"- {line}\n" for line in lines)


def summary(runs: list[dict]) -> dict:
    """The scores of one row: mean and standard deviation over seeds, and per seed."""
    per_seed = [scores(r["labels"], r["predictions"]) for r in runs]
    result = {s: dict(zip(("mean", "std"), mean_std([x[s] for x in per_seed]))) for s in SCORES}
    if selected := [r["test_selected"] for r in runs if "test_selected" in r]:
        result["test_selected"] = {s: dict(zip(("mean", "std"), mean_std([x[s] for x in selected]))) for s in SCORES}
        result["dev_f1"] = dict(zip(("mean", "std"), mean_std([r["dev_f1"] for r in runs])))
    result["seeds"] = [{"seed": r["seed"], "epoch": r["epoch"], **x} for r, x in zip(runs, per_seed)]
    return result


def results_table(metrics: dict) -> str:
    """Markdown: a row per model; the paper's figures beside ours when the corpus is a real one."""
    real = not metrics["synthetic"] and metrics["corpus"] in ("IEMOCAP", "MELD")
    head = ["model", "accuracy", "W-F1", "M-F1", "W-F1, test-selected"]
    lines = []
    for name, row in metrics["rows"].items():
        many = len(row["seeds"]) > 1
        line = [name, *(spread(row[s], many) for s in SCORES)]
        line.append(spread(row["test_selected"]["weighted_f1"], many) if "test_selected" in row else "")
        if real:
            line += [f"{x:.2f}" for x in PAPER[name][metrics["corpus"]]] if name in PAPER else ["", ""]
        lines.append(line)
    return table(head + ["paper: accuracy", "paper: W-F1"] * real, lines)


def ablation(file: FeatureFile, rows: dict, load: Callable, out: Path) -> str:
    """Draws t-SNE and mean gates; returns their section of the report.

    load: (row, seed) -> model on the CPU and the kinds of features that it fuses.
    """
    (out / "figures").mkdir(exist_ok=True)
    gates = {}
    for row, runs in rows.items():
        if row.startswith("MAGT"):
            gates[row] = np.mean([mean_gates(*load(row, r["seed"]), file) for r in runs], axis=0)
    gate_figure(out / "figures" / "gates.png", gates)
    text = (
        "## Gates\n\nThe mean gate of each stream on test (Eq. 21): at 1 all of what an anchor read from a source is "
    )
    text += "kept, at 0 nothing.\n\n![Mean gates](figures/gates.png)\n"
    if tsne_figure(out / "figures" / "tsne.png", file):
        text += "\n## Features\n\nEach encoder's features of test in two dimensions (Figure 4).\n\n"
        text += "![t-SNE of the features](figures/tsne.png)\n"
    return text


@torch.inference_mode()
def mean_gates(model, kinds: tuple[str, ...], file: FeatureFile) -> np.ndarray:
    """The mean of each stream's gate (Eq. 21) over the utterances of test and the width: [anchors, sources]."""
    data = Conversations(file, kinds, torch.device("cpu"))
    gates = model(*data.batch(data.splits["test"]).inputs).gates
    names = list(model.config.widths)
    return np.array([[float(gates[anchor][source].mean()) for source in names] for anchor in names])


# Figures, readable in black and white

MARKERS = "os^Dv*PX"  # one per class, filled and hollow in turn
FEWEST, MOST = 10, 2000  # points of a t-SNE


def confusion_figure(path: Path, labels, predictions, names: list[str], caption: str) -> None:
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(2.2 + 0.7 * len(names),) * 2)
        how = {"labels": range(len(names)), "display_labels": names, "normalize": "true", "values_format": ".2f"}
        ConfusionMatrixDisplay.from_predictions(
            labels, predictions, ax=ax, cmap="Greys", colorbar=False, xticks_rotation=45, **how
        )
        ax.set(xlabel="predicted", ylabel="true; share of each row")
        ax.set_title(caption)
        save(fig, path)


def loss_figure(path: Path, histories: list[list[dict]], caption: str) -> None:
    """Figure 6: L_total, L_KD^a and L_KD^v over the epochs, mean over seeds."""
    titles = {"loss": "L_total (Eq. 25)", "kd_audio": "L_KD^a (Eq. 24)", "kd_video": "L_KD^v (Eq. 24)"}
    shown = [k for k in titles if any(epoch["train"].get(k) for epoch in histories[0])]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.2), squeeze=False)
        for ax, key in zip(axes[0], shown):
            for split, style in (("train", "k-"), ("dev", "k--"), ("test", "k:")):
                mean = np.mean([[epoch[split][key] for epoch in h] for h in histories], axis=0)
                ax.plot(range(1, len(mean) + 1), mean, style, label=split)
            ax.set(title=titles[key], xlabel="epoch")
        axes[0][0].legend(frameon=False)
        fig.suptitle(caption)
        save(fig, path)


def tsne_figure(path: Path, file: FeatureFile) -> bool:
    """Figure 4: a panel per kind of features, the utterances of test by class. False: too few utterances to draw."""
    test = file.split == SPLITS.index("test")
    shown = {kind: test & present for kind, present in file.present.items() if (test & present).sum() >= FEWEST}
    if not shown:
        return False
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.8 * rows + 0.6), squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for ax, (kind, at) in zip(axes.flat, shown.items()):
            at = at.nonzero().flatten().numpy()
            if len(at) > MOST:
                at = np.random.default_rng(0).choice(at, MOST, replace=False)
            x, label = file.features[kind][at].numpy(), file.label[at].numpy()
            points = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="random", random_state=0).fit_transform(x)
            for c, name in enumerate(file.label_names):
                colors = {"facecolors": "black" if c % 2 else "white", "edgecolors": "black", "linewidths": 0.6}
                ax.scatter(*points[label == c].T, s=22, marker=MARKERS[c % len(MARKERS)], label=name, **colors)
            ax.axis("on")
            ax.set(title=f"{kind}, {len(x)} utterances", xticks=[], yticks=[])
        handles, names = axes[0][0].get_legend_handles_labels()
        fig.legend(handles, names, ncols=min(8, len(names)), loc="lower center", frameon=False)
        save(fig, path, bottom=0.6 / (3.8 * rows + 0.6))
    return True


def gate_figure(path: Path, gates: dict[str, np.ndarray]) -> None:
    """A panel per model: mean gate of each stream, anchors down, sources across. gates: "MAGT T+A+V" -> [M, M]."""
    low, high = min(x.min() for x in gates.values()) - 0.02, max(x.max() for x in gates.values()) + 0.1
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(gates), figsize=(3.2 * len(gates), 3.4), squeeze=False)
        for ax, (row, mean) in zip(axes[0], gates.items()):
            names = row.split()[-1].split("+")
            grid(ax, mean, "{:.2f}", low, high, names, names)
            ax.set(xlabel="source", ylabel="anchor", title=row)
        save(fig, path)


def grid(ax, values: np.ndarray, form: str, low: float, high: float, rows: list[str], columns: list[str]) -> None:
    """A matrix as grey cells with their numbers."""
    ax.imshow(values, cmap="Greys", vmin=low, vmax=high)
    for (i, j), x in np.ndenumerate(values):
        dark = (x - low) / (high - low) > 0.5
        ax.text(j, i, form.format(x), ha="center", va="center", color="white" if dark else "black")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)


def save(fig, path: Path, bottom: float = 0.0) -> None:
    fig.tight_layout(rect=(0, bottom, 1, 1))
    replace_file(path, lambda temporary: fig.savefig(temporary, format="png"))
    plt.close(fig)
