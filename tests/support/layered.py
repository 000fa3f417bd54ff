"""Payloads of several layers, as objects are given them without a server."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from memory_service.domain.model import Payload, Producer, Tensor
from memory_service.storage.base import Objects

UID = "0123456789abcdef"


def put(
    objects: Objects, chunk_id: int, layers: int = 2, tokens: int = 4, copy: Mapping[str, str] | None = None
) -> Payload:
    """Store a payload whose bytes are drawn from its chunk's id: k and v of `tokens` x 4 fp16, and positions."""
    tensors = []
    for layer in range(layers):
        for name in (f"k.{layer}", f"v.{layer}"):
            tensors.append(Tensor(name, "fp16", (1, tokens, 4), 0, tokens * 8, 0))
        tensors.append(Tensor(f"pos.{layer}", "int32", (tokens,), 0, tokens * 4, 0))
    payload = Payload(tuple(tensors), Producer())
    return objects.put(UID, chunk_id, payload, data_of(chunk_id, payload), lambda _checksums: copy or {})


def data_of(chunk_id: int, payload: Payload) -> bytes:
    """Return all tensors of the payload of a chunk that `put` has stored."""
    return np.random.default_rng(chunk_id).bytes(payload.length)


def only(payload: Payload, layers: Sequence[int]) -> Payload:
    """Cut a descriptor to some layers, as an answer does."""
    names = {str(layer) for layer in layers}
    return replace(payload, tensors=tuple(t for t in payload.tensors if t.name.rpartition(".")[2] in names))


def read(objects: Objects, chunk_id: int, payload: Payload) -> bytes:
    """Open an object and read the tensors of a descriptor."""
    source = objects.open(UID, chunk_id, payload)
    try:
        found = b""
        for tensor in payload.tensors:
            room = bytearray(tensor.length)
            assert source.read_at(memoryview(room), tensor.offset) == tensor.length
            found += room
        return found
    finally:
        source.close()
