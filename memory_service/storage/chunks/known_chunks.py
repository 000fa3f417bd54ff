"""Chunks that were read a short while ago, and compared with the checksums of their rows. Of a chunk that is known, an
answer reads only what may have changed, and the checksums by which the rest is told to be the same. This file owns the
bound on their memory, and that what is gone is forgotten.

A model that goes on with a text recalls the same chunks again and again.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from memory_service.domain.answer_size import most_bytes
from memory_service.domain.model import Bank, Chunk, Expiry, Kept
from memory_service.storage.base import Vectors

MOST_BYTES = 16 * 1024 * 1024
# A larger chunk is not kept: its content takes longer than its row.
_LARGEST = 16 * 1024


class State(NamedTuple):
    """What of the row of a chunk its checksums do not cover, and these (`digest`)."""

    chunk_id: int
    digest: bytes
    retrieval_count: int
    last_retrieved: int | None
    pinned: Any
    ttl: int
    renew: Any
    expires: int | None
    size: int


class _Known(NamedTuple):
    """A chunk of a bank as it was read last, with its state then, and the bytes that it counts."""

    state: State
    chunk: Chunk
    size: int


class KnownChunks:
    """Keeps chunks by id. Threads share it. It implements `memory_service.storage.base.Follower`."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        """Keep at most so many bytes, as chunks take them in messages; of more, those go first that came first."""
        self._most = most
        self._lock = threading.Lock()
        self._known: dict[int, _Known] = {}
        self._bytes = 0

    def among(self, chunk_ids: Iterable[int]) -> list[int]:
        """Return those of the ids whose chunks are known."""
        return [chunk_id for chunk_id in chunk_ids if chunk_id in self._known]

    def now(self, state: State, bank: Bank) -> Chunk | None:
        """Return a chunk of a bank as it is in this state; None where its content is not known. Errors: TypeError for a
        state that no chunk has."""
        if (known := self._known.get(state.chunk_id)) is None or known.state.digest != state.digest:
            return None
        if known.state == state and known.chunk.bank == bank.name:
            return known.chunk
        return self.learn(state, replace(known.chunk, bank=bank.name, **_changed(state)))

    def learn(self, state: State, chunk: Chunk) -> Chunk:
        """Keep a chunk in a state, whose content was compared with the checksums, and return it as it is kept."""
        if (size := most_bytes(chunk)) > _LARGEST:
            return chunk
        chunk = chunk if chunk.kept else replace(chunk, kept=Kept())
        with self._lock:
            self._forget(state.chunk_id)
            self._known[state.chunk_id] = _Known(state, chunk, size)
            self._bytes += size
            while self._bytes > self._most:
                self._forget(next(iter(self._known)))
        return chunk

    def _forget(self, chunk_id: int) -> None:
        if (found := self._known.pop(chunk_id, None)) is not None:
            self._bytes -= found.size

    def _forget_all(self) -> None:
        with self._lock:
            self._known.clear()
            self._bytes = 0

    # What the store tells

    def added(self, _bank: Bank, _ids: Sequence[int], _vectors: Vectors) -> None:
        """Learn nothing of chunks that are new, since no answer has had them."""

    def removed(self, _bank: Bank, ids: Sequence[int]) -> None:
        """Forget chunks that are gone."""
        with self._lock:
            for chunk_id in ids:
                self._forget(chunk_id)

    def altered(self, bank: Bank, ids: Sequence[int]) -> None:
        """Forget chunks that have other metadata."""
        self.removed(bank, ids)

    def changed(self, _bank: Bank) -> None:
        """Learn nothing of what a bank says of itself, which rows do not go by."""

    def dropped(self, _bank: Bank) -> None:
        """Forget all chunks, since those of a bank that is deleted are not told apart."""
        self._forget_all()

    def purge(self, _bank: Bank | None) -> int:
        """Forget all chunks, also those that a reader has learned when they were gone already. No file has any of
        them."""
        self._forget_all()
        return 0


def _changed(state: State) -> dict[str, Any]:
    """Return the fields of a chunk that go by its state. Errors: TypeError."""
    if {type(state.retrieval_count), type(state.ttl)} != {int}:
        raise TypeError("a column has another type")
    return {
        "retrieval_count": state.retrieval_count,
        "last_retrieved": state.last_retrieved,
        "pinned": bool(state.pinned),
        "expiry": Expiry(state.ttl, bool(state.renew)) if state.ttl else None,
        "expires": state.expires,
        "stored_bytes": state.size,
    }
