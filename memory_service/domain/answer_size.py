"""The size of what an answer says of its chunks. This file owns the arithmetic by which the header of an answer is
refused, or waits for room, before the rows of its chunks are loaded.
"""

from memory_service.domain.errors import ServiceError
from memory_service.domain.model import Chunk, metadata_bytes

# The least bytes that a hit and a tensor take in a message, and the most of a hit.
_HIT, _TENSOR = 4, 24
_MOST_HIT = 20


class HeaderTooLarge(ServiceError):
    """The refusal TOO_LARGE of a header whose chunks were not loaded: it would take `size` bytes or more, and at most
    `most`."""

    def __init__(self, limit: int, size: int, most: int = 0) -> None:
        text = f"what the answer says of its chunks would have {size} bytes or more; ask for fewer at once"
        super().__init__("TOO_LARGE", text, limit=limit, size=size)
        self.size, self.most = size, max(size, most)


class HeaderSize:
    """Counts the bytes that a header will have, at least, while its chunks are loaded."""

    def __init__(self, limit: int, hits: int = 0) -> None:
        self._limit = limit
        self._hits = hits
        self._size = _HIT * hits

    def add(self, chunk: Chunk, times: int = 1) -> None:
        """Count a chunk that the header names so many times. Errors: HeaderTooLarge, as soon as the bound is passed."""
        # Characters are counted and not bytes, because it takes as long to count the latter as to send them.
        size = len(chunk.text) + len(chunk.token_ids) // 4 + metadata_bytes(chunk.metadata)
        if chunk.payload is not None:
            size += _TENSOR * len(chunk.payload.tensors)
        self._size += size * times
        if self._size > self._limit:
            raise HeaderTooLarge(self._limit, self._size)

    def too_large(self, least: int, most: int) -> HeaderTooLarge:
        """Make the refusal of a header whose chunks take at least `least` bytes together, and at most `most`."""
        return HeaderTooLarge(self._limit, _HIT * self._hits + least, _MOST_HIT * self._hits + most)


def most_bytes(chunk: Chunk) -> int:
    """Estimate the bytes that a chunk takes in a message, rather too high."""
    words = len(chunk.text) + metadata_bytes(chunk.metadata)
    tensors = len(chunk.payload.tensors) if chunk.payload else 0
    return 4 * words + 2 * len(chunk.token_ids) + len(chunk.embedding) + 80 * tensors + 2000
