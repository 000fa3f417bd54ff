"""Texts that are read whole: files that a person names, and the one text that every installation of Python has.

The module owns the bound on their size: a device that never ends, or an archive that unpacks without end, is refused.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from model_worker.errors import InputError

# Bytes of the largest text: as many as a thousand long books have.
LARGEST = 1 << 30
_PIECE = 1 << 22


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Return the text of a UTF-8 file, or of a .gz with one.

    Raises InputError as `read_bytes`, and for text that is not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode("utf-8-sig")  # some programs put a mark in front
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: {error}") from None


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Return what is in a file, or packed in a .gz.

    Raises InputError for a file that is missing or has more than `largest` bytes, and for a damaged .gz.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return b"".join(_pieces(path, file, largest))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _pieces(path: Path, file: BinaryIO | gzip.GzipFile, largest: int) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces, between which Python handles Ctrl-C."""
    total = 0
    while piece := file.read(_PIECE):
        total += len(piece)
        if total > largest:
            raise InputError(f"cannot read {path}: it has more than {largest:,} bytes")
        yield piece


def read_book(path: Path) -> str:
    """Return the text of a file with the line ends inside paragraphs joined, as a book of printed lines needs it.

    Raises InputError as `read_text`.
    """
    return re.sub(r"(?<=\S)\n(?=\S)", " ", read_text(path).replace("\r\n", "\n"))


def reference_text() -> str:
    """Return the Python language reference as CPython ships it for `help()`, its topics sorted by name."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def passages(text: str, letters: int) -> Iterator[str]:
    """Yield the words of a text in passages, each of which ends with the word that makes it `letters` long or longer.

    White space becomes single spaces. What is left at the end and shorter is not yielded.
    """
    words: list[str] = []
    length = 0
    for word in text.split():
        words.append(word)
        length += len(word) + 1
        if length > letters:
            yield " ".join(words)
            words, length = [], 0
