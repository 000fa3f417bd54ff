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


class Delivery:
    """Writes the chunks of one memory.

    spool: where chunks wait while the service is away; without one they are dropped and counted. strict: errors of the
    service are raised, and nothing waits.
    """

    def __init__(self, link: ServiceLink, stats: MemoryStats, *, spool: Spool | None, strict: bool):
        self.link, self.stats, self.spool, self.strict = link, stats, spool, strict

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

        A key that follows from the source stays the same when the source is read again: the chunk is stored where none
        of that key is in the bank, also after one was deleted, evicted or had expired.
        """
        try:
            result = self.link.client.write(
                new.bank,
                replace(new.chunk, if_absent=True) if new.renewable else new.chunk,
                reader_digest=new.reader_digest,
                embedder_digest=new.embedder_digest,
                timeout=self.link.patience,
            )
        except kvbank.AlreadyExists:
            if not new.renewable:
                raise
            return  # a service of an earlier version has these tokens; encoded again, their K-V differ in the last bits
        self.stats.written += not result.replayed
        self.stats.evicted += len(result.evicted)
        self.stats.gone += result.gone

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
