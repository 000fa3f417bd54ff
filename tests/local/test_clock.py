"""Nothing that lives, is ordered or goes by time does so wrongly because the machine's wall clock is set."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Pauses
from tests.support.clocks import HOUR, SECOND, Hands
from tests.support.service_process import ServiceHost
from tests.support.store import new_bank
from tests.support.waiting import wait_until

AXES = [tuple(float(i == axis) for i in range(4)) for axis in range(4)]
# As Debian installs it, for any architecture; with threads.
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@pytest.fixture
def hands():
    return Hands()


@pytest.fixture
def start(serving, hands):
    """Start a service on the machine whose clocks are handed in; another one after it has stopped, and, with `off`,
    after the machine was off for so long by its wall clock."""
    keys = iter(range(1, 1000))

    def started(off=None, **options):
        serving.stop()
        if off is not None:
            hands.start_again(off)
        caller = serving(clock=hands.clock(), **options)
        caller._keys = iter(range(1000 * next(keys), 10**9))
        return caller

    return started


def lasting(microseconds, *, renew=False):
    ttl = Duration()
    ttl.FromMicroseconds(microseconds)
    return bank_pb2.Expiry(ttl=ttl, renew=renew)


def get(caller, chunk_id, bank="b"):
    return caller.stub.GetChunk(pb.GetChunkRequest(bank=bank, chunk_id=chunk_id)).chunk


def created(caller, chunk_id):
    return get(caller, chunk_id).create_time.ToMicroseconds()


def expires(caller, chunk_id):
    return get(caller, chunk_id).expire_time.ToMicroseconds()


@pytest.mark.parametrize("set_by", [-2 * HOUR, 5 * HOUR])
def test_a_wall_clock_that_is_set_while_serving_shortens_no_life(start, hands, set_by):
    caller = start()
    caller.create(expiry=lasting(HOUR, renew=True))
    renewed, other = caller.add(AXES[0]), caller.add(AXES[1])
    hands.set_wall(set_by)
    hands.go_on(SECOND)
    caller.retrieve(AXES[0], top_k=1)
    assert expires(caller, renewed) == created(caller, renewed) + SECOND + HOUR
    hands.set_wall(-set_by)
    hands.go_on(HOUR - 2 * SECOND)
    assert caller.ids() == [renewed, other]
    hands.go_on(SECOND)
    assert caller.ids() == [renewed]
    hands.go_on(SECOND)
    assert caller.ids() == []


@pytest.mark.parametrize("set_by", [-2 * HOUR, 5 * HOUR])
def test_a_wall_clock_that_is_set_between_two_starts_shortens_no_life(start, hands, set_by):
    """Time that has passed is known, because the machine has not been started anew."""
    caller = start()
    caller.create(expiry=lasting(HOUR))
    chunk_id = caller.add()
    hands.set_wall(set_by)
    hands.go_on(HOUR // 2)
    caller = start()
    assert expires(caller, chunk_id) == created(caller, chunk_id) + HOUR
    hands.go_on(HOUR // 2 - 1)
    assert caller.ids() == [chunk_id]
    hands.go_on(1)
    assert caller.ids() == []


def test_the_time_that_a_machine_was_off_counts_and_a_wall_clock_behind_it_does_not(start, hands):
    caller = start()
    caller.create(expiry=lasting(3 * HOUR))
    chunk_id = caller.add()
    caller = start(off=HOUR)
    assert caller.ids() == [chunk_id]
    later = caller.add()
    assert created(caller, later) == created(caller, chunk_id) + HOUR
    caller = start(off=-9 * HOUR)
    assert caller.ids() == [chunk_id, later]
    assert created(caller, last := caller.add()) > created(caller, later)
    assert start(off=9 * HOUR + 2 * HOUR).ids() == [later, last]


def test_orders_by_time_hold_over_starts_with_a_wall_clock_behind(start, hands):
    """Least recently used first, listing from a time on, the log of evictions."""
    caller = start()
    policy = {"kind": bank_pb2.POLICY_KIND_LRU, "target": 75}
    caller.create("c", capacity={"chunks": 4}, policy=policy)
    ids = [caller.add(axis, bank="c") for axis in AXES]
    hands.go_on(SECOND)
    caller.retrieve(AXES[2], banks=["c"], top_k=1)
    caller = start(off=-5 * HOUR)
    caller.retrieve(AXES[0], banks=["c"], top_k=1)
    used = [get(caller, chunk_id, "c").last_retrieve_time.ToMicroseconds() for chunk_id in (ids[2], ids[0])]
    assert used == sorted(used)
    caller.retrieve(AXES[1], banks=["c"], top_k=1)
    new = [caller.write(caller.chunk(), bank="c")[0] for _ in range(2)]
    assert [list(ack.evicted_chunk_ids) for ack in new] == [[ids[3]], [ids[2]]]
    filter_ = {"created_from": get(caller, ids[0], "c").create_time}
    found = caller.stub.ListChunks(pb.ListChunksRequest(bank="c", filter=filter_)).chunks
    assert [chunk.chunk_id for chunk in found] == [*ids[:2], *(ack.chunk_id for ack in new)]
    log = caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="c")).evictions
    assert all(entry.evict_time.ToMicroseconds() > entry.create_time.ToMicroseconds() for entry in log)


@pytest.mark.parametrize("set_by", [-30 * HOUR, 30 * HOUR])
def test_a_key_is_spent_for_a_day_wherever_the_wall_clock_is_set(start, hands, set_by):
    caller = start()
    caller.create()
    written = caller.chunk()
    (first,) = caller.write(written)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first.chunk_id]))
    hands.set_wall(set_by)
    caller = start()
    hands.go_on(24 * HOUR - 1)
    (again,) = caller.write(written)
    assert (again.chunk_id, again.gone) == (first.chunk_id, True)
    hands.go_on(2)
    assert not caller.write(written)[0].replayed


def test_a_wall_clock_that_stays_ahead_is_followed_and_takes_no_time_from_what_lives(start, serving, hands):
    """Wall clocks are wrong when a service starts on a machine that asks others for the time after its own start."""
    caller = start()
    caller.create(expiry=lasting(9 * HOUR, renew=True))
    written = caller.chunk(AXES[1])
    chunk_id, (spent,) = caller.add(AXES[0]), caller.write(written)
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[spent.chunk_id]))
    end = expires(caller, chunk_id)
    hands.set_wall(30 * HOUR)
    records = serving.server.banks.engine.records
    for _ in range(10):
        records.follow_wall_clock()
        hands.go_on(HOUR // 10)
    assert expires(caller, chunk_id) == end
    wait_until(lambda: expires(caller, chunk_id) == end + 30 * HOUR)
    assert records.clock.now_us() == hands.wall
    assert created(caller, caller.add()) == hands.wall
    assert caller.write(written)[0].gone
    caller = start()
    assert created(caller, caller.add()) == hands.wall
    hands.go_on(8 * HOUR - 1)
    assert chunk_id in caller.ids()
    hands.go_on(1)
    assert chunk_id not in caller.ids()


def test_a_write_that_meets_a_leap_of_the_clock_lives_as_long_as_it_should(start, serving, hands):
    """Times of the chunk were taken before the leap, and its row is written after the leap."""
    caller = start(pauses=Pauses(at=(points := {})))
    caller.create(expiry=lasting(HOUR))
    engine, hold, submitted = serving.server.banks.engine, threading.Event(), threading.Semaphore(0)
    hands.set_wall(5 * HOUR)
    engine.store.clock.behind()
    engine.store.in_order(new_bank(), hold.wait)
    hands.go_on(HOUR)
    points["submitted"] = submitted.release
    with ThreadPoolExecutor(2) as threads:
        leap = threads.submit(engine.records.follow_wall_clock)
        assert submitted.acquire(timeout=60)
        written = threads.submit(caller.add)
        assert submitted.acquire(timeout=60)
        hold.set()
        leap.result()
    assert created(caller, written.result()) == hands.wall
    assert expires(caller, written.result()) == hands.wall + HOUR


def test_no_renewal_shortens_a_life_that_an_earlier_version_left_longer(start, serving, hands, data):
    caller = start()
    caller.create(expiry=lasting(HOUR, renew=True))
    chunk_id = caller.add()
    serving.stop()
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        database.execute("UPDATE chunks SET expires = expires + ?, last_retrieved = ?", (9 * HOUR, hands.wall + HOUR))
        database.commit()
    caller = start()
    hands.go_on(SECOND)
    before = get(caller, chunk_id)
    caller.retrieve()
    after = get(caller, chunk_id)
    assert (after.retrieval_count, after.expire_time) == (1, before.expire_time)
    assert after.last_retrieve_time == before.last_retrieve_time


def test_a_time_that_an_earlier_version_wrote_by_a_clock_that_was_ahead_shortens_no_life(start, serving, hands, data):
    caller = start()
    caller.create(expiry=lasting(HOUR))
    ids = [caller.add(), caller.add()]
    serving.stop()
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        database.execute("DELETE FROM clock")
        # Its checksum was of that time, so the row has none here.
        times = "created = created + :by, expires = expires + :by, digest = substr(digest, 1, 16)"
        database.execute(f"UPDATE chunks SET {times} WHERE chunk_id = :id", {"by": 5 * HOUR, "id": ids[1]})
        database.commit()
    caller = start()
    hands.go_on(HOUR - 1)
    assert caller.ids() == ids
    hands.go_on(1)
    assert caller.ids() == ids[1:]


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed: apt-get install faketime")
def test_a_wall_clock_that_jumps_by_hours_under_a_real_process(tmp_path, connect, refused):
    """Back during a retrieval, which renews; ahead for a moment; back between two starts."""
    offset = tmp_path / "offset"
    offset.write_text("+0")
    environment = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        # Neither can be set on a real machine.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with ServiceHost(environment) as host:
        service = host.start(tmp_path / "data", durability="os")
        with connect(service.address) as caller:
            caller.create(expiry=lasting(HOUR, renew=True))
            kept = [caller.add(AXES[0]), caller.add(AXES[1])]
            end = expires(caller, kept[0])
            for set_to in ("-2h", "+0", "+5h", "-2h"):
                offset.write_text(set_to)
                caller.retrieve(AXES[0], top_k=1)
                assert end < (end := expires(caller, kept[0]))
                assert caller.ids() == kept
            gone = caller.write(spent := caller.chunk(AXES[2]))[0].chunk_id
            caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[gone]))
        for set_to in ("-2h", "+30h"):
            assert service.stop() == 0
            offset.write_text(set_to)
            service = host.start(tmp_path / "data", durability="os")
            with connect(service.address, first_key=10 + len(kept)) as caller:
                assert caller.ids() == kept
                assert caller.write(spent)[0].gone
                caller.retrieve(AXES[0], top_k=1)
                assert end < (end := expires(caller, kept[0]))
                times = [created(caller, chunk_id) for chunk_id in kept]
                kept.append(caller.add(AXES[3]))
                assert created(caller, kept[-1]) > max(times)
        service.stop()
