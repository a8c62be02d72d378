"""The table, the sentences and the figure of the study of what MAGT's anchors hear, and its page (docs/anatomy.md).

All of it is computed from a result: the content of anatomy.json, which anatomy.py writes.
"""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BIASED = "MAGT, own row"  # MAGT with a bias to the own utterance, in the tables


def table(result: dict) -> str:
    """Markdown: a row per model and features."""
    head = ["features", "model", "dev W-F1", "W-F1", "M-F1", "against MAGT", "added by the last modality"]
    lines = [head, ["---"] * len(head)]
    for row in result["rows"]:
        numbers = [f"{m:.2f} ± {s:.2f}" for m, s in (row[k] for k in ("dev", "weighted_f1", "macro_f1"))]
        changes = [difference(row[k]) if k in row else "" for k in ("against MAGT", "added")]
        lines.append([row["features"], row["model"], *numbers, *changes])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def difference(c: dict) -> str:
    return f"{c['difference']:+.2f} ± {c['std']:.2f} ({c['low']:+.2f} to {c['high']:+.2f})"


def section(result: dict, picture: str) -> str:
    """Table, sentences and figure. picture: the figure's path."""
    text = f"D = {result['width']}, {result['seeds']} seeds; {result['machine']}.\n\n{table(result)}\n\n"
    text += "\n".join(f"- {sentence}" for sentence in learned(result))
    if result["heard"]:
        text += f"\n\n![Attention by distance]({picture})"
    return text


# What the numbers say


def learned(result: dict) -> list[str]:
    """A sentence or two per question of the study."""
    rows = {(row["model"], row["features"]): row for row in result["rows"]}
    largest = result["rows"][-1]["features"]
    text = []
    for (model, features), row in rows.items():
        if model == BIASED:
            text.append(f"{BIASED}, against MAGT, over {features}: {verdict(row['against MAGT'])}")
    added = {model: row["added"] for (model, f), row in rows.items() if f == largest and "added" in row}
    if added:
        fewer, _, last = largest.rpartition("+")
        text.append(f"What {last} adds to {fewer}: {differences(added, *added)}.{STAR}")
    against = {model: row["against MAGT"] for (model, f), row in rows.items() if f == largest and model != "MAGT"}
    text.append(f"Against MAGT, over {largest}: {differences(against, 'Concat', 'Context')}.{STAR}")
    parts = [model for model in against if model not in ("Concat", "Context", BIASED)]
    changed = {model.removeprefix("MAGT, "): against[model] for model in parts}
    text.append(f"MAGT with one thing changed, against MAGT, over {largest}: {differences(changed, *changed)}.{STAR}")
    return text + listening(result, largest)


STAR = " (* the interval does not hold 0.)"


def differences(found: dict[str, dict], *names: str) -> str:
    return ", ".join(f"{name} {found[name]['difference']:+.2f}{star(found[name])}" for name in names)


def star(c: dict) -> str:
    return "*" if c["low"] > 0 or c["high"] < 0 else ""


def verdict(c: dict) -> str:
    """Is a difference of weighted F1 more than the choice of the test conversations?"""
    if not star(c):
        return f"{difference(c)}. The interval holds 0: it may be the choice of test conversations."
    return f"{difference(c)}, {'better' if c['low'] > 0 else 'worse'}, and the interval does not hold 0."


def listening(result: dict, features: str) -> list[str]:
    """What the models of the figure read: the own row in another modality, the gates, the learned numbers."""
    models = {h["model"]: h for h in result["heard"] if h["features"] == features}
    if not models:
        return []
    paper, biased = models["MAGT"], models[BIASED]
    shares = [(own_share(x, True), own_share(x, False)) for x in (paper["before"], paper["after"], biased["after"])]
    (before, _), (after, self_after), (with_bias, _) = shares
    text = [
        "The attention that an utterance of MAGT gives to its own row in another modality (mean of the streams): "
        f"{before:.1f} % before training, {after:.1f} % after it, {with_bias:.1f} % with the bias. To its own row in "
        f"its own modality, after training: {self_after:.1f} %."
    ]
    low, high = (f(g for row in paper["gates"] for g in row) for f in (min, max))
    text.append(f"The mean gates of MAGT's streams lie between {low:.2f} and {high:.2f} (1: all passes).")
    numbers = biased["numbers"]
    text.append(
        f"The numbers of {BIASED} begin at {result['own']:g}. Trained (mean over seeds), they lie between "
        f"{min(numbers):.2f} and {max(numbers):.2f}."
    )
    return text


def own_share(streams: dict[str, dict], between: bool) -> float:
    """The mean attention to the own row, in percent, over the streams between two modalities or within one."""
    chosen = [x["own"] for name, x in streams.items() if (len(set(name.split(" -> "))) == 2) == between]
    return 100 * float(np.mean([x for x in chosen if x is not None]))


# The figure and the page


def figure(path: Path, result: dict) -> None:
    """A panel per stream of the largest model: mean attention by distance, before and after training."""
    if not result["heard"]:
        return
    largest = result["heard"][-1]["features"]
    models = {h["model"]: h for h in result["heard"] if h["features"] == largest}
    paper, biased = models["MAGT"], models[BIASED]
    M = len(paper["gates"])
    fig, axes = plt.subplots(M, M, figsize=(3.5 * M, 2.7 * M + 0.7), sharex=True, sharey=True, squeeze=False)
    lines = [
        ("MAGT, not trained", paper["before"], "k:"),
        ("MAGT", paper["after"], "k-o"),
        (BIASED, biased["after"], "k--"),
    ]
    for i, (ax, stream) in enumerate(zip(axes.flat, paper["after"])):
        for what, streams, style in lines:
            near = streams[stream]["near"]
            reach = len(near) // 2
            y = [np.nan if p is None else 100 * p for p in near]
            ax.plot(range(-reach, reach + 1), y, style, markersize=3, label=what)
        ax.set_title(caption(stream, i // M, i % M, paper, biased), fontsize=8)
        ax.grid(linewidth=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("utterances after the own one", fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("attention, %", fontsize=9)
    handles, names = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, names, ncols=3, loc="lower center", frameon=False)
    fig.suptitle(f"{largest}, test; first MAGT, then {BIASED}", fontsize=10)
    fig.tight_layout(rect=(0, 0.6 / (2.7 * M + 0.7), 1, 1))
    fig.savefig(path, dpi=110)
    plt.close(fig)


def caption(stream: str, anchor: int, source: int, *models: dict) -> str:
    """A panel's title: the stream, mean gates, and the attention to the own row by thirds of a conversation."""
    gates = ", ".join(f"{h['gates'][anchor][source]:.2f}" for h in models)
    thirds = ", ".join("/".join(f"{100 * (t or 0):.0f}" for t in h["after"][stream]["thirds"]) for h in models)
    return f"{stream}\ngate {gates}; own row by thirds {thirds} %".replace("->", "\u2192")


def fill(page: str, folder: Path) -> str:
    """A page with each part between `<!-- anatomy-X -->` and `<!-- end -->` made anew from folder/anatomy-X.json.

    "Not measured." where there is no such file.
    """

    def part(found: re.Match) -> str:
        name, text = found[1], "Not measured."
        if (stored := folder / f"{name}.json").exists():
            text = section(json.loads(stored.read_text()), f"figures/{name}.png")
        return f"<!-- {name} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- (anatomy-\w+) -->\n.*?<!-- end -->", part, page, flags=re.DOTALL)
