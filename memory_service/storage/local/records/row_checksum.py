"""Checksums of a chunk's row, behind the digest of its request in `chunks.digest`: the digest's 16 bytes, 8 of what
never changes, 8 of the metadata, which `UpdateChunk` replaces. The digest itself cannot be computed from a row: it
covers the metadata, and the checksums of the tensors, as they were sent. Every row that an answer is made of is
compared with its checksums, since a bit in a descriptor makes one tensor another's.

Not covered: counts, pins and the time of expiry. Rows of earlier versions have the digest alone.
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


def with_checksums(digest: bytes, row: Mapping[str, Any]) -> bytes:
    """What `chunks.digest` holds of a new row, given as `chunk_rows.insert` takes it."""
    return digest + _of_rest(digest, row) + _of_metadata(row["meta"])


def with_metadata(kept: bytes, meta: str) -> bytes:
    """What `chunks.digest` holds when the metadata are replaced. The rest is not looked at, so that damage shows."""
    return kept[:-8] + _of_metadata(meta) if len(kept) == _WHOLE else kept


def digest_of(kept: bytes) -> bytes:
    """The digest of the request."""
    return kept[:_DIGEST]


def flaw(row: Mapping[Any, Any]) -> str:
    """What is not as it was written, as a sentence, or "". Text columns may be bytes, so that they need not be UTF-8.

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
    parts = [digest, *map(_bytes, columns)]
    figures = [*(row[name] for name in _FIGURES), *map(len, parts)]
    hasher = xxhash.xxh3_64(struct.pack(f"<{len(figures)}q", *figures))
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def _of_metadata(meta: str | bytes) -> bytes:
    return xxhash.xxh3_64_digest(_bytes(meta))


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
