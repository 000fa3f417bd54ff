"""Eviction through the service; the rules themselves are in test_policies, and on MemLong's traces in golden."""

import itertools
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import grpc
import numpy as np
import pytest

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.storage.local.evicting import capacity as room
from memory_service.storage.local.evicting import removal
from memory_service.storage.local.records import gone_rows
from tests.support.caller import stored_bytes
from tests.support.waiting import wait_until

AXES = [tuple(float(i == axis) for i in range(4)) for axis in range(4)]


def explain(caller, bank="c", **fields):
    return caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank=bank, **fields))


def evictions(caller, bank="c"):
    return caller.stub.ListEvictions(pb.ListEvictionsRequest(bank=bank, page_size=1000)).evictions


def test_frequency_keeps_what_is_asked_for(caller):
    caller.create("c", capacity={"chunks": 4}, policy={"lower": 0, "upper": 100})
    ids = [caller.add(axis, bank="c") for axis in AXES]
    for axis in (0, 0, 2):
        caller.retrieve(AXES[axis], banks=["c"], top_k=1)
    planned = explain(caller)
    assert [victim.chunk_id for victim in planned.victims] == [ids[1], ids[3]]
    assert "2 of 4 chunks would go" in planned.explanation
    (ack,) = caller.write(caller.chunk(), bank="c")
    assert list(ack.evicted_chunk_ids) == [ids[1], ids[3]]
    assert caller.ids("c") == [ids[0], ids[2], ack.chunk_id]
    log = evictions(caller)
    assert [entry.chunk_id for entry in log] == [ids[3], ids[1]]
    for entry, victim in zip(reversed(log), planned.victims, strict=True):
        assert entry.HasField("evict_time")
        entry.ClearField("evict_time")
        assert entry == victim
    assert caller.usage("c").chunks_evicted == 2
    hits = caller.retrieve(AXES[1], banks=["c"])[0].queries[0].hits
    assert {hit.chunk_id for hit in hits} == {ids[0], ids[2], ack.chunk_id}


def test_explain_is_empty_where_nothing_would_go(caller):
    assert explain(caller, "b") == pb.ExplainEvictionResponse()
    caller.create("c", capacity={"chunks": 2})
    caller.add(bank="c")
    assert explain(caller) == pb.ExplainEvictionResponse()
    assert "do not fit" in explain(caller, need=3).explanation


@pytest.mark.parametrize("capacity", [{"tokens": 12}, {"bytes": 4000}])
def test_capacity_in_tokens_and_bytes_holds(caller, capacity):
    caller.create("c", capacity=capacity)
    unit, limit = next(iter(capacity.items()))
    sizes = {}
    for m in (3, 5, 1, 2, 4, 5, 3, 1, 5):
        written = caller.chunk(m=m)
        sizes[written[0].idempotency_key] = stored_bytes(*written)
        caller.write(written, bank="c")
        assert getattr(caller.usage("c"), unit) <= limit
    stored = caller.stub.ListChunks(pb.ListChunksRequest(bank="c")).chunks
    assert caller.usage("c").tokens == sum(chunk.stored_length for chunk in stored)
    assert caller.usage("c").bytes == sum(sizes[chunk.idempotency_key] for chunk in stored)
    assert caller.usage("c").chunks_evicted > 0


def test_recency_half(caller):
    caller.create("c", capacity={"chunks": 4}, policy={"kind": bank_pb2.POLICY_KIND_RECENCY_HALF})
    ids = [caller.add(bank="c") for _ in range(4)]
    (ack,) = caller.write(caller.chunk(), bank="c")
    assert list(ack.evicted_chunk_ids) == ids[:2]
    assert {entry.reason for entry in evictions(caller)} == {pb.EVICTION_REASON_OLDEST_HALF}


def test_files_of_victims_go(serving, data):
    caller = serving()
    caller.create("c", capacity={"chunks": 2})
    for _ in range(9):
        caller.add(bank="c")
    live = caller.ids("c")
    serving.stop()
    assert sorted(int(path.stem) for path in (data / "payloads").glob("*/*/*")) == live


def test_a_large_eviction_goes_on_in_batches(caller, monkeypatch):
    """The write's own transaction is bounded; the rest of the plan follows, and the log has it all."""
    monkeypatch.setattr(room, "STEP", 4)
    caller.create("c", layers=[], capacity={"chunks": 20})
    caller.write(*(caller.chunk(layers=[]) for _ in range(20)), bank="c")
    planned = [victim.chunk_id for victim in explain(caller).victims]
    (ack,) = caller.write(caller.chunk(layers=[]), bank="c")
    assert list(ack.evicted_chunk_ids) == planned[:4]
    while len(caller.ids("c")) > 11:
        pass
    assert [entry.chunk_id for entry in reversed(evictions(caller))] == planned


