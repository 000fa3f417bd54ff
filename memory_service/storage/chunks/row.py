"""A chunk as columns of a row, and back. This file owns that no row becomes a chunk that is not as it was written."""

import json
from collections.abc import Mapping
from functools import lru_cache
from operator import attrgetter
from typing import Any

from memory_service.domain.model import Bank, Chunk, Expiry
from memory_service.storage.chunks import row_checksum
from memory_service.storage.chunks.payload_json import payload_json, payload_of


def row_of(bank_id: int, chunk: Chunk, digest: bytes) -> Mapping[str, Any]:
    """Make the row of a chunk, by column. This is done before the write gets its turn, so that others do not wait for
    it. digest: that of the request."""
    expiry = chunk.expiry or Expiry()
    row = {
        "chunk_id": chunk.chunk_id,
        "bank_id": bank_id,
        "key": chunk.key,
        "start": chunk.start,
        "original_length": chunk.original_length,
        "stored_length": chunk.stored_length,
        "payload_bytes": chunk.payload.length if chunk.payload else 0,
        "meta": json.dumps(dict(chunk.metadata)),
        "created": chunk.created,
        "retrieval_count": 0,
        "last_retrieved": None,
        "pinned": chunk.pinned,
        "ttl": expiry.ttl,
        "renew": expiry.renew,
        "expires": chunk.created + expiry.ttl if expiry.ttl else None,
        "size": chunk.stored_bytes,
        "token_ids": chunk.token_ids,
        "text": chunk.text,
        "payload": payload_json(chunk.payload),
        "embedding": chunk.embedding,
    }
    return row | {"digest": row_checksum.with_checksums(digest, row)}


_figures, _columns = attrgetter(*row_checksum.FIGURES), attrgetter(*row_checksum.COLUMNS)


def chunk_of(row: Any, bank: Bank, embedding: bool) -> Chunk:
    """Make the value of a row of `chunks` and `contents`. Errors: ValueError, KeyError, TypeError,
    IndexError, AttributeError, OverflowError, struct.error for a row that cannot be used."""
    metadata = {} if row.meta == "{}" else json.loads(row.meta)
    payload, figures = _cached_payload_of(row.payload), _figures(row)
    if type(metadata) is not dict or len(row.token_ids) % 4 or type(row.token_ids) is not bytes:
        raise ValueError("metadata or token ids are damaged")
    if type(row.embedding) is not bytes or len(row.embedding) != 4 * bank.embedding.dimension:
        raise ValueError("the embedding is cut")
    if (
        type(row.text) is not str
        or type(row.key) is not bytes
        or {*map(type, figures), type(row.retrieval_count), type(row.ttl)} != {int}
    ):
        raise TypeError("a column has another type")
    if row.payload_bytes != (payload.length if payload else 0):
        raise ValueError("the descriptor is of another chunk")
    if flaw := row_checksum.flaw_of(row.digest, figures, _columns(row), row.meta):
        raise ValueError(flaw)
    return Chunk(
        key=row.key,
        start=row.start,
        original_length=row.original_length,
        stored_length=row.stored_length,
        token_ids=row.token_ids,
        text=row.text,
        metadata=metadata,
        embedding=row.embedding if embedding else b"",
        payload=payload,
        chunk_id=row.chunk_id,
        bank=bank.name,
        created=row.created,
        retrieval_count=row.retrieval_count,
        last_retrieved=row.last_retrieved,
        pinned=bool(row.pinned),
        expiry=Expiry(row.ttl, bool(row.renew)) if row.ttl else None,
        expires=row.expires,
        stored_bytes=row.size,
    )


# What is retrieved often is parsed once: it never changes.
_cached_payload_of = lru_cache(512)(payload_of)
