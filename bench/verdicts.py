"""What the measurements say about each claim of section 4.7. Everything is computed from the rows of results/*.json.

A power law counts as right where the exponent of a log-log fit over the grid is within TOLERANCE of the claimed one.
Ratios of FLOPs are compared as fractions, exactly. Not here: how it is measured (measure.py) and shown (tables.py).
"""

import math
import statistics
from fractions import Fraction
from typing import NamedTuple

from bench import lengths
from bench.grid import (
    FRAMES,
    MAGT_,
    MATCHED,
    MEMORIES,
    NARROW,
    NARROW_LENGTH,
    PUBLISHED,
    PUBLISHED_FRAMES,
    SAMPLES,
    UTTERANCES,
    WIDTH,
    Case,
)

TOLERANCE = 0.05
RIGHT, TERM, WRONG = "right", "right for the attention term only", "not so"


class Verdict(NamedTuple):
    claim: str
    measured: str
    verdict: str


def select(rows: list[dict], kind: str, variant: str, width: int | None = None) -> dict:
    """{length: row} of a variant, at its usual width unless another one is asked for."""
    width = width or (40 if variant == PUBLISHED else WIDTH)
    found = [row for row in rows if (row["kind"], row.get("variant"), row.get("width")) == (kind, variant, width)]
    return {tuple(n) if isinstance(n := row["length"], list) else n: row for row in found}


def per_utterance(row: dict, key: str) -> Fraction | float:
    """Exact for counts, a float for seconds."""
    value = row[key]
    return Fraction(value, row["samples"]) if isinstance(value, int) else value / row["samples"]


def exponent(points: dict[int, float]) -> float:
    """The slope of log y over log x, by least squares."""
    return statistics.linear_regression([math.log(x) for x in points], [math.log(y) for y in points.values()]).slope


def verdicts(rows: list[dict]) -> list[Verdict]:
    """All claims, in the order of the paper, then the questions that it leaves open."""
    return [
        *powers_of_length(rows),
        powers_of_width(rows),
        *ratios(rows),
        *space(rows),
        *crossings(rows),
        *beyond(rows),
    ]


def powers_of_length(rows: list[dict]) -> list[Verdict]:
    count = {v: select(rows, "count", v) for v in (MAGT_, MATCHED, PUBLISHED)}
    forward = {v: select(rows, "forward", v) for v in count}

    def in_L(variant: str, table: dict, key: str) -> float:
        return exponent({L: per_utterance(table[variant][L], key) for L in FRAMES})

    def in_U(table: dict, key: str) -> float:
        """A conversation is U utterances: at fixed C the cost is U times that of an utterance."""
        return exponent({U: U * per_utterance(table[MAGT_][U], key) for U in UTTERANCES})

    frames = in_L(MATCHED, count, "flops_attention"), in_L(MATCHED, count, "flops")
    talk = in_U(count, "flops_attention"), in_U(count, "flops")
    return [
        Verdict(
            "Frame-level time O(S L^2 D): exponent 2 in L",
            f"MulT, matched: attention FLOPs {frames[0]:.2f}, all FLOPs {frames[1]:.2f}, "
            f"forward time {in_L(MATCHED, forward, 'seconds'):.2f}; "
            f"as published: all FLOPs {in_L(PUBLISHED, count, 'flops'):.2f}, "
            f"forward time {in_L(PUBLISHED, forward, 'seconds'):.2f}",
            judge(2, *frames),
        ),
        Verdict(
            "Utterance-level time O(C U^2 D): exponent 2 in U at fixed C",
            f"MAGT: attention FLOPs {talk[0]:.2f}, all FLOPs {talk[1]:.2f}, "
            f"forward time {in_U(forward, 'seconds'):.2f}",
            judge(2, *talk),
        ),
    ]


def powers_of_width(rows: list[dict]) -> Verdict:
    widths, n = (*NARROW, WIDTH), NARROW_LENGTH

    def in_D(variant: str, key: str) -> float:
        return exponent({D: select(rows, "count", variant, D)[n][key] for D in widths})

    fits = {v: (in_D(v, "flops_attention"), in_D(v, "flops")) for v in (MAGT_, MATCHED)}
    grades = {judge(1, *fit) for fit in fits.values()}
    return Verdict(
        "Both times: exponent 1 in D",
        "; ".join(f"{v}: attention FLOPs {fit[0]:.2f}, all FLOPs {fit[1]:.2f}" for v, fit in fits.items())
        + f" (D = {widths[0]} to {widths[-1]}, U = L = {n})",
        " / ".join(sorted(grades)),
    )


