"""The checksums of a chunk's row. This file owns that every row that an answer is made of is compared with them, since
one bit in a descriptor makes a tensor that of another chunk.

`chunks.digest` has 32 bytes: the digest of the request (16), a checksum of the columns that never change (8), and one
of the metadata, which `UpdateChunk` replaces (8). The digest cannot be computed from a row: it covers the metadata, and
the checksums of the tensors, as they were sent. Counts, pins and the time of expiry are not covered. Rows of earlier
versions have the digest alone.
"""

import struct
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import xxhash

_DIGEST, _WHOLE = 16, 32
FIGURES = (
    "chunk_id",
    "bank_id",
    "start",
    "original_length",
    "stored_length",
    "payload_bytes",
    "created",
)
COLUMNS = ("key", "token_ids", "text", "payload", "embedding")
_figures, _columns = itemgetter(*FIGURES), itemgetter(*COLUMNS)
# The figures, and the lengths of the digest and of the columns.
_PACKED = struct.Struct(f"<{len(FIGURES) + 6}q")


def with_checksums(digest: bytes, row: Mapping[str, Any]) -> bytes:
    """Make the value of `chunks.digest` for a new row, which is given by column. digest: that of the request."""
    return digest + _of_rest(digest, _figures(row), _columns(row)) + _of_metadata(row["meta"])


def with_metadata(kept: bytes, meta: str) -> bytes:
    """Make the value of `chunks.digest` for a row whose metadata are replaced. kept: the value before. Its other parts
    stay as they are, so that damage to the row still shows."""
    return kept[:-8] + _of_metadata(meta) if len(kept) == _WHOLE else kept


def digest_of(kept: bytes) -> bytes:
    """Take the digest of the request out of a value of `chunks.digest`."""
    return kept[:_DIGEST]


def flaw(row: Mapping[Any, Any]) -> str:
    """Say in a sentence what of a row, which is given by column, is not as it was written; see `flaw_of`."""
    return flaw_of(row["digest"], _figures(row), _columns(row), row["meta"])


def flaw_of(kept: bytes, figures: Sequence[Any], columns: Sequence[Any], meta: str | bytes) -> str:
    """Say in a sentence what of a row is not as it was written; "" where nothing is. Text columns may be given as
    bytes, so that they need not be UTF-8.

    kept: the value of `chunks.digest`. figures, columns: the values of FIGURES and of COLUMNS.
    Errors: TypeError, struct.error for values of another type than they can have.
    """
    if len(kept) == _DIGEST:
        return ""
    if kept[_DIGEST:-8] != _of_rest(kept[:_DIGEST], figures, columns):
        return "its record is not as it was written"
    if kept[-8:] != _of_metadata(meta):
        return "its metadata are not as they were written"
    return ""


def _of_rest(digest: bytes, figures: Sequence[Any], columns: Sequence[Any]) -> bytes:
    key, token_ids, text, payload, embedding = columns
    text, payload = _bytes(text), _bytes(payload or b"")
    lengths = len(digest), len(key), len(token_ids), len(text), len(payload), len(embedding)
    packed = _PACKED.pack(*figures, *lengths)
    return xxhash.xxh3_64_digest(b"".join((packed, digest, key, token_ids, text, payload, embedding)))


def _of_metadata(meta: str | bytes) -> bytes:
    return xxhash.xxh3_64_digest(_bytes(meta))


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
