"""What comes out of a run: scores, tables, figures. `metrics.json` holds every number, `report.md` shows them.

Accuracy and weighted F1 as in the paper's Tables 2 and 3, macro F1 beside them; a table per class and the confusion
matrix of the last row; the losses over the epochs (Figure 6). On a real corpus the paper's row stands beside ours.

Not here: training, and the choice of epochs (magtkd.py).
"""

import json
import platform
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from data import replace_file  # noqa: E402
from magtkd import main_row, scores  # noqa: E402

# Table 3 of the paper: accuracy and weighted F1, in percent.
PAPER = {
    "IEMOCAP": {
        "T": (67.09, 67.46),
        "A": (47.01, 45.91),
        "V": (27.84, 26.28),
        "A_KD": (50.03, 49.65),
        "V_KD": (25.63, 20.21),
        "Concat T+A+V": (68.52, 68.64),
        "Concat T+A+V_KD": (64.70, 64.38),
        "Concat T+A_KD+V": (68.64, 68.70),
        "Concat T+A_KD+V_KD": (65.37, 65.19),
        "MAGT T+A+V": (68.08, 68.29),
        "MAGT T+A+V_KD": (68.08, 68.18),
        "MAGT T+A_KD+V": (69.38, 69.59),
        "MAGT T+A_KD+V_KD": (68.88, 69.02),
    },
    "MELD": {
        "T": (62.79, 62.99),
        "A": (50.38, 44.80),
        "V": (40.91, 36.84),
        "A_KD": (49.08, 45.69),
        "V_KD": (40.45, 36.06),
        "Concat T+A+V": (65.71, 65.06),
        "Concat T+A+V_KD": (60.46, 55.74),
        "Concat T+A_KD+V": (65.86, 65.18),
        "Concat T+A_KD+V_KD": (60.61, 55.67),
        "MAGT T+A+V": (66.32, 65.30),
        "MAGT T+A+V_KD": (65.79, 64.73),
        "MAGT T+A_KD+V": (66.36, 65.32),
        "MAGT T+A_KD+V_KD": (65.79, 64.73),
    },
}
SCORES = ("accuracy", "weighted_f1", "macro_f1")


