"""A conversation of one's own: the csv and the JSON lines that predict.py takes.

Not here: what the fields mean (predict.py), and decoding the files that they name (encoders.py).
"""

import math
from pathlib import Path

from data import Conversation, InputError, Utterance, read_table
from extras.guard import say

FIELDS = ("speaker", "text", "audio", "video", "start", "end")  # the first two must be there
LONGEST = 1e6  # seconds: no film is as long


def read_conversation(path: Path) -> Conversation:
    """Reads a csv with the columns FIELDS. Errors: InputError with the line at fault."""
    columns, rows = read_table(path, FIELDS)
    if lacking := [c for c in FIELDS[:2] if c not in columns]:
        found = f"it has {', '.join(columns)}" if any(columns) else "the file is empty"
        raise InputError(
            f"{path}: column {' and '.join(lacking)} missing ({found}); wanted: {','.join(FIELDS)}, of which "
            "speaker and text must be there"
        )
    if ignored := [c for c in columns if c not in FIELDS]:
        say(f"predict: {path}: columns that are not used: {', '.join(ignored)}", 0)
    folder = Path(path).parent
    utterances = [make_utterance(row, where, str(i), folder) for i, (where, row) in enumerate(rows)]
    if not utterances:
        raise InputError(f"{path}: no utterance in it, only the names of the columns")
    return Conversation(str(path), tuple(utterances))


def make_utterance(row: dict, where: str, name: str, folder: Path) -> Utterance:
    """An utterance from a csv row or a JSON line. Errors: InputError that begins with `where`."""
    row = {k: v for k, v in row.items() if v is not None and v != ""}
    for field in ("speaker", "text", "audio", "video"):
        if not isinstance(row.get(field, ""), str):
            raise InputError(f"{where}: {field} must be text, got {repr(row[field])[:60]}")
        if not is_utf8(row.get(field, "")):
            raise InputError(f"{where}: {field} is no text in UTF-8")
    if not row.get("speaker", "").strip():
        raise InputError(f"{where}: no speaker")
    times = {}
    for field in ("start", "end"):
        try:
            times[field] = float(row[field]) if field in row else None
        except (TypeError, ValueError, OverflowError):
            times[field] = math.nan
        if times[field] is not None and not 0 <= times[field] <= LONGEST:
            got = repr(row[field])[:60]
            raise InputError(f"{where}: {field} must be a number of seconds up to {LONGEST:g}, got {got}")
    if times["end"] is not None and times["end"] <= (times["start"] or 0.0):
        raise InputError(f"{where}: ends at {times['end']} s, before it starts")
    video = folder / row["video"] if "video" in row else None
    audio = folder / row["audio"] if "audio" in row else video
    return Utterance(name, row["speaker"].strip(), row.get("text", "").strip(), -1, audio, video, **times)


def is_utf8(text: str) -> bool:
    """No half of a character (a lone surrogate) in it."""
    return not any("\ud800" <= x <= "\udfff" for x in text)
