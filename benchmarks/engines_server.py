"""A service on one storage engine, in a process of its own, that the row `engines` fills and asks past the wire."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from benchmarks import material
from benchmarks.lines import serve
from memory_service.api.embedded import LocalServer
from memory_service.domain import digest as digests
from memory_service.domain.chunk_size import stored_bytes
from memory_service.domain.model import Bank, Chunk
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.observe.process_memory import keep_memory, leave_imports_alone
from memory_service.observe.process_threads import take_short_turns
from memory_service.operations.banks import Banks
from memory_service.storage.base import New, Retrievals, Store

# Chunks that are on their way at once while a bank is filled, and seconds between two looks at an eviction.
_AT_ONCE, _LOOK_S = 512, 0.02


def _chunks(store: Store, bank: Bank, found: material.Vectors, first: int = 0) -> Iterator[Chunk]:
    """Make chunks without K-V, as a write makes them, of embeddings [n, d]; their keys count from `first` on."""
    for number, vector in enumerate(found, first):
        while not isinstance(chunk_id := store.new_id(), int):
            chunk_id.result()
        chunk = Chunk(
            key=number.to_bytes(16, "big"),
            start=number,
            original_length=material.TOKENS,
            stored_length=material.TOKENS,
            token_ids=b"",
            text=material.TEXT,
            metadata={"number": number},
            embedding=vector.tobytes(),
            payload=None,
            chunk_id=chunk_id,
            bank=bank.name,
            created=store.clock.now_us(),
            expiry=bank.expiry,
        )
        yield replace(chunk, stored_bytes=stored_bytes(chunk, json.dumps(dict(chunk.metadata))))


class _Asked:
    """What is asked of the service beside calls over the wire. `ids` are those of the bank that was filled last."""

    def __init__(self, banks: Banks) -> None:
        self._banks, self._store = banks, banks.store
        self._ids: list[int] = []

    def fill(self, name: str, count: int, dimension: int) -> None:
        """Add so many chunks to a bank."""
        bank = self._banks.get(DEFAULT_TENANT, name)
        waiting, self._ids = [], []
        for chunk in _chunks(self._store, bank, material.vectors(count, dimension)):
            waiting += self._store.add([New(bank, chunk, digests.of_request(chunk))])
            if len(waiting) == _AT_ONCE or len(self._ids) + len(waiting) == count:
                self._ids += [done.result().chunk_id for done in waiting]
                waiting.clear()

    def count(self, hits: int) -> float:
        """Count a retrieval of each of so many chunks, and return the seconds in which that is written."""
        now = self._store.clock.now_us()
        self._store.show_counts()
        self._store.count({chunk_id: Retrievals(1, now, now, renew=False) for chunk_id in self._ids[:hits]})
        begin = time.perf_counter()
        self._store.show_counts()
        return time.perf_counter() - begin

    def evict(self, name: str) -> float:
        """Write one chunk too many into a full bank, and return the seconds until the bank is at its target."""
        bank = self._banks.get(DEFAULT_TENANT, name)
        goal = bank.usage.chunks * bank.policy.target // 100
        (chunk,) = _chunks(self._store, bank, material.vectors(1, bank.embedding.dimension), bank.usage.chunks)
        begin = time.perf_counter()
        self._store.add([New(bank, chunk, digests.of_request(chunk))])[0].result()
        while self._banks.get(DEFAULT_TENANT, name).usage.chunks > goal + 1:
            time.sleep(_LOOK_S)
        return time.perf_counter() - begin


def _main(settings: str) -> None:
    # As `kvbank serve` does, whose process this one stands for.
    keep_memory()
    take_short_turns()
    with LocalServer(**json.loads(settings)) as server:
        leave_imports_alone()
        asked = _Asked(server.banks)
        serve({"address": lambda: server.address, "fill": asked.fill, "count": asked.count, "evict": asked.evict})


if __name__ == "__main__":
    _main(*sys.argv[1:])
