"""The size of a chunk, by which the usage, capacity and quota of its bank count. In bytes it is what the chunk takes on
the disk: tensors, embedding, token ids, text, metadata, and about what its record and the description of each tensor
take."""

from memory_service.domain.model import Chunk, Unit

RECORD_BYTES, TENSOR_BYTES = 256, 160


def stored_bytes(chunk: Chunk, meta: str) -> int:
    """Return the bytes that a chunk will take on the disk. meta: its metadata as JSON."""
    size = RECORD_BYTES + len(meta.encode()) + len(chunk.embedding) + len(chunk.token_ids) + len(chunk.text.encode())
    if chunk.payload is not None:
        size += chunk.payload.length + TENSOR_BYTES * len(chunk.payload.tensors)
    return size


def size_of(chunk: Chunk, unit: Unit) -> int:
    """Return what a chunk, which has its `stored_bytes` already, takes of a capacity or quota in this unit."""
    return {"chunks": 1, "tokens": chunk.stored_length, "bytes": chunk.stored_bytes}[unit]
