"""The way of a finished chunk to the service, or to the spool while the service is away.

This file owns two rules. No trouble with the service ends a generation: what the service cannot take now waits in the
spool, what it refuses is dropped or set aside, each with a warning (`strict` raises instead). And a chunk is stored
once: what is written again carries the key of the first attempt.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import xxhash

import kvbank
from model_worker.errors import SpoolFull
from model_worker.remember.service_link import AWAY, START_S, ServiceLink
from model_worker.remember.spool import Spool, Spooled
from model_worker.remember.stats import MemoryStats

# How often the same chunk of a source can be deleted and stored again while the service knows its keys (a day). The
# bound is there so that a service which calls every chunk gone does not hold up its worker without end.
TIMES_AGAIN = 1000


class Delivery:
    """Writes the chunks of one memory.

    spool: where chunks wait while the service is away; without one they are dropped and counted. strict: errors of the
    service are raised, and nothing waits. times_again: how many keys are tried for a chunk that has gone.
    """

    def __init__(self, link: ServiceLink, stats: MemoryStats, *, spool: Spool | None, strict: bool):
        self.link, self.stats, self.spool, self.strict = link, stats, spool, strict
        self.times_again = TIMES_AGAIN

    def write(self, new: Spooled) -> None:
        """Store a chunk, behind those that wait; put it into the spool where the service is away."""
        if self.strict:
            self.store(new)
            return
        if self.link.worth_trying() and self.deliver_spooled():
            try:
                self.store(new)
                return
            except AWAY as error:
                self.link.lost(error)
            except kvbank.ServiceError as error:
                self._drop(error)
                return
        self._spool(new)

    def deliver_spooled(self) -> bool:
        """Deliver what waits on disk, oldest first; return whether nothing waits any more."""
        if self.spool is None or not len(self.spool):
            return True
        if self.link.away and not self.link.answers_again(START_S):
            return False
        for path, waiting in self.spool:
            try:
                self.store(waiting)
            except AWAY as error:
                self.link.lost(error)
                return False
            except kvbank.ServiceError as error:
                self.stats.dropped += 1
                self.spool.set_aside(path, str(error))
            else:
                self.spool.done(path)
        return True

    def store(self, new: Spooled) -> None:
        """Write a chunk so that it is stored once, whatever became of earlier writes under its key. Raises
        ServiceError.

        A key that follows from the source stays the same when the source is read again. Where the chunk of that key is
        gone, the chunk is stored again under a second key that follows from the first, so that a writer that crashed
        after this comes to the same second key.
        """
        chunk, written, times = new.chunk, self.stats.written, 0
        while (gone := self._attempt(new, chunk)) and new.renewable and times < self.times_again:
            chunk, times = replace(chunk, idempotency_key=_next_key(chunk.idempotency_key)), times + 1
        self.stats.again += times > 0 and self.stats.written > written
        self.stats.gone += gone

    def _attempt(self, new: Spooled, chunk: kvbank.NewChunk) -> bool:
        """Write a chunk under its key; return whether the key was used for a chunk that is gone by now."""
        try:
            result = self.link.client.write(
                new.bank,
                chunk,
                reader_digest=new.reader_digest,
                embedder_digest=new.embedder_digest,
                timeout=self.link.patience,
            )
        except kvbank.AlreadyExists as error:
            if not new.renewable:
                raise
            # These tokens of the source were written; encoded again, their K-V differ in the last bits.
            return self._is_gone(new.bank, error)
        self.stats.written += not result.replayed
        self.stats.evicted += len(result.evicted)
        return result.gone

    def _is_gone(self, bank: str, error: kvbank.AlreadyExists) -> bool:
        """Tell whether the chunk that an idempotency key was first used for is no longer in the bank."""
        try:
            self.link.client.get_chunk(bank, int(error.metadata.get("chunk_id", 0)), timeout=self.link.patience)
        except kvbank.ChunkNotFound:
            return True
        return False

    def _spool(self, new: Spooled) -> None:
        if self.spool is None:
            self.stats.dropped += 1
            return
        try:
            self.spool.put(new)
            self.stats.spooled += 1
        except (SpoolFull, OSError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self.stats.dropped += 1
        warnings.warn(f"a chunk was not remembered: {error}", RuntimeWarning, stacklevel=2)


def source_key(source: str | None, start: int, token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the idempotency key of a chunk as a keyword of `NewChunk`: it follows from the source, where one is named.

    start: offset of the chunk in its source.
    """
    if source is None:
        return {}
    return {"idempotency_key": xxhash.xxh3_128_digest(f"{source} {start} {list(token_ids)}".encode())}


def _next_key(key: bytes) -> bytes:
    """Return the key under which a chunk is stored again after the chunk that `key` was used for has gone."""
    return xxhash.xxh3_128_digest(b"again " + key)
