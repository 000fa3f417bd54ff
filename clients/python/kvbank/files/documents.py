"""Documents are found by path or pattern here, and read as text.

This file owns the rule that only text is taken: a file with a zero byte, or that is not UTF-8, is refused in one line,
and so is one without end.
"""

import glob
import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from kvbank._exceptions import InvalidArgument

# What stands for stdin among paths.
STDIN = "-"
# Bytes of the largest document.
LARGEST = 1 << 30
_PIECE = 1 << 20
_MAGIC = "*?["


def found(paths: Iterable[str]) -> list[str]:
    """Return the paths of documents in the order given, each once; one with `*`, `?`, `[` or `**` that is no file is a
    pattern, whose files are sorted. Errors: InvalidArgument for a pattern that no file has."""
    names: list[str] = []
    for path in paths:
        if any(mark in path for mark in _MAGIC) and not Path(path).exists():
            matching = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
            if not matching:
                raise InvalidArgument(f"no file is called {path}")
            names += matching
        else:
            names.append(path)
    return list(dict.fromkeys(names))


def read(path: str, largest: int = LARGEST) -> str:
    """Return the text of a UTF-8 file, of a .gz with one, or of stdin ("-"). Errors: InvalidArgument, which names the
    file and says what is wrong with it."""
    try:
        if path == STDIN:
            return _text(path, _pieces(path, sys.stdin.buffer, largest))
        if Path(path).is_dir():
            raise InvalidArgument(f"{path} is a folder: give its files, such as '{path.rstrip('/')}/**/*.md'")
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            return _text(path, _pieces(path, file, largest))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _pieces(path: str, file: IO[bytes] | gzip.GzipFile, largest: int) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces, between which Python handles Ctrl-C."""
    total = 0
    while piece := file.read(_PIECE):
        if (zero := piece.find(0)) >= 0:
            raise InvalidArgument(f"{path} is no text: byte {total + zero} is zero")
        total += len(piece)
        if total > largest:
            raise InvalidArgument(f"{path} has more than {largest:,} bytes")
        yield piece


def _text(path: str, pieces: Iterator[bytes]) -> str:
    try:
        return b"".join(pieces).decode("utf-8-sig")  # some programs put a mark in front
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is no text: byte {error.start} is not UTF-8") from None