@pytest.mark.parametrize("kind", [bank_pb2.POLICY_KIND_FREQUENCY, bank_pb2.POLICY_KIND_LRU])
def test_a_plan_is_the_same_after_a_restart(serving, kind):
    """What is kept in memory for eviction follows every change as the records do."""
    caller = serving()
    caller.create("c", capacity={"tokens": 120}, policy={"kind": kind, "lower": 0, "upper": 100, "target": 70})
    random = np.random.default_rng(kind)
    for _ in range(3):
        for _ in range(25):
            caller.add(random.standard_normal(4), bank="c", m=int(random.integers(1, 6)))
            caller.retrieve(random.standard_normal(4), banks=["c"], top_k=3, omit_payload=True)
            some = random.choice(caller.ids("c"), 2).tolist()
            caller.stub.PinChunks(pb.PinChunksRequest(bank="c", chunk_ids=some[:1], pinned=random.random() < 0.1))
            if random.random() < 0.2:
                caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="c", chunk_ids=some[1:]))
        need = min(140 - caller.usage("c").tokens, 100)
        before = explain(caller, need=need)
        assert before.victims
        caller = serving()
        caller._keys = itertools.count(1000 * max(caller.ids("c")))
        assert explain(caller, need=need) == before


def test_log_is_paged_newest_first(caller):
    caller.create("c", layers=[], capacity={"chunks": 1})
    ids = [caller.add(bank="c", layers=[]) for _ in range(6)]
    first = caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="c", page_size=3))
    second = caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="c", page_size=3, page_token=first.next_page_token))
    assert [entry.chunk_id for entry in [*first.evictions, *second.evictions]] == ids[4::-1]


def test_the_log_is_bounded_for_each_bank(caller, monkeypatch):
    monkeypatch.setattr(gone_rows, "EVICTION_LOG", 4)
    for name in ("c", "d"):
        caller.create(name, layers=[], capacity={"chunks": 1})
    ids = [caller.add(bank="c", layers=[]) for _ in range(3)]
    others = [caller.add(bank="d", layers=[]) for _ in range(8)]
    assert [entry.chunk_id for entry in evictions(caller, "d")] == others[-2:-6:-1]
    assert [entry.chunk_id for entry in evictions(caller, "c")] == ids[1::-1]
    assert caller.usage("d").chunks_evicted == 7


def test_counts(caller):
    first, second = caller.add(AXES[0]), caller.add(AXES[1])
    caller.retrieve(AXES[0], top_k=1)
    caller.retrieve((*AXES[0], *AXES[1], *AXES[0]), top_k=1)
    assert (caller.count(first), caller.count(second)) == (3, 1)
    caller.retrieve(AXES[0], skip_count=True)
    header, _ = caller.retrieve(AXES[0], omit_payload=True)
    held = [pb.HeldChunk(chunk_id=first, checksum=header.chunks[0].payload.checksum)]
    caller.retrieve(AXES[0], store_id=header.store_id, held=held)
    assert (caller.count(first), caller.count(second)) == (5, 3)
    for _ in range(3):
        caller.retrieve(AXES[0], top_k=1, request_id=b"0123456789abcdef")
    assert caller.count(first) == 6
    chunk = caller.stub.GetChunk(pb.GetChunkRequest(bank="b", chunk_id=first)).chunk
    assert chunk.last_retrieve_time.ToMicroseconds() > chunk.create_time.ToMicroseconds()


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


def test_counts_survive_a_restart(serving):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    caller.retrieve()
    caller = serving()
    assert caller.count(chunk_id) == 1


def test_a_bank_whose_capacity_is_lowered_is_brought_down_to_it_in_steps(caller):
    caller.create("c", layers=[], capacity={"chunks": 3000})
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk(layers=[]) for _ in range(1500)), bank="c")]
    caller.stub.PinChunks(pb.PinChunksRequest(bank="c", chunk_ids=ids[:3], pinned=True))
    lower(caller, 100)
    wait_until(lambda: caller.usage("c").chunks <= 100)
    assert set(ids[:3]) <= set(caller.ids("c"))


def test_a_write_to_a_bank_that_is_being_brought_down_evicts_little_itself(caller):
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write(*(caller.chunk(layers=[]) for _ in range(1500)), bank="c")
    lower(caller, 100)
    (ack,) = caller.write(caller.chunk(layers=[]), bank="c")
    assert len(ack.evicted_chunk_ids) <= 500
    assert caller.usage("c").chunks <= 100
    assert ack.chunk_id in caller.ids_of_all("c")