def judge(claimed: float, attention: float, everything: float) -> str:
    if abs(everything - claimed) <= TOLERANCE:
        return RIGHT
    return TERM if abs(attention - claimed) <= TOLERANCE else WRONG


def ratios(rows: list[dict]) -> list[Verdict]:
    magt, mult = select(rows, "count", MAGT_), select(rows, "count", MATCHED)
    points = [(U, L) for U in UTTERANCES for L in FRAMES]

    def over_claim(key: str) -> dict[tuple[int, int], Fraction]:
        """MAGT's count over MulT's, divided by the claimed U/L^2."""
        return {(U, L): Fraction(magt[U][key], mult[L][key]) * L**2 / U for U, L in points}

    attention, total = over_claim("flops_attention"), over_claim("flops")
    constants = sorted(set(attention.values()))
    deep, n = select(rows, "count", MEMORIES, NARROW[0])[NARROW_LENGTH], NARROW_LENGTH
    rule = Fraction(select(rows, "count", MAGT_, NARROW[0])[n]["flops_attention"], deep["flops_attention"]) * n
    by_form = sum(
        total[U, L] * Fraction(U, L**2)
        == Fraction(Case(MAGT_, U).flops(SAMPLES).total, Case(MATCHED, L).flops(SAMPLES).total)
        for U, L in points
    )
    low, high = min(total.values()), max(total.values())
    times_L = [float(value * U / L) for (U, L), value in total.items()]
    return [
        Verdict(
            "Time ratio MAGT / MulT = U/L^2, attention terms",
            f"{' or '.join(map(str, constants))} U/L^2, exactly, at {len(points)} of {len(points)} points, matched; "
            f"{rule} U/L^2 if MulT's memories keep their authors' three layers",
            "right, up to the constant" if len(constants) == 1 else WRONG,
        ),
        Verdict(
            "Time ratio MAGT / MulT = U/L^2, all FLOPs",
            f"{float(low):.2g} to {float(high):.2g} times U/L^2; it is {min(times_L):.2f}/L to {max(times_L):.2f}/L, "
            f"as the closed form says at {by_form} of {len(points)} points",
            RIGHT if high / low <= 1 + TOLERANCE else f"{WRONG}: it leaves out the linear layers",
        ),
    ]


def space(rows: list[dict]) -> list[Verdict]:
    magt, mult, published = (select(rows, "count", v) for v in (MAGT_, MATCHED, PUBLISHED))

    def in_L(table: dict, key: str) -> float:
        return exponent({L: table[L][key] for L in FRAMES})

    in_U = exponent({U: U * magt[U]["bytes"] for U in UTTERANCES})
    factors = [mult[L]["bytes"] / magt[U]["bytes"] / L for U in UTTERANCES for L in FRAMES]
    linear = max(abs(in_L(mult, "bytes") - 1), abs(in_L(published, "bytes") - 1), abs(in_U - 1)) <= TOLERANCE
    return [
        Verdict(
            "Space O(S L D) and O(C U D): exponent 1 in L, and 1 in U at fixed C",
            f"bytes kept for backward: {in_L(mult, 'bytes'):.2f} in L (as published {in_L(published, 'bytes'):.2f}), "
            f"{in_U:.2f} in U; where attention's weights are stored {in_L(mult, 'bytes_unfused'):.2f} in L "
            f"(as published {in_L(published, 'bytes_unfused'):.2f})",
            f"{RIGHT}, with a fused attention kernel" if linear else WRONG,
        ),
        Verdict(
            "Space smaller by a factor of L",
            f"MulT, matched, keeps {min(factors):.2f} L to {max(factors):.2f} L times the bytes of MAGT",
            "right, up to the constant" if max(factors) / min(factors) <= 1 + TOLERANCE else WRONG,
        ),
    ]


def cheaper_from(U: int) -> int:
    """The least L from which MAGT costs fewer FLOPs than MulT as published: by the closed form, equal to the counts."""
    magt, L = Case(MAGT_, U).flops(U).total, 1
    while Case(PUBLISHED, L, 40).flops(U).total <= magt:
        L += 1
    return L


