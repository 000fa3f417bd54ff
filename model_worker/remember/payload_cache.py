"""A worker's recently used payloads, so that a chunk retrieved again is not sent again.

Entries are named by store, chunk and checksum. A restored or recreated data folder has another store id, so an old
id's bytes are never served for a new one.
"""

from collections import OrderedDict

from torch import Tensor

from model_worker.window.recalled import RecalledChunk

_Key = tuple[str, int, int]


class PayloadCache:
    """Least recently used, bounded in bytes. Not thread-safe."""

    def __init__(self, max_bytes: int = 256 << 20):
        self.max_bytes = max_bytes
        self._chunks: OrderedDict[_Key, RecalledChunk] = OrderedDict()
        self._bytes = 0

    def get(self, store_id: str, chunk_id: int, checksum: int) -> RecalledChunk | None:
        """The payload under exactly this name."""
        chunk = self._chunks.get((store_id, chunk_id, checksum))
        if chunk is not None:
            self._chunks.move_to_end((store_id, chunk_id, checksum))
        return chunk

    def put(self, store_id: str, checksum: int, chunk: RecalledChunk) -> None:
        """Keep `chunk`, and let the least recently used ones go."""
        key = (store_id, chunk.chunk_id, checksum)
        if key in self._chunks:
            return
        self._chunks[key] = chunk
        self._bytes += _size(chunk)
        while self._bytes > self.max_bytes:
            self._bytes -= _size(self._chunks.popitem(last=False)[1])

    def held(self, store_id: str, limit: int = 4096) -> dict[int, int]:
        """Checksums by chunk id of at most `limit` payloads of this store, most recently used first."""
        names = [key for key in reversed(self._chunks) if key[0] == store_id]
        return {chunk_id: checksum for _, chunk_id, checksum in names[:limit]}


def _size(chunk: RecalledChunk) -> int:
    tensors: list[Tensor] = [tensor for layer in chunk.layers.values() for tensor in layer]
    return sum(t.numel() * t.element_size() for t in tensors)