@pytest.mark.parametrize("kind", ["pinned", "reject"])
def test_a_bank_with_a_lower_capacity_that_may_lose_nothing_is_full(caller, refused, kind):
    policy = {"kind": bank_pb2.POLICY_KIND_REJECT} if kind == "reject" else {}
    caller.create("c", layers=[], capacity={"chunks": 30}, policy=policy)
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk(layers=[]) for _ in range(20)), bank="c")]
    if kind == "pinned":
        caller.stub.PinChunks(pb.PinChunksRequest(bank="c", chunk_ids=ids, pinned=True))
    lower(caller, 10)
    with refused("BANK_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED):
        caller.write(caller.chunk(layers=[]), bank="c")
    assert caller.ids("c") == ids


@pytest.mark.parametrize("kind", ["FREQUENCY", "RECENCY_HALF", "LRU"])
def test_a_capacity_below_what_is_pinned_leaves_what_is_pinned(serving, refused, kind):
    caller = serving()
    caller.create("c", layers=[], capacity={"chunks": 3000}, policy={"kind": f"POLICY_KIND_{kind}"})
    ids = [ack.chunk_id for ack in caller.write(*(caller.chunk(layers=[]) for _ in range(700)), bank="c")]
    pinned = ids[5:600:119]
    caller.stub.PinChunks(pb.PinChunksRequest(bank="c", chunk_ids=pinned, pinned=True))
    lower(caller, 2)
    wait_until(lambda: caller.usage("c").chunks <= len(pinned))
    assert caller.ids("c") == pinned
    assert caller.usage("c").chunks_evicted == len(ids) - len(pinned) == len(evictions(caller))
    answer = explain(caller)
    assert not answer.victims
    assert answer.explanation == (
        f"the bank is full: {len(pinned)} of 2 chunks used, 1 asked for; pinned chunks, which stay, take {len(pinned)}"
    )
    with refused("BANK_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED):
        caller.write(caller.chunk(layers=[]), bank="c")
    assert refused.message == answer.explanation
    caller = serving()
    assert caller.ids("c") == pinned
    caller.stub.PinChunks(pb.PinChunksRequest(bank="c", chunk_ids=pinned, pinned=False))
    ack = caller.write(caller.chunk(layers=[], idempotency_key=b"a key not used.."), bank="c")[0]
    assert ack.chunk_id in caller.ids("c")
    assert caller.usage("c").chunks <= 2


def test_a_bank_that_evicts_nothing_says_so(caller):
    caller.create("c", layers=[], capacity={"chunks": 1}, policy={"kind": bank_pb2.POLICY_KIND_REJECT})
    caller.add(bank="c", layers=[])
    explained = explain(caller)
    assert not explained.victims
    assert explained.explanation == "the bank is full: 1 of 1 chunks used, 1 asked for; its policy evicts nothing"


def lower(caller, chunks):
    bank = bank_pb2.Bank(name="c", capacity={"chunks": chunks})
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=bank, update_mask={"paths": ["capacity"]}))


# Evictions that cannot be written, and capacities that are lowered


def damaged_log(data):
    """The index of the log of evictions can be read no more, so that no eviction can be written."""
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        place = "SELECT rootpage FROM sqlite_master WHERE name = 'ix_evictions_bank_id_sequence'"
        (page,), (size,) = database.execute(place).fetchone(), database.execute("PRAGMA page_size").fetchone()
    with open(data / "metadata.db", "r+b") as file:
        file.seek((page - 1) * size)
        file.write(bytes(size))


def test_an_eviction_that_cannot_be_written_is_said_to_the_write_and_ends(serving, data, refused, monkeypatch):
    caller = serving()
    caller.create("c", layers=[], capacity={"chunks": 40})
    for _ in range(60):
        caller.add(bank="c", layers=[])
    ids = caller.ids("c")
    serving.stop()
    damaged_log(data)
    caller = serving(grace=0.5)
    caller._keys = itertools.count(1000)
    while len(ids) < 40:
        ids.append(caller.add(bank="c", layers=[]))
    readings, read = [], room._read
    monkeypatch.setattr(room, "_read", lambda *arguments: (readings.append(1), read(*arguments))[1])
    for _ in range(2):
        with refused("STORAGE_ERROR", grpc.StatusCode.UNAVAILABLE):
            caller.add(bank="c", layers=[])
    lower(caller, 20)
    with refused("STORAGE_ERROR", grpc.StatusCode.UNAVAILABLE):
        caller.add(bank="c", layers=[])
    assert caller.ids("c") == ids
    stalled = serving.server._server._banks._room
    wait_until(lambda: stalled.stalled == 1)
    # By three writes, and tries after a second, two, four: not by a loop.
    assert len(readings) < 30
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=bank_pb2.Bank(name="c"), update_mask={"paths": ["capacity"]}))
    wait_until(lambda: stalled.stalled == 0, "what nobody asks for any more is still tried")
    serving.stop()


