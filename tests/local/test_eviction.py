"""Evictions that the disk refuses, and writes that wait for the steps of an eviction."""

import itertools
import sqlite3
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import grpc

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import STANDARD, Limits, Pauses
from tests.support.caller import AXES
from tests.support.store import new_bank
from tests.support.waiting import wait_until


def test_what_a_header_has_named_is_counted_whatever_becomes_of_the_bytes(caller, refused, payload_path):
    sound, damaged = caller.add(AXES[0]), caller.add(AXES[0])
    path = payload_path(damaged)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        caller.retrieve(AXES[0])
    assert caller.count(sound) == 1
    assert list(caller.retrieve(AXES[0])[1]) == [sound]
    assert caller.count(sound) == 2


def test_a_call_without_an_answer_counts_nothing(caller, refused, payload_path):
    sound, missing = caller.add(AXES[0]), caller.add(AXES[0])
    payload_path(missing).unlink()
    with refused("CHECKSUM_MISMATCH", grpc.StatusCode.DATA_LOSS):
        caller.retrieve(AXES[0])
    assert caller.count(sound) == 0


def damaged_log(data):
    """Damage the index of the log of evictions, so that no eviction can be written."""
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        place = "SELECT rootpage FROM sqlite_master WHERE name = 'ix_evictions_bank_id_sequence'"
        (page,), (size,) = database.execute(place).fetchone(), database.execute("PRAGMA page_size").fetchone()
    with open(data / "metadata.db", "r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))


def test_an_eviction_that_cannot_be_written_is_said_to_the_write_and_ends(serving, data, refused):
    caller = serving()
    caller.create("c", layers=[], capacity={"chunks": 40})
    for _ in range(60):
        caller.add(bank="c", layers=[])
    ids = caller.ids("c")
    serving.stop()
    damaged_log(data)
    readings = []
    caller = serving(grace=0.5, pauses=Pauses(at={"ledger": lambda: readings.append(1)}))
    caller._keys = itertools.count(1000)
    while len(ids) < 40:
        ids.append(caller.add(bank="c", layers=[]))
    readings.clear()
    for _ in range(2):
        with refused("STORAGE_ERROR", grpc.StatusCode.UNAVAILABLE):
            caller.add(bank="c", layers=[])
    caller.update("c", capacity={"chunks": 20})
    with refused("STORAGE_ERROR", grpc.StatusCode.UNAVAILABLE):
        caller.add(bank="c", layers=[])
    assert caller.ids("c") == ids
    wait_until(lambda: caller.sample("kvbank_evictions_stalled") == 1)
    # By three writes, and tries after a second, two, four: not by a loop.
    assert len(readings) < 30
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=bank_pb2.Bank(name="c"), update_mask={"paths": ["capacity"]}))
    wait_until(lambda: caller.sample("kvbank_evictions_stalled") == 0, "what nobody asks for any more is still tried")
    serving.stop()


def test_an_eviction_that_could_not_be_written_goes_on_by_itself(serving):
    failures = iter(range(3))

    def failing():
        if next(failures, None) is not None:
            raise sqlite3.OperationalError("database or disk is full")

    caller = serving(limits=Limits(first_pause_s=0.01), pauses=Pauses(at={"eviction step": failing}))
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write_together((caller.chunk(layers=[]) for _ in range(700)), "c")
    caller.update("c", capacity={"chunks": 10})
    wait_until(lambda: caller.usage("c").chunks <= 10)
    assert next(failures, None) is None


def test_a_chunk_that_goes_behind_the_search_is_answered_without_another_search(serving):
    """Searches would find some of those that go, again and again while many go, so rows are read with the first."""
    gone, goes_on, searches = threading.Event(), threading.Event(), []

    def told():
        gone.set()
        goes_on.wait(60)

    def searched():
        searches.append(1)
        if len(searches) == 1:
            written.append(threads.submit(caller.add, AXES[2], bank="c", layers=[]))
            assert gone.wait(60)

    caller = serving(pauses=Pauses(at=(points := {})))
    caller.create("c", layers=[], capacity={"chunks": 4})
    oldest = caller.add(AXES[0], bank="c", layers=[])
    for _ in range(3):
        caller.add(AXES[1], bank="c", layers=[])
    caller.retrieve(AXES[0], banks=["c"], reader_digest="")
    written = []
    with ThreadPoolExecutor(1) as threads:
        points.update({"index searched": searched, "index told": told})
        try:
            header, _ = caller.retrieve(AXES[0], banks=["c"], reader_digest="")
        finally:
            goes_on.set()
        assert written[0].result(60) in caller.ids("c")
    assert oldest in [chunk.chunk_id for chunk in header.chunks]
    assert oldest not in caller.ids("c")
    assert len(searches) == 1


