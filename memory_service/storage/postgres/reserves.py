"""The chunks that go next from a bank whose policy takes what was used least lately (`lru`). This file owns that a
write which evicts a few chunks does not read all rows, and evicts the same ones as if it did.

When all rows were read for a plan, the next chunks in the order of their last use are kept: the reserve. A use only
makes a chunk go later, and a new chunk was used last of all. So a chunk of the reserve that was not used since goes
before all that are not in the reserve; one that was used since leaves it.
"""

import numpy as np
from sqlalchemy import Connection

from memory_service.domain import eviction
from memory_service.domain.eviction import NOBODY, Candidates, Victims
from memory_service.domain.model import Bank, Capacity
from memory_service.storage.chunks.counts import Unwritten
from memory_service.storage.postgres.rows import chunk_rows, reserve_rows

# A reserve has a quarter of the chunks, and so many at most.
_SHARE, _MOST = 4, 100_000
# Steps that one write looks at; where it wants more, a plan is made from all rows.
_MOST_STEPS = 16


def make(connection: Connection, bank: Bank, candidates: Candidates, doomed: Victims) -> None:
    """Keep the chunks that go next. candidates, doomed: all chunks of the bank, and those that a plan takes of them."""
    most = min(len(candidates.ids) // _SHARE, _MOST)
    victims, until = eviction.following(candidates, bank.policy, len(doomed), most)
    if victims:
        reserve_rows.save(connection, bank.bank_id, victims, until)


def take(connection: Connection, bank: Bank, capacity: Capacity, wanted: int, unwritten: Unwritten) -> Victims:
    """Take as many of the chunks that go next as make up `wanted`, in the unit of the capacity; none where the
    reserve has not so many."""
    taken: list[Victims] = []
    for _ in range(_MOST_STEPS):
        if (step := reserve_rows.first(connection, bank.bank_id)) is None:
            break
        ids = step.victims.ids.tolist()
        there = chunk_rows.candidates(connection, bank.bank_id, capacity.unit, unwritten, ids)
        unused = np.flatnonzero(there.used <= step.until)
        order = unused[np.argsort(there.used[unused], kind="stable")]
        sizes = np.cumsum(there.sizes[order])
        count = min(int(np.searchsorted(sizes, wanted)) + 1, len(order))
        left = Victims(there.ids[order], np.full(len(order), step.victims.codes[0], np.uint8))
        reserve_rows.shorten(connection, bank.bank_id, step.number, left.part(count))
        taken.append(left.part(0, count))
        wanted -= int(sizes[count - 1]) if count else 0
        if wanted <= 0:
            return Victims(*(np.concatenate(each) for each in zip(*((v.ids, v.codes) for v in taken), strict=True)))
    if taken:
        reserve_rows.forget(connection, bank.bank_id)
    return NOBODY
