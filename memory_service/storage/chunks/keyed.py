"""What a write is told whose idempotency key was written before."""

from typing import NamedTuple

from memory_service.domain.errors import ServiceError
from memory_service.storage.base import Written


class Keyed(NamedTuple):
    """The chunk that was first written under a key. `gone`: removed or expired; `free`: gone for so long that the key
    may be used again; `removed`: its row is gone too."""

    chunk_id: int
    digest: bytes
    gone: bool
    free: bool
    removed: bool


def counts_no_more(found: Keyed, digest: bytes | None) -> bool:
    """Tell whether a known key may be written anew. digest: see `Store.replay_of`."""
    return found.free or (found.gone and digest is None)


def replay(key: bytes, digest: bytes | None, found: Keyed) -> Written:
    """Answer a write whose key is known. digest: see `Store.replay_of`. Errors: KEY_REUSED."""
    if digest is not None and digest != found.digest:
        text = f"idempotency key {key.hex()} was used for other content (chunk {found.chunk_id})"
        raise ServiceError("KEY_REUSED", text, key=key.hex(), chunk_id=found.chunk_id)
    return Written(key, found.chunk_id, replayed=True, gone=found.gone)
