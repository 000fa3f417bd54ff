"""Eviction through the service; the rules themselves are in test_policies, and on MemLong's traces in golden."""

import itertools

import grpc
import numpy as np
import pytest

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Limits
from tests.support.caller import AXES, stored_bytes
from tests.support.diagonal import rotated
from tests.support.waiting import wait_until


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


def test_a_large_eviction_goes_on_in_batches(serving):
    """Evictions in the write's own transaction are bounded; the rest of the plan follows, and the log has it all."""
    caller = serving(limits=Limits(step_rows=4))
    caller.create("c", layers=[], capacity={"chunks": 20})
    caller.write(*(caller.chunk(layers=[]) for _ in range(20)), bank="c")
    planned = [victim.chunk_id for victim in explain(caller).victims]
    (ack,) = caller.write(caller.chunk(layers=[]), bank="c")
    assert list(ack.evicted_chunk_ids) == planned[:4]
    while len(caller.ids("c")) > 11:
        pass
    assert [entry.chunk_id for entry in reversed(evictions(caller))] == planned


@pytest.mark.parametrize("kind", rotated([bank_pb2.POLICY_KIND_FREQUENCY, bank_pb2.POLICY_KIND_LRU], 1, every=2))
def test_a_plan_is_the_same_after_a_restart(serving, kind):
    """Ledgers, which are kept in memory for evictions, follow every change as the records do."""
    caller = serving()
    caller.create("c", capacity={"tokens": 120}, policy={"kind": kind, "lower": 0, "upper": 100, "target": 70})
    random = np.random.default_rng(kind)
    for _ in range(2):
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


def test_the_log_is_bounded_for_each_bank(serving):
    caller = serving(limits=Limits(eviction_log=4))
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


def test_counts_survive_a_restart(serving):
    caller = serving()
    caller.create()
    chunk_id = caller.add()
    caller.retrieve()
    caller = serving()
    assert caller.count(chunk_id) == 1


def test_a_bank_whose_capacity_is_lowered_is_brought_down_to_it_in_steps(caller):
    caller.create("c", layers=[], capacity={"chunks": 3000})
    ids = caller.write_together((caller.chunk(layers=[]) for _ in range(700)), "c")
    caller.stub.PinChunks(pb.PinChunksRequest(bank="c", chunk_ids=ids[:3], pinned=True))
    caller.update("c", capacity={"chunks": 100})
    wait_until(lambda: caller.usage("c").chunks <= 100)
    assert set(ids[:3]) <= set(caller.ids("c"))


def test_a_write_to_a_bank_that_is_being_brought_down_evicts_little_itself(caller):
    caller.create("c", layers=[], capacity={"chunks": 3000})
    caller.write_together((caller.chunk(layers=[]) for _ in range(700)), "c")
    caller.update("c", capacity={"chunks": 100})
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
    caller.update("c", capacity={"chunks": 10})
    with refused("BANK_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED):
        caller.write(caller.chunk(layers=[]), bank="c")
    assert caller.ids("c") == ids


@pytest.mark.parametrize("kind", rotated(["FREQUENCY", "RECENCY_HALF", "LRU"], 0))
def test_a_capacity_below_what_is_pinned_leaves_what_is_pinned(serving, refused, kind):
    caller = serving()
    caller.create("c", layers=[], capacity={"chunks": 3000}, policy={"kind": f"POLICY_KIND_{kind}"})
    ids = caller.write_together((caller.chunk(layers=[]) for _ in range(520)), "c")
    pinned = ids[5:500:99]
    caller.stub.PinChunks(pb.PinChunksRequest(bank="c", chunk_ids=pinned, pinned=True))
    caller.update("c", capacity={"chunks": 2})
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


# Evictions that cannot be written, and capacities that are lowered
