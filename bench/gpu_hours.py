"""From the times of single steps to the hours of the whole recipe: arithmetic, and nothing else.

The recipe is what `bash run.sh iemocap` does: three encoders (text, audio distilled, video), then Concat and MAGT with
three seeds. Counted as a MAGT, Concat is too dear; whatever is not listed (reading labels, the report) takes seconds.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

EPOCHS1, EPOCHS2, BATCH, SEEDS, FUSIONS = 10, 30, 4, 3, 2  # Table 1; three seeds, Concat and MAGT
CONTEXT = 0.6e9  # bytes of a card that CUDA itself takes, about


@dataclass(frozen=True)
class Times:
    """Seconds, measured."""

    step: dict[str, float]  # encoder -> an optimiser step on BATCH utterances
    encode: dict[str, float]  # encoder -> an utterance, forward alone
    epoch: float  # stage 2, of the training conversations
    decode: float | None  # an utterance's sound and frames, on all cores together; None: not measured


class Line(NamedTuple):
    what: str
    how: str  # the arithmetic, to be checked by hand
    hours: float


def recipe(utterances: dict[str, int], times: Times) -> list[Line]:
    """What a cold run does, in order. utterances: of train, dev and test.

    The line "decoding" is not there if it was not measured; a run with sound and pictures decoded before skips it.
    """
    train, dev, everyone = utterances["train"], utterances["dev"], sum(utterances.values())
    lines = []
    if times.decode is not None:
        how = f"{everyone:,} utterances x {times.decode:.4g} s"
        lines.append(Line("decoding", how, everyone * times.decode / 3600))
    for name, step in times.step.items():
        steps = EPOCHS1 * math.ceil(train / BATCH)
        seen = EPOCHS1 * dev + everyone
        one = times.encode[name]
        how = (
            f"{EPOCHS1} epochs x {math.ceil(train / BATCH):,} steps x {step:.4g} s "
            f"+ ({EPOCHS1} x {dev:,} + {everyone:,}) utterances encoded x {one:.4g} s"
        )
        lines.append(Line(f"{name} encoder", how, (steps * step + seen * one) / 3600))
    held_out = (everyone - train) / train / 3  # forward alone takes a third of a step
    epochs = FUSIONS * SEEDS * EPOCHS2
    how = f"{FUSIONS} models x {SEEDS} seeds x {EPOCHS2} epochs x {times.epoch:.4g} s x {1 + held_out:.3f} (evaluation)"
    lines.append(Line("fusion", how, epochs * times.epoch * (1 + held_out) / 3600))
    return lines


def table(lines: list[Line]) -> list[str]:
    """The arithmetic as text: a line each, with its share of all, and the two sums."""
    total = sum(line.hours for line in lines)
    cached = sum(line.hours for line in lines if line.what != "decoding")
    cold = f"{total:.2f} h" if any(line.what == "decoding" for line in lines) else "not measured (decoding was not)"
    text = [f"{x.what}: {x.how} = {x.hours:.2f} h ({100 * x.hours / total:.0f} %)" for x in lines]
    return [*text, f"cold: {cold}; with everything decoded before: {cached:.2f} h"]


def best_batch(measured: dict[int, tuple[float, float]], limit: float) -> int | None:
    """The batch with the most utterances per second among those that a card of `limit` bytes carries; None: none.

    measured: batch -> (peak bytes that torch reserved, seconds of a step).
    """
    fits = {batch: batch / seconds for batch, (peak, seconds) in measured.items() if peak + CONTEXT <= limit}
    return max(fits, key=fits.get) if fits else None
