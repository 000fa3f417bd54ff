"""The training text: a folder of novels (`NAME.txt` or `NAME.txt.gz`), some of them held back for evaluation."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

from model_worker.errors import InputError

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

    Raises InputError for a file that is missing, a damaged or truncated .gz, and text that is not UTF-8.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8").replace("\r\n", "\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)
