"""The checksums of a chunk's row. This file owns that every row that an answer is made of is compared with them, since
one bit in a descriptor makes a tensor that of another chunk.

`chunks.digest` has 32 bytes: the digest of the request (16), a checksum of the columns that never change (8), and one
of the metadata, which `UpdateChunk` replaces (8). The digest cannot be computed from a row: it covers the metadata, and
the checksums of the tensors, as they were sent. Counts, pins and the time of expiry are not covered. Rows of earlier
versions have the digest alone.
"""

import struct
from collections.abc import Mapping
from typing import Any

import xxhash

_DIGEST, _WHOLE = 16, 32
_FIGURES = (
    "chunk_id",
    "bank_id",
    "start",
    "original_length",
    "stored_length",
    "payload_bytes",
    "created",
)
# The figures, and the lengths of the digest and of the five columns that have bytes.
_PACKED = struct.Struct(f"<{len(_FIGURES) + 6}q")


def with_checksums(digest: bytes, row: Mapping[str, Any]) -> bytes:
    """Make the value of `chunks.digest` for a new row, which is given by column. digest: that of the request."""
    return digest + _of_rest(digest, row) + _of_metadata(row["meta"])


def with_metadata(kept: bytes, meta: str) -> bytes:
    """Make the value of `chunks.digest` for a row whose metadata are replaced. kept: the value before. Its other parts
    stay as they are, so that damage to the row still shows."""
    return kept[:-8] + _of_metadata(meta) if len(kept) == _WHOLE else kept


def digest_of(kept: bytes) -> bytes:
    """Take the digest of the request out of a value of `chunks.digest`."""
    return kept[:_DIGEST]


def flaw(row: Mapping[Any, Any]) -> str:
    """Say in a sentence what of a row is not as it was written; "" where nothing is. Text columns may be given as
    bytes, so that they need not be UTF-8.

    Errors: TypeError, struct.error for values of another type than they can have.
    """
    kept = row["digest"]
    if len(kept) == _DIGEST:
        return ""
    if kept[_DIGEST:-8] != _of_rest(kept[:_DIGEST], row):
        return "its record is not as it was written"
    if kept[-8:] != _of_metadata(row["meta"]):
        return "its metadata are not as they were written"
    return ""


def _of_rest(digest: bytes, row: Mapping[Any, Any]) -> bytes:
    columns = (row["key"], row["token_ids"], row["text"], row["payload"] or b"", row["embedding"])
    parts = (digest, *map(_bytes, columns))
    figures = (*(row[name] for name in _FIGURES), *map(len, parts))
    return xxhash.xxh3_64_digest(b"".join((_PACKED.pack(*figures), *parts)))


def _of_metadata(meta: str | bytes) -> bytes:
    return xxhash.xxh3_64_digest(_bytes(meta))


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
