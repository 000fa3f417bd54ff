"""A worker's recently used payloads, so that a chunk retrieved again is not sent again.

This file owns the rule that bytes of one store are never taken for those of another: entries are named by store, chunk
and checksum, and a data folder that was restored or made anew has another store id.
"""

from contextlib import suppress

from cachetools import LRUCache

from model_worker.window.recalled import RecalledChunk

# Names of payloads that a query tells of at most.
_MOST_NAMED = 4096


class PayloadCache:
    """Holds payloads of at most `max_bytes` bytes in all; the least recently used go first. Not for two threads."""

    def __init__(self, max_bytes: int = 256 << 20):
        self._chunks: LRUCache[tuple[str, int, int], RecalledChunk] = LRUCache(max_bytes, getsizeof=_size)

    def get(self, store_id: str, chunk_id: int, checksum: int) -> RecalledChunk | None:
        """Return the payload under exactly this name, which counts as a use; None where it is not held."""
        key = (store_id, chunk_id, checksum)
        chunk = self._chunks.pop(key, None)
        if chunk is not None:
            self._chunks[key] = chunk  # put in again: iteration is by the time of putting in, and `held` by use
        return chunk

    def put(self, store_id: str, checksum: int, chunk: RecalledChunk) -> None:
        """Keep a payload, and let the least recently used ones go; one that exceeds the whole room is not kept."""
        key = (store_id, chunk.chunk_id, checksum)
        if key not in self._chunks:
            with suppress(ValueError):  # it is larger than the room
                self._chunks[key] = chunk

    def held(self, store_id: str, limit: int = _MOST_NAMED) -> dict[int, int]:
        """Return checksums by chunk id of at most `limit` payloads of a store, the most recently used first."""
        names = [key for key in reversed(list(self._chunks)) if key[0] == store_id]
        return {chunk_id: checksum for _, chunk_id, checksum in names[:limit]}


def _size(chunk: RecalledChunk) -> int:
    """Return the bytes of a chunk's tensors."""
    return sum(tensor.numel() * tensor.element_size() for layer in chunk.layers.values() for tensor in layer)
