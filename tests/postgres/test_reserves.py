"""A full bank of which each write evicts the chunk that was used least lately, as if all rows were read."""

import random
from pathlib import Path
from typing import Any

import psycopg
import pytest

from memory_service.domain.limits import Limits
from memory_service.domain.model import Capacity, Policy
from memory_service.storage.base import Retrievals
from tests.support.clocks import SECOND, Hands
from tests.support.engines import ENGINES, opened
from tests.support.store import add, bank_now, held, new_bank

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
SEED, CHUNKS = 7, 40


@pytest.mark.parametrize("unit", ["chunks", pytest.param("bytes", marks=pytest.mark.slow)])
def test_writes_evict_in_the_order_of_the_last_use_whatever_was_used_meanwhile(tmp_path: Path, unit: Any) -> None:
    draws, hands = random.Random(SEED), Hands()
    with (
        KIND.place(tmp_path) as place,
        opened(place, clock=hands.clock(), limits=Limits(expiry_s=3600)) as engine,
        psycopg.connect(place["data"], autocommit=True) as connection,
    ):
        store, used, pinned = engine.store, dict[int, int](), set[int]()
        probe, _ = store.create_bank(new_bank("probe"))
        add(store, probe, 999)
        size = bank_now(store, probe).usage.bytes if unit == "bytes" else 1
        bank, _ = store.create_bank(new_bank(capacity=Capacity(unit, CHUNKS * size), policy=Policy("lru", target=100)))
        reserved = []
        for number in range(3 * CHUNKS):
            hands.go_on(SECOND)
            written = add(store, bank, number)
            for gone in written.evicted:
                assert gone == min(used.keys() - pinned, key=lambda each: (used[each], each))
                del used[gone]
            used[written.chunk_id] = hands.wall
            hands.go_on(SECOND)
            for chunk_id in draws.sample(sorted(used), min(len(used), 3)):
                store.count({chunk_id: Retrievals(1, hands.wall, hands.wall)})
                used[chunk_id] = hands.wall
            if number % 7 == 0:
                store.show_counts()
            if number % 11 == 0:
                chunk_id = draws.choice(sorted(used))
                store.pin(bank, [chunk_id], chunk_id not in pinned)
                pinned ^= {chunk_id}
            rows = connection.execute("SELECT count(*) FROM eviction_reserves").fetchall()
            reserved.append(rows[0][0])
        assert held(store, bank) == sorted(used)
        # Most writes found a reserve, and left one.
        assert sum(map(bool, reserved[CHUNKS + 1 :])) > CHUNKS // 2
