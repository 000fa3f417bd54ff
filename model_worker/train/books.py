"""The training text is a folder of novels (`NAME.txt` or `NAME.txt.gz`); this module says which are held back.

The held-back novels are for evaluation alone: neither the small model nor its adapters are trained on them.
"""

from __future__ import annotations

from pathlib import Path

HELD_BACK = (
    "alice-s-adventures-in-wonderland",
    "frankenstein",
    "the-adventures-of-sherlock-holmes",
    "treasure-island",
)


def book_paths(folder: Path, held_back: bool = False) -> list[Path]:
    """Return the novels to train on, or with `held_back` those kept for evaluation, sorted by name."""
    paths = sorted(folder.glob("*.txt")) + sorted(folder.glob("*.txt.gz"))
    return [path for path in paths if (path.name.split(".")[0] in HELD_BACK) == held_back]
