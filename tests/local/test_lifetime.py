"""The moments between two transactions of a chunk's life: expiry, eviction, and the deletion of its bank."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import grpc
import pytest

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Limits, Pauses
from tests.support.caller import lasting
from tests.support.clocks import HOUR, Hands
from tests.support.store import new_bank
from tests.support.waiting import wait_until


def set_clock(hands, begin, microseconds):
    """Set the clock of the service so long after `begin`."""
    hands.go_on(begin + microseconds - hands.wall)


@pytest.fixture
def left_out():
    """Name what the service leaves undone in the background: it removes nothing that has expired."""
    return {"expiry"}


@pytest.fixture
def points():
    """Hold what is called at the points that the service passes."""
    return {}


@pytest.fixture
def at_its_end(serving, left_out, points):
    """Give a caller, a chunk that lives for an hour from each retrieval, the time at which it expires, and a clock to
    be set relative to that."""
    caller = serving(clock=(hands := Hands()).clock(), pauses=Pauses(left_out=left_out, at=points))
    caller.create()
    chunk_id = caller.add(expiry=lasting(HOUR, renew=True))
    expires = caller.get(chunk_id).expire_time.ToMicroseconds()
    at = partial(set_clock, hands, expires)
    at(-2)
    return caller, chunk_id, expires, at


def test_a_retrieval_in_time_holds_for_one_after_it(at_its_end, left_out):
    """Retrievals of both kinds are written at once; the second found the chunk because of the first."""
    caller, chunk_id, expires, at = at_its_end
    left_out.add("counts")
    for microseconds in (-1, 1, 2):
        at(microseconds)
        assert list(caller.retrieve()[1]) == [chunk_id]
    left_out.remove("counts")
    chunk = caller.get(chunk_id)
    assert (chunk.retrieval_count, chunk.expire_time.ToMicroseconds()) == (3, expires + 2 + HOUR)


def test_a_renewal_that_is_written_during_a_search_holds(at_its_end, left_out, points, serving):
    caller, chunk_id, _, at = at_its_end
    left_out.add("counts")
    at(-1)
    caller.retrieve()
    left_out.remove("counts")
    at(1)
    points["index searched"] = serving.server.banks.engine.records.flush_counts
    assert list(caller.retrieve()[1]) == [chunk_id]


def test_a_renewal_that_is_not_written_yet_holds_for_a_replay(serving, left_out):
    """Retrieving comes when the transaction of the replay has begun."""
    caller = serving(clock=(hands := Hands()).clock(), pauses=Pauses(left_out=left_out))
    caller.create()
    chunk, data = caller.chunk()
    chunk.expiry.CopyFrom(lasting(HOUR, renew=True))
    (first,) = caller.write((chunk, data))
    at = partial(set_clock, hands, caller.get(first.chunk_id).expire_time.ToMicroseconds())
    left_out.add("counts")
    at(-1)
    caller.retrieve()
    for microseconds, gone in ((-1, False), (1, False), (HOUR - 2, False), (HOUR - 1, True)):
        at(microseconds)
        assert caller.write((chunk, data))[0].gone == gone


def test_what_is_retrieved_while_the_expired_are_looked_for_stays(at_its_end, points, serving):
    """Retrieving comes after the counts were written, and before the chunk's time is up."""
    caller, chunk_id, _, at = at_its_end

    def retrieving():
        at(-1)
        caller.retrieve()
        at(1)

    points["counts written"] = retrieving
    serving.server.banks.engine.expiry.run()
    assert list(caller.retrieve()[1]) == [chunk_id]


def test_expiry_does_not_wait_for_other_work_in_the_background(serving):
    """Files of a deleted bank may be a million."""
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert go_on.wait(60)

    caller = serving(pauses=Pauses(at={"files dropped": slow}))
    caller.create()
    caller.create("c")
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="c"))
    try:
        assert begun.wait(60)
        caller.add(expiry=lasting(1))
        wait_until(lambda: caller.usage().chunks_expired == 1, seconds=20)
    finally:
        go_on.set()


def test_an_eviction_goes_on_after_a_restart(serving, data):
    # One step goes with the write; the next do not get a turn.
    caller = serving(limits=Limits(step_rows=1), pauses=Pauses(left_out={"evictions"}))
    caller.create("c", layers=[], capacity={"chunks": 40})
    caller.write(*(caller.chunk(layers=[]) for _ in range(40)), bank="c")
    (ack,) = caller.write(caller.chunk(layers=[]), bank="c")
    assert len(ack.evicted_chunk_ids) == 1
    assert caller.usage("c").chunks == 40
    serving.stop()
    caller = serving()
    wait_until(lambda: caller.usage("c").chunks == 21)
    log = caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="c", page_size=100)).evictions
    assert len(log) == caller.usage("c").chunks_evicted == 20
    serving.stop()
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        assert database.execute("SELECT count(*) FROM eviction_plans").fetchone() == (0,)


