"""The digest of a write request, by which a repeated request is told from one that uses its key for other content."""

import json
from dataclasses import astuple
from typing import Any

import xxhash

from memory_service.domain.model import Chunk


def of_request(chunk: Chunk) -> bytes:
    """Return a digest of all that the caller said, tensors by their checksums. It is the same only for a repeated
    request."""
    payload = chunk.payload
    said: list[Any] = [
        (chunk.start, chunk.original_length, chunk.stored_length, chunk.text, sorted(chunk.metadata.items())),
        [(t.name, t.dtype, t.shape, 0, t.length, t.checksum) for t in payload.tensors] if payload else None,
        payload.producer if payload else None,
        (len(chunk.token_ids), len(chunk.embedding)),
    ]
    # Only where it is said, so that what was written before there was such a thing keeps its digest.
    if chunk.pinned or chunk.expiry is not None:
        said.append((chunk.pinned, chunk.expiry and astuple(chunk.expiry)))
    digest = xxhash.xxh3_128(json.dumps(said).encode())
    digest.update(chunk.token_ids)
    digest.update(chunk.embedding)
    return digest.digest()
