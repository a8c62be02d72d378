"""The figures, and the tables again: `python -m bench.plots` makes both from results/*.json, for every machine there.

Log-log, in black and grey: FLOPs, bytes and time against L (an utterance of MulT) and against U (a conversation of
MAGT), each with the slope that section 4.7 claims drawn in.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.grid import FRAMES, MAGT_, MATCHED, NARROW_LENGTH, PUBLISHED, UTTERANCES
from bench.tables import RESULTS, load, markdown
from bench.verdicts import per_utterance, select

LINES = {  # solid: everything; dotted: the attention term alone
    MAGT_: {"color": "black", "marker": "D"},
    MATCHED: {"color": "black", "marker": "o"},
    PUBLISHED: {"color": "0.5", "marker": "s"},
}
CLAIM = "slope claimed in section 4.7"
COLUMNS = [  # kind of row, key, unit, axis, claimed power
    ("count", "flops", 1e9, "GFLOPs, forward", 2),
    ("count", "bytes", 1e6, "MB kept for backward", 1),
    ("forward", "seconds", 1e-3, "ms, forward", 2),
]


def figure(path: Path) -> None:
    """results/<machine>.json to results/<machine>.png."""
    environment, rows = load(path)
    fig, axes = plt.subplots(2, 3, figsize=(11, 7.5), layout="constrained")
    for column, (kind, key, unit, label, power) in enumerate(COLUMNS):
        over_L, over_U = axes[:, column]
        tables = {variant: select(rows, kind, variant) for variant in LINES}

        def values(variant: str, key: str, lengths: tuple[int, ...], unit=unit, tables=tables) -> list[float]:
            return [float(per_utterance(tables[variant][n], key)) / unit for n in lengths]

        for variant in (MATCHED, PUBLISHED):
            over_L.plot(FRAMES, values(variant, key, FRAMES), **LINES[variant], label=variant)
        claim(over_L, FRAMES, values(MATCHED, key, FRAMES)[0], power, "L")
        (level,) = values(MAGT_, key, (NARROW_LENGTH,))
        over_L.axhline(level, color="black", dashes=(6, 3), label=f"MAGT at U = {NARROW_LENGTH}")

        talk = [U * value for U, value in zip(UTTERANCES, values(MAGT_, key, UTTERANCES))]
        over_U.plot(UTTERANCES, talk, **LINES[MAGT_], label="MAGT")
        claim(over_U, UTTERANCES, talk[0], power, "U")
        if key == "flops":
            for variant in (MATCHED, PUBLISHED):
                attention = values(variant, "flops_attention", FRAMES)
                over_L.plot(
                    FRAMES, attention, **LINES[variant], ls=":", mfc="white", label=f"{variant}, attention only"
                )
            attention = [U * value for U, value in zip(UTTERANCES, values(MAGT_, "flops_attention", UTTERANCES))]
            over_U.plot(UTTERANCES, attention, **LINES[MAGT_], ls=":", mfc="white", label="MAGT, attention only")
        for ax, lengths, name in (
            (over_L, FRAMES, "L, frames per utterance"),
            (over_U, UTTERANCES, "U, utterances per conversation"),
        ):
            ax.set(xscale="log", yscale="log", xlabel=name)
            ax.set_xticks(lengths, lengths)
            ax.minorticks_off()
            ax.grid(color="0.92")
        over_L.set_ylabel(f"{label}, per utterance")
        over_U.set_ylabel(f"{label}, per conversation")
    handles = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    machine = environment.get("gpu", environment["cpu"])
    fig.suptitle(
        f"MAGT and MulT: what section 4.7 claims and what is measured\n"
        f"{machine}, {environment['threads']} threads, torch {environment['torch']}, seed {environment['seed']}",
        fontsize=10,
    )
    fig.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(fig)


def claim(ax: plt.Axes, lengths: tuple[int, ...], start: float, power: int, name: str) -> None:
    """The claimed slope, from the first measured point on."""
    law = [start * (n / lengths[0]) ** power for n in lengths]
    ax.plot(lengths, law, color="0.85", lw=7, solid_capstyle="butt", zorder=0, label=CLAIM)
    ax.text(lengths[1], law[1] * 1.6, f"${name}^{power}$" if power > 1 else f"${name}$", color="0.4", ha="right")


if __name__ == "__main__":
    for results in sorted(RESULTS.glob("*.json")):
        results.with_suffix(".md").write_text(markdown(results))
        figure(results)
        print(f"{results.stem}: .md and .png made in bench/results/")