def mean_std(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (of a sample, n - 1; 0 for a single seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def machine(device: torch.device) -> str:
    """Processor or GPU, and the versions that numbers depend on."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    chip = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu or platform.machine()}"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{chip}{threads}, Python {platform.python_version()}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write_report(out: Path, result: dict) -> str:
    """Writes metrics.json, report.md and figures/*.png into `out`; returns the table of results as text.

    result: "title", "made_up" (bool), "corpus" (a key of PAPER, or another name), "machine", "notes", "problems" (lists
    of lines), "label_names", and "rows": name -> list, one entry per seed, of {"seed", "labels", "predictions" (on
    test, of the epoch chosen on dev), "epoch", for stage 2 "test_selected" (scores) and "history" (a dict per epoch)}.
    With the ablation also "comparisons", for metrics.json, and "section" (Markdown), from experiments.py.
    """
    metrics = {k: result[k] for k in ("title", "made_up", "corpus", "machine", "notes", "problems")}
    metrics["rows"] = {name: _summary(runs) for name, runs in result["rows"].items()}
    metrics["comparisons"] = result.get("comparisons", [])
    best = main_row(list(result["rows"]))
    runs, names = result["rows"][best], result["label_names"]
    labels = np.concatenate([r["labels"] for r in runs])
    predictions = np.concatenate([r["predictions"] for r in runs])
    classes = range(len(names))
    metrics["confusion"] = confusion_matrix(labels, predictions, labels=classes).tolist()
    parts = precision_recall_fscore_support(labels, predictions, labels=classes, zero_division=0)
    metrics["per_class"] = {
        name: {"precision": 100 * p, "recall": 100 * r, "f1": 100 * f, "support": int(n) // len(runs)}
        for name, p, r, f, n in zip(names, *map(np.ndarray.tolist, parts))
    }
    replace_file(out / "metrics.json", lambda part: part.write_text(json.dumps(metrics, indent=2)))

    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    caption = f"{result['title']}: {best}, {len(runs)} seed{'s' * (len(runs) > 1)}"
    _confusion_figure(figures / "confusion.png", np.array(metrics["confusion"]), names, caption)
    if histories := [r["history"] for r in runs if "history" in r]:
        _loss_figure(figures / "losses.png", histories, caption)

    table = results_table(metrics)
    made_up = "**The corpus is made up: these numbers say that the code works, nothing about people.**\n\n"
    text = f"# {result['title']}\n\n{made_up if result['made_up'] else ''}{result['machine']}.\n\n"
    text += f"## Results on test\n\n{table}\n\n"
    text += (
        "W-F1 is the weighted F1, M-F1 the macro F1, in percent; mean ± standard deviation over the seeds of stage 2. "
    )
    text += 'The epoch is chosen on dev; the column "test-selected" chooses it on test, as published figures often do, '
    text += "and is no estimate of anything.\n\n"
    text += f"## Per class: {best}\n\n| class | precision | recall | F1 | utterances |\n|---|---|---|---|---|\n"
    for name, row in metrics["per_class"].items():
        text += f"| {name} | {row['precision']:.1f} | {row['recall']:.1f} | {row['f1']:.1f} | {row['support']} |\n"
    text += "\n![Confusion matrix](figures/confusion.png)\n"
    if histories:
        text += "\n![Losses over the epochs](figures/losses.png)\n"
    text += f"\n{result['section']}" if "section" in result else ""
    text += "\n## The corpus\n\n" + "".join(f"- {note}\n" for note in result["notes"])
    if result["problems"]:
        text += (
            f"\n{len(result['problems'])} sounds or pictures could not be used (zero vector, not read by others):\n\n"
        )
        text += "".join(f"- {line}\n" for line in result["problems"])
    replace_file(out / "report.md", lambda part: part.write_text(text, encoding="utf-8"))
    return table


def _summary(runs: list[dict]) -> dict:
    """The scores of one row: per seed, and their mean and standard deviation."""
    per_seed = [scores(r["labels"], r["predictions"]) for r in runs]
    summary = {s: dict(zip(("mean", "std"), mean_std([x[s] for x in per_seed]))) for s in SCORES}
    selected = [r["test_selected"] for r in runs if "test_selected" in r]
    if selected:
        summary["test_selected"] = {s: dict(zip(("mean", "std"), mean_std([x[s] for x in selected]))) for s in SCORES}
    summary["seeds"] = [{"seed": r["seed"], "epoch": r["epoch"], **x} for r, x in zip(runs, per_seed)]
    return summary


def results_table(metrics: dict) -> str:
    """Markdown: a row per model; the paper's figures beside ours when the corpus is a real one."""
    paper = {} if metrics["made_up"] else PAPER.get(metrics["corpus"], {})
    head = ["model", "accuracy", "W-F1", "M-F1", "W-F1, test-selected"] + ["paper: accuracy", "paper: W-F1"] * bool(
        paper
    )
    lines = [head, ["---"] * len(head)]
    for name, row in metrics["rows"].items():
        many = len(row["seeds"]) > 1

        def cell(x, many=many):
            return f"{x['mean']:.2f}" + (f" ± {x['std']:.2f}" if many else "")

        cells = [name, *(cell(row[s]) for s in SCORES)]
        cells.append(cell(row["test_selected"]["weighted_f1"]) if "test_selected" in row else "")
        if paper:
            cells += [f"{x:.2f}" for x in paper[name]] if name in paper else ["", ""]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _confusion_figure(path: Path, counts: np.ndarray, names: list[str], caption: str) -> None:
    share = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = 2.2 + 0.7 * len(names)
    fig, ax = plt.subplots(figsize=(side, side))
    ax.imshow(share, cmap="Greys", vmin=0, vmax=1)
    for (i, j), x in np.ndenumerate(share):
        ax.text(j, i, f"{100 * x:.0f}", ha="center", va="center", color="white" if x > 0.5 else "black")
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true; percent of each row")
    ax.set_title(caption, fontsize=9)
    _save(fig, path)


def _loss_figure(path: Path, histories: list[list[dict]], caption: str) -> None:
    """Figure 6: L_total, L_KD^a and L_KD^v over the epochs, mean over seeds."""
    titles = {"loss": "$L_{total}$ (Eq. 25)", "kd_audio": "$L_{KD}^a$ (Eq. 24)", "kd_video": "$L_{KD}^v$ (Eq. 24)"}
    shown = [k for k in titles if any(epoch["train"].get(k) for epoch in histories[0])]
    fig, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.2), squeeze=False)
    for ax, key in zip(axes[0], shown):
        for split, style in (("train", "k-"), ("dev", "k--"), ("test", "k:")):
            mean = np.mean([[epoch[split][key] for epoch in h] for h in histories], axis=0)
            ax.plot(range(1, len(mean) + 1), mean, style, label=split)
        ax.set_title(titles[key], fontsize=10)
        ax.set_xlabel("epoch")
    axes[0][0].legend(frameon=False)
    fig.suptitle(caption, fontsize=9)
    _save(fig, path)


def _save(fig, path: Path) -> None:
    fig.tight_layout()
    fig.savefig(path, dpi=130)
    plt.close(fig)
