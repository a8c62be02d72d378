"""What a corpus was like, in a form that a run's folder keeps, and what changed since, in words.

Not here: keeping it, and what follows from a change (runs.py).
"""

import os
import zlib
from pathlib import Path

from data import Corpus


def describe(corpus: Corpus) -> dict[str, list]:
    """Per utterance, in order, what results depend on: split, conversation, speaker, label, its words' hash, times."""
    return {
        u.id: [s, c.id, u.speaker, corpus.label_names[u.label], zlib.crc32(u.text.encode()), repr((u.start, u.end))]
        for s, conversations in corpus.splits.items()
        for c in conversations
        for u in c.utterances
    }


def compare(before: dict[str, list], now: dict[str, list]) -> list[str]:
    """What changed, in words: "2 utterances relabelled (a, b)"; nothing if nothing did."""
    both = [i for i in before if i in now]
    words = ("in another split", "in another conversation", "of another speaker", "relabelled", "reworded", "cut anew")
    groups = {"removed": [i for i in before if i not in now], "added": [i for i in now if i not in before]}
    groups |= {word: [i for i in both if before[i][n : n + 1] != now[i][n : n + 1]] for n, word in enumerate(words)}
    if not any(groups.values()) and list(before) != list(now):
        groups["in another order"] = [i for i, j in zip(before, now) if i != j]
    return [
        f"{len(ids)} utterance{'s' * (len(ids) > 1)} {what} ({', '.join(ids[:3])}{', ..' * (len(ids) > 3)})"
        for what, ids in groups.items()
        if ids
    ]


def stamps(corpus: Corpus, modality: str) -> dict[str, list[int] | None]:
    """Size and time of change of each utterance's file; None if there is none."""
    found: dict[Path | None, list[int] | None] = {None: None}
    for path in {getattr(u, modality) for u in corpus.utterances()} - {None}:
        try:
            about = os.stat(path)
            found[path] = [about.st_size, about.st_mtime_ns]
        except OSError:
            found[path] = None
    return {u.id: found[getattr(u, modality)] for u in corpus.utterances()}
