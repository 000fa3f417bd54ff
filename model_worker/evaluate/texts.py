"""Text files that a person names, read whole."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from model_worker.errors import InputError

# Bytes: a thousand long books. A device that never ends, or an archive that unpacks without end, ends here.
LARGEST = 1 << 30
_PIECE = 1 << 22


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, or of a .gz with one.

    Raises InputError for a file that is missing or larger than LARGEST, a damaged .gz, and text that is not UTF-8.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return b"".join(_pieces(path, file)).decode("utf-8-sig")  # some programs put a mark in front
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _pieces(path: Path, file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    """In pieces, so that Ctrl-C is heard between them."""
    total = 0
    while piece := file.read(_PIECE):
        total += len(piece)
        if total > LARGEST:
            raise InputError(f"cannot read {path}: it has more than {LARGEST:,} bytes")
        yield piece