def test_a_large_bank_is_planned_while_the_writer_goes_on(serving):
    held, goes_on = threading.Event(), threading.Event()
    pauses = Pauses(at={"plan": lambda: held.set() or goes_on.wait(60)})
    caller = serving(limits=Limits(planned_beside=30), pauses=pauses)
    caller.create()
    caller.create("c", layers=[], capacity={"chunks": 40})
    ids = [caller.add(bank="c", layers=[]) for _ in range(40)]
    with ThreadPoolExecutor(1) as threads:
        written = threads.submit(caller.write, caller.chunk(layers=[]), bank="c")
        try:
            assert held.wait(20)
            assert caller.add() in caller.ids()
            assert caller.ids("c") == ids
            assert not written.done()
        finally:
            goes_on.set()
        (ack,) = written.result(60)
    # Half of them, at the default target: the oldest, where none was retrieved.
    assert list(ack.evicted_chunk_ids) == ids[:20]
    assert caller.ids("c") == [*ids[20:], ack.chunk_id]


def test_a_plan_of_a_capacity_that_was_changed_meanwhile_is_made_anew(serving):
    held, goes_on = threading.Event(), threading.Event()
    pauses = Pauses(at={"plan": lambda: held.set() or goes_on.wait(60)})
    caller = serving(limits=Limits(planned_beside=30), pauses=pauses)
    caller.create("c", layers=[], capacity={"chunks": 40})
    ids = [caller.add(bank="c", layers=[]) for _ in range(40)]
    try:
        caller.update("c", capacity={"chunks": 10})
        assert held.wait(20)
        caller.update("c", capacity={"chunks": 36})
    finally:
        goes_on.set()
    wait_until(lambda: caller.usage("c").chunks < 40)
    caller.add(bank="c", layers=[])
    assert caller.ids("c")[:-1] == ids[-18:]


def test_a_plan_that_waits_for_another_bank_goes_by_the_capacity_of_its_own_turn(serving):
    held, goes_on, begun = threading.Event(), threading.Event(), threading.Semaphore(0)
    pauses = Pauses(at={"plan": lambda: held.set() or goes_on.wait(60), "eviction": begun.release})
    caller = serving(limits=Limits(planned_beside=30), pauses=pauses)
    for bank in "ac":
        caller.create(bank, layers=[], capacity={"chunks": 40})
        ids = caller.write_together((caller.chunk(layers=[]) for _ in range(40)), bank)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(caller.add, bank="a", layers=[])
        try:
            assert held.wait(20)
            for chunks in (10, 36):
                caller.update("c", capacity={"chunks": chunks})
                # Its step is behind a write then, by which it has found that it needs a plan.
                assert begun.acquire(timeout=20)
                caller.update("c", metadata={"step": str(chunks)})
        finally:
            goes_on.set()
        other.result(60)
    wait_until(lambda: caller.usage("c").chunks < 40)
    caller.add(bank="c", layers=[])
    assert caller.ids("c")[:-1] == ids[-18:]


def test_writes_that_need_room_together_are_planned_once(serving):
    plans, goes_on, waiting = [], threading.Event(), threading.Semaphore(0)
    pauses = Pauses(at={"plan": lambda: plans.append(1) or goes_on.wait(60)})
    caller = serving(limits=Limits(planned_beside=30), pauses=pauses)
    caller.create()
    caller.create("c", layers=[], capacity={"chunks": 40})
    ids = caller.write_together((caller.chunk(layers=[]) for _ in range(40)), "c")
    pauses.at["submitted"] = waiting.release
    chunks = [caller.chunk(layers=[]) for _ in range(8)]
    with ThreadPoolExecutor(1) as threads:
        written = threads.submit(caller.write_together, chunks, "c")
        try:
            for _ in chunks:
                assert waiting.acquire(timeout=20)
            caller.add()
        finally:
            goes_on.set()
        new = sorted(written.result(60))
    assert caller.ids("c") == [*ids[20:], *new]
    assert len(plans) == 1


def test_a_plan_that_fails_is_made_again_by_itself(serving):
    failures = iter(range(2))

    def failing():
        if next(failures, None) is not None:
            raise MemoryError

    limits = Limits(planned_beside=30, first_pause_s=0.01, expiry_s=0.05)
    caller = serving(limits=limits, pauses=Pauses(at={"plan": failing}))
    caller.create("c", layers=[], capacity={"chunks": 40})
    caller.write_together((caller.chunk(layers=[]) for _ in range(40)), "c")
    caller.update("c", capacity={"chunks": 10})
    wait_until(lambda: caller.usage("c").chunks <= 10)
    assert next(failures, None) is None


