"""What comes out of a run: scores, tables, figures. `metrics.json` holds every number, `report.md` shows them.

Scores as in Tables 2 and 3, on a real corpus beside the paper's; per class; differences of weighted F1 with bootstrap
intervals; confusion matrix and loss curves (Figure 6). With --ablation also t-SNE (Figure 4) and mean gates.
"""

import contextlib
import json
import platform
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from data import SPLITS, Conversations, FeatureFile, replace_file, scores

plt.switch_backend("Agg")  # whatever the environment or a matplotlibrc says
STYLE = {"text.parse_math": False, "text.usetex": False, "font.size": 9, "figure.dpi": 130}  # "$" is no math
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
    """The row that is shown in detail and whose model `predict` uses: MAGT T+A_KD+V, or the nearest to it."""
    return ([row for row in rows if row.startswith("MAGT") and "V_KD" not in row] or list(rows))[-1]


def mean_std(values: list[float]) -> dict[str, float]:
    """{"mean", "std"} over seeds (of a sample, n - 1; 0 for a single seed)."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def machine(device: torch.device) -> str:
    """Processor or GPU, and the versions that numbers depend on."""
    chip, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        chip = torch.cuda.get_device_name()
    elif cpuinfo.exists() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        chip = found[1]
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{chip}{threads}, Python {platform.python_version()}, torch {torch.__version__}"


def table(head: list[str], lines: list[list]) -> str:
    """Markdown. A "|" or the end of a line in a cell is escaped."""
    cells = [[re.sub(r"\s+", " ", str(x)).replace("|", "\\|") for x in line] for line in [head, *lines]]
    cells.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def spread(values: dict[str, float], many: bool = True) -> str:
    return f"{values['mean']:.2f} ± {values['std']:.2f}" if many else f"{values['mean']:.2f}"


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


def paired_bootstrap(a: np.ndarray, b: np.ndarray, samples: int = 5000, seed: int = 0) -> dict[str, float]:
    """The difference of weighted F1, a - b: {"difference" (mean over seeds), "std" (over seeds), "low", "high" (95 %)}.

    a, b: `confusions` of two models on the same utterances, with the same number of seeds, or one. Conversations are
    drawn with replacement, as many as there are, the same for both models and all seeds: utterances of a conversation
    are not independent. The interval covers the choice of test conversations, not the variance over seeds.
    """
    n = a.shape[1]
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)  # [samples, n]
    drawn = [weighted_f1(np.einsum("bn,snij->bsij", draws, x, optimize=True)).mean(1) for x in (a, b)]
    difference = mean_std(weighted_f1(a.sum(1)) - weighted_f1(b.sum(1)))
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5]).tolist()
    return {"difference": difference["mean"], "std": difference["std"], "low": low, "high": high}


def compare(file: FeatureFile, pairs: list[tuple[str, list[dict], list[dict]]]) -> list[dict]:
    """Per pair (name, runs of a, runs of b): {"pair": name, **paired_bootstrap(..)}."""
    conversation, result = file.conversation[file.split == SPLITS.index("test")], []
    for name, *runs in pairs:
        counts = [confusions(r, conversation, len(file.label_names)) for r in runs]
        result.append({"pair": name, **paired_bootstrap(*counts)})
    return result


def moved(c: dict) -> list[str]:
    """Cells of a table: a difference and its interval."""
    return [f"{c['difference']:+.2f} ± {c['std']:.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}"]


def pairs_of(rows: dict[str, list[dict]]) -> list[tuple[str, list[dict], list[dict]]]:
    """Which rows are compared: each fusion with T, MAGT and Context with Concat, and MAGT with Context."""
    pairs = []
    for row, runs in rows.items():
        name, _, kinds = row.partition(" ")
        others = [f"{x} {kinds}" for x in {"MAGT": ["Concat", "Context"], "Context": ["Concat"]}.get(name, [])]
        others += ["T"] if kinds else []
        pairs += [(f"{row} - {other}", runs, rows[other]) for other in others if other in rows]
    return pairs


# The report


def write_report(out: Path, result: dict) -> str:
    """Writes metrics.json, report.md and figures/*.png into `out`; returns the table of results as text.

    result: "title", "synthetic" (bool), "corpus" (a key of PAPER, or another name), "machine", "weights" (of the main
    row's best model), "notes", "problems" (lists of lines), "file" (the features), and "rows": name -> list, per seed
    {"seed", "labels", "predictions" (on test, of the epoch chosen on dev), "epoch", for stage 2 "dev_f1",
    "test_selected" (scores), "history" (a dict per epoch)}; with the ablation "section" (Markdown).
    """
    rows, file, names = result["rows"], result["file"], result["file"].label_names
    metrics = {k: result[k] for k in ("title", "synthetic", "corpus", "machine", "weights", "notes", "problems")}
    metrics["rows"] = {name: summary(runs) for name, runs in rows.items()}
    metrics["comparisons"] = compare(file, pairs_of(rows))
    best = main_row(rows)
    runs, classes = rows[best], range(len(names))
    labels, predictions = (np.concatenate([r[what] for r in runs]) for what in ("labels", "predictions"))
    metrics |= {"main_row": best, "confusion": confusion_matrix(labels, predictions, labels=classes).tolist()}
    parts = precision_recall_fscore_support(labels, predictions, labels=classes, zero_division=0)
    metrics["per_class"] = {
        name: {"precision": 100 * p, "recall": 100 * r, "f1": 100 * f, "support": int(n) // len(runs)}
        for name, p, r, f, n in zip(names, *map(np.ndarray.tolist, parts))
    }
    caption = f"{result['title']}: {best}, {len(runs)} seed{'s' * (len(runs) > 1)}"
    confusion_figure(out / "figures" / "confusion.png", np.array(metrics["confusion"]), names, caption)
    loss_figure(out / "figures" / "losses.png", [r["history"] for r in runs], caption)
    keys = ("precision", "recall", "f1")
    per_class = [[name, *(f"{x[k]:.1f}" for k in keys), x["support"]] for name, x in metrics["per_class"].items()]
    changes = [[c["pair"], *moved(c)] for c in metrics["comparisons"]]
    results, problems = results_table(metrics), bullets(result["problems"])
    if problems:
        problems = f"\nAudio or video with a problem (where missing: zero, masked as a key):\n\n{problems}"
    text = f"""# {result["title"]}

{SYNTHETIC if result["synthetic"] else ""}{result["machine"]}.

## Results on test

{results}

{legend(rows)}
W-F1 is the weighted F1, M-F1 the macro F1, in percent; mean ± standard deviation over the seeds of stage 2. The epoch
is chosen on dev. The column "test-selected" chooses it on test, as published figures often do: too optimistic.

## Is a difference noise?

{table(["pair", "difference of W-F1", "95 % interval"], changes)}

Seeds are paired; ± is the standard deviation over seeds. The interval is a paired bootstrap over test conversations:
if it contains 0, the difference may come from their choice. It does not include the variance over seeds, nor that of
training the encoders again, and from fewer than some 20 test conversations it is too narrow.

## Per class: {best}

{table(["class", "precision", "recall", "F1", "utterances"], per_class)}

![Confusion matrix](figures/confusion.png)
![Losses over the epochs](figures/losses.png)

{result.get("section", "")}
## Corpus and options

{bullets(result["notes"])}{problems}"""
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
    return bullets(text for name, text in LEGEND.items() if any(row.split()[0] == name for row in rows))


def bullets(lines) -> str:
    return "".join(f"- {line}\n" for line in lines)


def summary(runs: list[dict]) -> dict:
    """The scores of one row: mean and standard deviation over seeds, and per seed."""
    per_seed = [scores(r["labels"], r["predictions"]) for r in runs]
    result = {s: mean_std([x[s] for x in per_seed]) for s in SCORES}
    if "test_selected" in runs[0]:  # of stage 2
        result["test_selected"] = {s: mean_std([r["test_selected"][s] for r in runs]) for s in SCORES}
        result["dev_f1"] = mean_std([r["dev_f1"] for r in runs])
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
    """Draws t-SNE and mean gates; returns their section. load: (row, seed) -> model on the CPU, kinds of features."""
    magt = [row for row in rows if row.startswith("MAGT")]
    gates = {row: np.mean([mean_gates(*load(row, r["seed"]), file) for r in rows[row]], axis=0) for row in magt}
    gate_figure(out / "figures" / "gates.png", gates)
    text = "## Gates\n\nThe mean gate of each stream on test (Eq. 21): at 1 all of what an anchor read from a source "
    text += "is kept, at 0 nothing.\n\n![Mean gates](figures/gates.png)\n"
    return text + tsne_figure(out / "figures" / "tsne.png", file)


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


@contextlib.contextmanager
def figure(path: Path, panels: int, width: float, height: float):
    """Yields a figure with a row of panels, each of this size in inches, and its axes; writes it as PNG at the end."""
    path.parent.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, panels, figsize=(width * panels, height), squeeze=False, layout="constrained")
        yield fig, axes[0]
        replace_file(path, lambda temporary: fig.savefig(temporary, format="png"))
        plt.close(fig)


def confusion_figure(path: Path, counts: np.ndarray, names: list[str], caption: str) -> None:
    side = 2.2 + 0.7 * len(names)
    with figure(path, 1, side, side) as (_, (ax,)):
        grid(ax, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), "{:.2f}", 0, 1, names)
        ax.tick_params(axis="x", rotation=45)
        ax.set(xlabel="predicted", ylabel="true; share of each row", title=caption)


def loss_figure(path: Path, histories: list[list[dict]], caption: str) -> None:
    """Figure 6: L_total, L_KD^a and L_KD^v over the epochs, mean over seeds."""
    titles = {"loss": "L_total (Eq. 25)", "kd_audio": "L_KD^a (Eq. 24)", "kd_video": "L_KD^v (Eq. 24)"}
    shown = [k for k in titles if any(epoch["train"].get(k) for epoch in histories[0])]
    with figure(path, len(shown), 3.6, 3.2) as (fig, axes):
        for ax, key in zip(axes, shown):
            for split, style in (("train", "k-"), ("dev", "k--"), ("test", "k:")):
                mean = np.mean([[epoch[split][key] for epoch in h] for h in histories], axis=0)
                ax.plot(range(1, len(mean) + 1), mean, style, label=split)
            ax.set(title=titles[key], xlabel="epoch")
        axes[0].legend(frameon=False)
        fig.suptitle(caption)


def tsne_figure(path: Path, file: FeatureFile) -> str:
    """Figure 4: a panel per kind of features, the utterances of test by class. Returns Markdown; "" for too few."""
    test = file.split == SPLITS.index("test")
    shown = {kind: test & present for kind, present in file.present.items() if (test & present).sum() >= FEWEST}
    if not shown:
        return ""
    with figure(path, len(shown), 4, 4.4) as (fig, axes):
        for ax, (kind, at) in zip(axes, shown.items()):
            at = np.random.default_rng(0).permutation(at.nonzero().flatten().numpy())[:MOST]
            x, label = file.features[kind][at].numpy(), file.label[at].numpy()
            points = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="random", random_state=0).fit_transform(x)
            for c, name in enumerate(file.label_names):
                colors = {"facecolors": "black" if c % 2 else "white", "edgecolors": "black", "linewidths": 0.6}
                ax.scatter(*points[label == c].T, s=22, marker=MARKERS[c % len(MARKERS)], label=name, **colors)
            ax.set(title=f"{kind}, {len(x)} utterances", xticks=[], yticks=[])
        fig.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside lower center", frameon=False)
    text = "\n## Features\n\nEach encoder's features of test in two dimensions (Figure 4).\n\n"
    return f"{text}![t-SNE of the features](figures/tsne.png)\n"


def gate_figure(path: Path, gates: dict[str, np.ndarray]) -> None:
    """A panel per model: mean gate of each stream, anchors down, sources across. gates: "MAGT T+A+V" -> [M, M]."""
    with figure(path, len(gates), 3.2, 3.4) as (_, axes):
        for ax, (row, mean) in zip(axes, gates.items()):
            names = row.split()[-1].split("+")
            grid(ax, mean, "{:.2f}", 0, 1, names)
            ax.set(xlabel="source", ylabel="anchor", title=row)


def grid(ax, values: np.ndarray, form: str, low: float, high: float, names: list[str]) -> None:
    """A matrix as grey cells with their numbers; `names` of its rows and columns."""
    ax.imshow(values, cmap="Greys", vmin=low, vmax=high)
    for (i, j), x in np.ndenumerate(values):
        dark = (x - low) / (high - low) > 0.6
        ax.text(j, i, form.format(x), ha="center", va="center", color="white" if dark else "black")
    short = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    ax.set(xticks=range(len(short)), xticklabels=short, yticks=range(len(short)), yticklabels=short)
