"""Stored results as pieces of Markdown: what every part of docs.py needs.

Not here: which piece stands where (docs.py), and the measuring.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIGURES, BENCH = ROOT / "docs" / "figures", ROOT / "bench" / "results"
NOT_MEASURED = "not measured"


class NotMeasured(Exception):
    """A result that nobody has stored yet."""


def stored(name: str) -> dict:
    """docs/figures/<name>.json."""
    path = FIGURES / f"{name}.json"
    if not path.exists():
        raise NotMeasured(name)
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> list[str]:
    if not path.exists():
        raise NotMeasured(path.name)
    return path.read_text(encoding="utf-8").splitlines()


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def fenced(path: Path) -> str:
    return "\n".join(["```", *lines_of(path), "```"])


def picture(name: str, what: str) -> str:
    """docs/figures/<name>, for a page in docs/."""
    if not (FIGURES / name).exists():
        raise NotMeasured(name)
    return f"![{what}](figures/{name})"
