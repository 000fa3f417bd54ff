"""The descriptor of a payload, as `contents.payload` holds it."""

import json

from memory_service.domain.model import Payload, Producer, Tensor
from memory_service.domain.payload import SAFETENSORS


def payload_json(payload: Payload | None) -> str | None:
    """Return the descriptor as JSON; None where there is no payload."""
    if payload is None:
        return None
    # Not dataclasses.astuple, which copies deeply.
    tensors = [(t.name, t.dtype, t.shape, t.offset, t.length, t.checksum) for t in payload.tensors]
    more = (payload.seed, payload.checksum, payload.kind, payload.header_checksum)
    return json.dumps([tensors, payload.producer._asdict(), *more])


def payload_of(text: str | None) -> Payload | None:
    """Read a descriptor that `contents` holds. Errors: ValueError, TypeError for one that is damaged."""
    if text is None:
        return None
    # Earlier versions wrote no checksum of the header, and at first no kind.
    rows, producer, seed, checksum, *more = json.loads(text)
    kind, header_checksum = (more + ["layer_kv", None][len(more) :])[:2]
    tensors = tuple(
        Tensor(name, dtype, tuple(shape), offset, length, check) for name, dtype, shape, offset, length, check in rows
    )
    if any(tensor.dtype not in SAFETENSORS for tensor in tensors):
        raise ValueError("a tensor has an unknown type")
    end, begin = max(t.offset + t.length for t in tensors), min(t.offset for t in tensors)
    return Payload(tensors, Producer(**producer), seed, checksum, kind, end, begin, header_checksum)
