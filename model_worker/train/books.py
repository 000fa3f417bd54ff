"""The training text: a folder of novels (`NAME.txt` or `NAME.txt.gz`), some of them held back for evaluation."""

from __future__ import annotations

import re
from pathlib import Path

from model_worker.evaluate.texts import read_text

HELD_BACK = (
    "alice-s-adventures-in-wonderland",
    "frankenstein",
    "the-adventures-of-sherlock-holmes",
    "treasure-island",
)


def book_paths(folder: Path, held_back: bool = False) -> list[Path]:
    """The novels to train on, or with `held_back` those kept for evaluation, sorted by name."""
    paths = sorted(folder.glob("*.txt")) + sorted(folder.glob("*.txt.gz"))
    return [path for path in paths if (path.name.split(".")[0] in HELD_BACK) == held_back]


def read_book(path: Path) -> str:
    """The text with hard line ends inside paragraphs joined: a model of prose has no use for a printer's line width.

    Raises InputError as `read_text`.
    """
    return re.sub(r"(?<=\S)\n(?=\S)", " ", read_text(path).replace("\r\n", "\n"))