def test_an_eviction_goes_on_and_its_files_go_when_an_index_fails(serving, data):
    """Indexes that miss a change are loaded anew; all else that follows a commit is done."""
    at = {}
    caller = serving(limits=Limits(step_rows=4), pauses=Pauses(at=at))
    caller.create("c", capacity={"chunks": 20})
    caller.write(*(caller.chunk() for _ in range(20)), bank="c")
    caller.retrieve(banks=["c"], omit_payload=True)
    at["index told"] = lambda: 1 / 0
    caller.add(bank="c")
    wait_until(lambda: caller.usage("c").chunks == 11)
    at.clear()
    uid = caller.stub.GetBank(pb.GetBankRequest(name="c")).bank.uid
    wait_until(lambda: len(list((data / "payloads" / uid).glob("*/*"))) == 11)
    hits = caller.retrieve(banks=["c"], top_k=100)[0].queries[0].hits
    assert [hit.chunk_id for hit in hits] == caller.ids("c")


def test_a_deleted_bank_goes_bit_by_bit_also_after_a_restart(serving, data):
    caller = serving(pauses=Pauses(left_out={"clearing"}))
    caller.create(layers=[])
    caller.write(*(caller.chunk(layers=[]) for _ in range(30)))
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="b"))
    serving.stop()

    def rows(table):
        with closing(sqlite3.connect(data / "metadata.db")) as database:
            return database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]

    assert (rows("gone_banks"), rows("chunks"), rows("contents")) == (1, 30, 30)
    caller = serving(limits=Limits(step_rows=4))
    caller.create(layers=[])
    assert caller.ids() == []
    wait_until(lambda: rows("gone_banks") == 0)
    assert (rows("chunks"), rows("contents")) == (0, 0)


def test_reading_a_bank_that_is_deleted_is_no_damage(serving, data, refused, monkeypatch):
    """Files of the bank go before its last rows."""

    def delete():
        banks, done = serving.server.banks, threading.Event()
        banks.delete("default", "b")
        # Behind what the deletion has begun.
        banks.engine.later(done.set)
        assert done.wait(60)

    caller = serving(pauses=Pauses(left_out={"clearing"}, at={"objects opened": delete}))
    caller.create()
    caller.add()
    with refused("BANK_NOT_FOUND", grpc.StatusCode.NOT_FOUND):
        caller.retrieve()
    caller.create()
    chunk_id = caller.add()
    with refused("BANK_NOT_FOUND", grpc.StatusCode.NOT_FOUND):
        caller.fetch(chunk_id)
    assert not (data / "quarantine").exists()


def test_what_is_kept_of_a_bank_goes_with_it(serving):
    caller = serving()
    caller.create("c", layers=[], capacity={"chunks": 4})
    for _ in range(9):
        caller.add(bank="c", layers=[])
    caller.retrieve(banks=["c"], reader_digest="")
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="c"))
    evictions = serving.server.banks.engine.evictions
    assert (evictions.measured.used, evictions.loads, len(evictions.ledgers)) == ({}, {}, 0)


def test_a_write_right_behind_a_new_capacity_knows_it(serving):
    """Write and change wait for the same transaction."""
    caller = serving(pauses=Pauses(at=(points := {})))
    caller.create("c", layers=[], capacity={"chunks": 4})
    for _ in range(6):
        caller.add(bank="c", layers=[])
    assert (caller.usage("c").chunks, caller.usage("c").chunks_evicted) == (4, 2)
    hold, submitted = threading.Event(), threading.Semaphore(0)
    points["submitted"] = submitted.release
    serving.server.banks.store.in_order(new_bank(), hold.wait)
    with ThreadPoolExecutor(2) as threads:
        change = pb.UpdateBankRequest(
            bank=bank_pb2.Bank(name="c", capacity={"chunks": 50}), update_mask={"paths": ["capacity"]}
        )
        updated = threads.submit(caller.stub.UpdateBank, change)
        assert submitted.acquire(timeout=10)
        written = threads.submit(caller.add, bank="c", layers=[])
        assert submitted.acquire(timeout=10)
        hold.set()
    assert updated.result().bank.capacity.chunks == 50
    assert written.result() in caller.ids("c")
    assert (caller.usage("c").chunks, caller.usage("c").chunks_evicted) == (5, 2)


def test_an_index_asked_for_too_late_is_not_kept(serving, refused):
    """Deletion of the bank comes after a search has looked the bank up."""
    caller = serving(pauses=Pauses(at={"query checked": lambda: serving.server.banks.delete("default", "b")}))
    caller.create()
    caller.add()
    banks = serving.server.banks
    with refused("BANK_NOT_FOUND", grpc.StatusCode.NOT_FOUND):
        caller.retrieve()
    assert len(banks.indexes) == 0
