"""The figures of experiments.py, readable in black and white: t-SNE of the features, mean gates, a heat map.

Not here: the confusion matrix and the losses, which every report has (report.py).
"""

from pathlib import Path

import matplotlib
import numpy as np
from sklearn.manifold import TSNE

from data import FeatureFile

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MARKERS = "os^Dv*PX"  # one per class, filled and hollow in turn
FEWEST, MOST = 10, 2000  # points of a t-SNE


def tsne_figure(path: Path, file: FeatureFile) -> bool:
    """Figure 4: a panel per kind of features, the utterances of test by class. False: too few utterances to draw."""
    test = file.split == 2
    shown = {kind: test & present for kind, present in file.present.items() if (test & present).sum() >= FEWEST}
    if not shown:
        return False
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.8 * rows + 0.6), squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax, (kind, at) in zip(axes.flat, shown.items()):
        x, label = file.features[kind][at].numpy(), file.label[at].numpy()
        if len(x) > MOST:
            some = np.random.default_rng(0).choice(len(x), MOST, replace=False)
            x, label = x[some], label[some]
        points = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="random", random_state=0).fit_transform(x)
        for c, name in enumerate(file.label_names):
            style = {"facecolors": "black" if c % 2 else "white", "edgecolors": "black", "linewidths": 0.6}
            ax.scatter(*points[label == c].T, s=22, marker=MARKERS[c % len(MARKERS)], label=name, **style)
        ax.set_title(f"{kind}, {len(x)} utterances", fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    handles, names = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, names, ncols=len(names), loc="lower center", frameon=False)
    _save(fig, path, bottom=0.6 / (3.8 * rows + 0.6))
    return True


def gate_figure(path: Path, gates: dict[str, np.ndarray]) -> None:
    """A panel per model: mean gate of each stream, anchors down, sources across. gates: "MAGT T+A+V" -> [M, M]."""
    fig, axes = plt.subplots(1, len(gates), figsize=(3.2 * len(gates), 3.4), squeeze=False)
    darkest = max(x.max() for x in gates.values())
    for ax, (row, mean) in zip(axes[0], gates.items()):
        names = row.split()[-1].split("+")
        _numbers(ax, mean, "{:.2f}", low=min(x.min() for x in gates.values()) - 0.02, high=darkest + 0.1)
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("source")
        ax.set_ylabel("anchor")
        ax.set_title(row, fontsize=9)
    _save(fig, path)


def heat_figure(path: Path, means: np.ndarray, grid: list[float], best: tuple[int, int]) -> None:
    """Figure 5: W-F1 [alpha, beta], in percent; a frame around the cell that dev would choose."""
    side = 1.8 + 0.75 * len(grid)
    fig, ax = plt.subplots(figsize=(side, side))
    _numbers(ax, means, "{:.1f}", low=means.min() - 1, high=means.max() + 1)
    ax.add_patch(plt.Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, linewidth=3, edgecolor="black"))
    ax.set_xticks(range(len(grid)), [f"{x:g}" for x in grid])
    ax.set_yticks(range(len(grid)), [f"{x:g}" for x in grid])
    ax.set_xlabel("beta (video)")
    ax.set_ylabel("alpha (audio)")
    ax.set_title("W-F1 on test; framed: best on dev", fontsize=9)
    _save(fig, path)


def _numbers(ax, values: np.ndarray, form: str, low: float, high: float) -> None:
    ax.imshow(values, cmap="Greys", vmin=low, vmax=high)
    for (i, j), x in np.ndenumerate(values):
        dark = (x - low) / (high - low) > 0.5
        ax.text(j, i, form.format(x), ha="center", va="center", color="white" if dark else "black")


def _save(fig, path: Path, bottom: float = 0.0) -> None:
    fig.tight_layout(rect=(0, bottom, 1, 1))
    fig.savefig(path, dpi=110)
    plt.close(fig)