def test_an_eviction_that_could_not_be_written_goes_on_by_itself(caller, monkeypatch):
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write(*(caller.chunk(layers=[]) for _ in range(700)), bank="c")
    evict, failures = gone_rows.evict, iter(range(3))

    def failing(*arguments):
        if next(failures, None) is not None:
            raise sqlite3.OperationalError("database or disk is full")
        return evict(*arguments)

    monkeypatch.setattr(room, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(gone_rows, "evict", failing)
    lower(caller, 10)
    wait_until(lambda: caller.usage("c").chunks <= 10)
    assert next(failures, None) is None


def test_lowering_a_capacity_stops_nobody_else(serving):
    """More writers than there are threads wait for the bank; they hold neither a thread nor what others need."""
    caller = serving(storage_threads=2, max_inflight_bytes=1 << 20, max_unacknowledged_bytes=1 << 20)
    caller.create()
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write(*(caller.chunk(layers=[]) for _ in range(1500)), bank="c")
    banks, hold, held = serving.server._server._banks, threading.Event(), threading.Event()
    evict = gone_rows.evict
    steps = []

    def stepping(*arguments):
        steps.append(len(arguments[2]))
        return evict(*arguments)

    with ThreadPoolExecutor(12) as threads, pytest.MonkeyPatch.context() as patched:
        go_on = room.Room._go_on

        def held_up(self, bank):
            held.set()
            if hold.is_set():
                go_on(self, bank)

        patched.setattr(room.Room, "_go_on", held_up)
        patched.setattr(gone_rows, "evict", stepping)
        lower(caller, 10)
        assert held.wait(60)
        written = [threads.submit(caller.write, caller.chunk(layers=[]), bank="c") for _ in range(12)]
        wait_until(lambda: banks._room._waited)
        assert caller.add() in caller.ids()
        assert not any(write.done() for write in written)
        assert caller.usage("c").chunks == 1500
        hold.set()
        banks._room.try_again()
        banks._room._load(banks.named("c"))
        acks = [write.result(60)[0] for write in written]
    assert caller.usage("c").chunks <= 10
    assert max(steps) <= removal.STEP
    assert {ack.chunk_id for ack in acks} & set(caller.ids("c"))


def test_a_write_that_was_under_way_when_the_capacity_was_lowered_evicts_little_itself(serving):
    """It had found the bank in order, and waited for the writer behind the change."""
    caller = serving()
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write(*(caller.chunk(layers=[]) for _ in range(1500)), bank="c")
    banks, hold, submitted = serving.server._server._banks, threading.Event(), threading.Semaphore(0)
    writer, submit = banks.records.writer, banks.records.writer.submit

    def submitting(*arguments, **options):
        future = submit(*arguments, **options)
        submitted.release()
        return future

    writer.between(hold.wait)
    writer.submit = submitting
    with ThreadPoolExecutor(2) as threads:
        lowered = threads.submit(lower, caller, 10)
        assert submitted.acquire(timeout=60)
        written = threads.submit(caller.write, caller.chunk(layers=[]), bank="c")
        assert submitted.acquire(timeout=60)
        hold.set()
        lowered.result()
        (ack,) = written.result()
    assert len(ack.evicted_chunk_ids) <= 2 * removal.STEP
    assert caller.usage("c").chunks <= 10


def test_a_write_behind_a_step_that_failed_brings_the_bank_down(caller, monkeypatch):
    """The service itself tries again after ten minutes only."""
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write(*(caller.chunk(layers=[]) for _ in range(1500)), bank="c")
    save, failures = gone_rows.save_plan, iter(range(1))

    def failing(connection, bank_id, victims):
        save(connection, bank_id, victims)
        # After the step's rows are gone, and counted.
        if victims and next(failures, None) is not None:
            raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(room, "_FIRST_PAUSE_S", 600.0)
    monkeypatch.setattr(gone_rows, "save_plan", failing)
    lower(caller, 1400)
    wait_until(lambda: next(failures, None) is None)
    (ack,) = caller.write(caller.chunk(layers=[]), bank="c")
    assert len(ack.evicted_chunk_ids) <= 2 * removal.STEP
    wait_until(lambda: caller.usage("c").chunks <= 1400)