def test_an_eviction_rests_beside_readers_and_the_writer_goes_on(serving):
    held, goes_on = threading.Event(), threading.Event()
    caller = serving(pauses=Pauses(at=(points := {})))
    caller.create()
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write_together((caller.chunk(layers=[]) for _ in range(700)), "c")
    points["eviction step"] = lambda: caller.usage("c")
    points["eviction rests"] = lambda: held.set() or goes_on.wait(60)
    try:
        caller.update("c", capacity={"chunks": 300})
        assert held.wait(20)
        assert caller.usage("c").chunks == 700 - STANDARD.step_rows
        assert caller.add() in caller.ids()
        assert caller.usage("c").chunks == 700 - STANDARD.step_rows
    finally:
        goes_on.set()
    wait_until(lambda: caller.usage("c").chunks == 150)


def test_lowering_a_capacity_stops_nobody_else(serving):
    """Writers that wait for the bank are more than there are threads; they hold neither a thread nor what others
    need."""
    held, left_out = threading.Event(), {"evictions"}
    pauses = Pauses(left_out=left_out, at={"eviction": held.set})
    caller = serving(storage_threads=2, max_inflight_bytes=1 << 20, max_unacknowledged_bytes=1 << 20, pauses=pauses)
    caller.create()
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write_together((caller.chunk(layers=[]) for _ in range(1500)), "c")
    waits = serving.server.banks.engine.evictions.waits
    with ThreadPoolExecutor(12) as threads:
        caller.update("c", capacity={"chunks": 10})
        assert held.wait(60)
        written = [threads.submit(caller.write, caller.chunk(layers=[]), bank="c") for _ in range(12)]
        wait_until(lambda: len(waits))
        assert caller.add() in caller.ids()
        assert not any(write.done() for write in written)
        assert caller.usage("c").chunks == 1500
        left_out.clear()
        # As any change of the bank does, this looks at what is to go.
        caller.update("c", capacity={"chunks": 10})
        acks = [write.result(60)[0] for write in written]
    assert caller.usage("c").chunks <= 10
    log = caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="c", page_size=1000)).evictions
    steps = Counter(eviction.evict_time.ToMicroseconds() for eviction in log)
    assert max(steps.values()) <= STANDARD.step_rows
    assert {ack.chunk_id for ack in acks} & set(caller.ids("c"))


def test_a_write_that_was_under_way_when_the_capacity_was_lowered_evicts_little_itself(serving):
    """Writes that had found the bank in order wait for the writer behind the change."""
    caller = serving(pauses=Pauses(at=(points := {})))
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write_together((caller.chunk(layers=[]) for _ in range(1500)), "c")
    hold, submitted = threading.Event(), threading.Semaphore(0)
    serving.server.banks.store.in_order(new_bank(), hold.wait)
    points["submitted"] = submitted.release
    with ThreadPoolExecutor(2) as threads:
        lowered = threads.submit(caller.update, "c", capacity={"chunks": 10})
        assert submitted.acquire(timeout=60)
        written = threads.submit(caller.write, caller.chunk(layers=[]), bank="c")
        assert submitted.acquire(timeout=60)
        hold.set()
        lowered.result()
        (ack,) = written.result()
    assert len(ack.evicted_chunk_ids) <= 2 * STANDARD.step_rows
    assert caller.usage("c").chunks <= 10


def test_a_write_behind_a_step_that_failed_brings_the_bank_down(serving):
    """Retries of the service itself come after ten minutes only."""
    failed = threading.Event()

    def failing():
        if not failed.is_set():
            failed.set()
            raise sqlite3.OperationalError("database or disk is full")

    # After the step's rows are gone, and counted.
    caller = serving(limits=Limits(first_pause_s=600.0), pauses=Pauses(at={"eviction planned": failing}))
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write_together((caller.chunk(layers=[]) for _ in range(1500)), "c")
    caller.update("c", capacity={"chunks": 1400})
    wait_until(lambda: caller.sample("kvbank_evictions_stalled") == 1)
    assert failed.is_set()
    (ack,) = caller.write(caller.chunk(layers=[]), bank="c")
    assert len(ack.evicted_chunk_ids) <= 2 * STANDARD.step_rows
    wait_until(lambda: caller.usage("c").chunks <= 1400)