def cheaper_in_time_from(rows: list[dict], U: int) -> float:
    """The L where the forward times of an utterance cross, between grid points on log axes.

    The grid's least L if MAGT is faster there already, infinity if it is nowhere faster.
    """
    mult = select(rows, "forward", PUBLISHED)
    limit = per_utterance(select(rows, "forward", MAGT_)[U], "seconds")
    times = [(L, per_utterance(mult[L], "seconds")) for L in FRAMES]
    if times[0][1] > limit:
        return FRAMES[0]
    for (low, before), (high, after) in zip(times, times[1:]):
        if before <= limit < after:
            return low * (high / low) ** (math.log(limit / before) / math.log(after / before))
    return math.inf


def crossings(rows: list[dict]) -> list[Verdict]:
    magt, mult = select(rows, "count", MAGT_), select(rows, "count", PUBLISHED)
    few, many = cheaper_from(UTTERANCES[0]), cheaper_from(UTTERANCES[-1])
    in_time = [cheaper_in_time_from(rows, U) for U in UTTERANCES]
    in_bytes = min(L for L in FRAMES if mult[L]["bytes"] > magt[NARROW_LENGTH]["bytes"])
    factors = {
        f"{name} {'/'.join(map(str, L))}": mult[L]["flops"] / magt[NARROW_LENGTH]["flops"]
        for name, L in PUBLISHED_FRAMES.items()
    }
    cheap = [name for name, factor in factors.items() if factor < 1]
    return [
        Verdict(
            "From which L on is MAGT cheaper than MulT as published?",
            f"FLOPs: L = {few} (U = {UTTERANCES[0]}) to {many} (U = {UTTERANCES[-1]}); forward time on this machine: "
            f"L = {min(in_time):.0f} to {max(in_time):.0f}; bytes kept: L = {in_bytes}"
            f" ({FRAMES[0]} is the least measured)",
            f"from L = {many} on; below L = {few} MulT takes fewer FLOPs",
        ),
        Verdict(
            f"FLOPs of MulT as published at its own lengths, over those of MAGT at U = {NARROW_LENGTH}",
            "; ".join(f"{name}: {factor:.2f}" for name, factor in factors.items()),
            f"MulT is the cheaper model: {', '.join(cheap)}" if cheap else "MAGT is the cheaper model",
        ),
    ]


def beyond(rows: list[dict]) -> list[Verdict]:
    """What the formulas do not say: where attention outweighs the rest, weights, the encoders in front."""
    magt = select(rows, "count", MAGT_)[UTTERANCES[-1]]
    mult = {v: select(rows, "count", v)[FRAMES[-1]] for v in (MATCHED, PUBLISHED)}

    def even(row: dict) -> float:
        """The length at which the attention term is as large as the linear terms: it grows by one power more."""
        return row["length"] * row["flops_linear"] / row["flops_attention"]

    longest = max(max(split) for corpus in (lengths.IEMOCAP, lengths.MELD) for split in corpus.values())
    stage1 = sum(per_utterance(row, "flops") for row in rows if row["kind"] == "encoder count")
    params = {v: row["params"] for v, row in {MAGT_: magt, **mult}.items()}
    return [
        Verdict(
            "Where does attention outweigh the linear layers?",
            f"MAGT: U above {even(magt):,.0f}; MulT, matched: L above {even(mult[MATCHED]):,.0f}; "
            f"as published: L above {even(mult[PUBLISHED]):,.0f}",
            f"MAGT: {'never' if even(magt) > longest else 'sometimes'} in IEMOCAP and MELD (U <= {longest})",
        ),
        Verdict(
            "Weights",
            ", ".join(f"{v} {n / 1e6:.1f} M" for v, n in params.items()),
            f"fewest: {min(params, key=params.get)}",
        ),
        Verdict(
            "FLOPs of the three encoders that make an utterance's features, which the comparison leaves out",
            f"{float(stage1) / 1e9:,.0f} G an utterance, "
            f"{float(stage1 / per_utterance(magt, 'flops')):,.0f} times MAGT's",
            "the frames are paid for in stage 1",
        ),
    ]
