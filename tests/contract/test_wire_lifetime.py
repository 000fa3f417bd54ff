"""How chunks stay and go: expiry and its renewal, pins, quotas, least recently used, deleted banks."""

import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.tenants import TenantQuota
from tests.support.caller import AXES, lasting
from tests.support.waiting import wait_until

RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


# Expiry


def test_an_expired_chunk_is_not_answered_and_goes(caller, refused):
    kept, gone = caller.add(), caller.add(expiry=lasting(1))
    assert caller.ids() == [kept]
    assert list(caller.retrieve()[1]) == [kept]
    for call in (lambda: caller.get(gone), lambda: caller.fetch(gone)):
        with refused("CHUNK_NOT_FOUND", grpc.StatusCode.NOT_FOUND):
            call()
    wait_until(lambda: caller.usage().chunks_expired == 1)
    assert (caller.usage().chunks, caller.usage().chunks_deleted) == (1, 0)


def test_the_best_chunks_that_live_fill_the_answer(caller):
    """Expiry selects before the top k."""
    chunks = [caller.add((1 + i, 0, 0, 0), expiry=lasting(1) if i % 2 else None) for i in range(8)]
    header, _ = caller.retrieve(top_k=3)
    assert [hit.chunk_id for hit in header.queries[0].hits] == chunks[6::-2][:3]


def test_a_chunk_takes_the_expiry_of_its_bank_unless_it_states_one(caller):
    caller.create("e", expiry=lasting(3_600_000_000, renew=True))
    own, forever, of_bank = (
        caller.get(caller.add(bank="e", expiry=expiry), "e")
        for expiry in (lasting(7_200_000_000), bank_pb2.Expiry(), None)
    )
    assert own.expiry == lasting(7_200_000_000)
    assert own.expire_time.ToMicroseconds() == own.create_time.ToMicroseconds() + 7_200_000_000
    assert not forever.HasField("expire_time")
    assert of_bank.expiry == lasting(3_600_000_000, renew=True)
    bank = bank_pb2.Bank(name="e", expiry=bank_pb2.Expiry())
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=bank, update_mask={"paths": ["expiry"]}))
    assert not caller.get(caller.add(bank="e"), "e").HasField("expire_time")


def test_a_counted_retrieval_renews(caller):
    renewed = caller.add(AXES[0], expiry=lasting(3_600_000_000, renew=True))
    fixed = caller.add(AXES[1], expiry=lasting(3_600_000_000))
    before = {chunk_id: caller.get(chunk_id).expire_time.ToMicroseconds() for chunk_id in (renewed, fixed)}
    caller.retrieve(skip_count=True)
    assert caller.get(renewed).expire_time.ToMicroseconds() == before[renewed]
    caller.retrieve()
    chunk = caller.get(renewed)
    assert chunk.expire_time.ToMicroseconds() == chunk.last_retrieve_time.ToMicroseconds() + 3_600_000_000
    assert chunk.expire_time.ToMicroseconds() > before[renewed]
    assert caller.get(fixed).expire_time.ToMicroseconds() == before[fixed]


def test_what_is_asked_for_stays_beyond_its_ttl(caller):
    """Renewals that are not written yet hold too."""
    ttl = 1_500_000
    chunk_id = caller.add(expiry=lasting(ttl, renew=True))
    first = caller.get(chunk_id).expire_time.ToMicroseconds()
    while time.time_ns() // 1000 < first + ttl // 2:
        assert list(caller.retrieve()[1]) == [chunk_id]
    wait_until(lambda: caller.usage().chunks_expired == 1)
    assert caller.retrieve()[1] == {}


def test_an_expired_chunk_that_is_not_removed_yet_is_neither_pinned_nor_changed(serving, refused):
    caller = serving(pauses=Pauses(left_out={"expiry"}))
    caller.create()
    kept, gone = caller.add(), caller.add(expiry=lasting(1))
    assert caller.pin(kept, gone) == 1
    with refused("CHUNK_NOT_FOUND", grpc.StatusCode.NOT_FOUND):
        caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=gone, metadata={"a": "b"}))
    assert caller.usage().chunks == 2


def test_a_replay_of_an_expired_chunk_says_that_it_is_gone(caller):
    chunk, data = caller.chunk()
    chunk.expiry.CopyFrom(lasting(1))
    (first,) = caller.write((chunk, data))
    wait_until(lambda: caller.usage().chunks_expired == 1)
    (again,) = caller.write((chunk, data))
    assert (again.chunk_id, again.replayed, again.gone) == (first.chunk_id, True, True)


def test_a_replay_of_a_chunk_that_has_expired_and_is_not_removed_yet_says_that_it_is_gone(serving):
    caller = serving(pauses=Pauses(left_out={"expiry"}))
    caller.create()
    chunk, data = caller.chunk()
    chunk.expiry.CopyFrom(lasting(1))
    (first,) = caller.write((chunk, data))
    (again,) = caller.write((chunk, data))
    assert (again.chunk_id, again.replayed, again.gone) == (first.chunk_id, True, True)
    assert caller.usage().chunks == 1


def test_expiry_goes_on_after_a_restart(serving):
    caller = serving()
    caller.create()
    for _ in range(3):
        caller.add(expiry=lasting(1))
    caller = serving()
    assert (caller.ids(), caller.retrieve()[1]) == ([], {})
    wait_until(lambda: caller.usage().chunks_expired == 3)


@pytest.mark.parametrize("ttl", [Duration(seconds=-1), Duration(seconds=300_000_000_000)])
def test_ttl_out_of_range(caller, refused, ttl):
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        caller.create("e", expiry=bank_pb2.Expiry(ttl=ttl))
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        caller.add(expiry=bank_pb2.Expiry(ttl=ttl))


# Pins


def test_pinned_chunks_are_never_evicted(caller, refused):
    caller.create("c", capacity={"chunks": 3})
    ids = [caller.add(axis, bank="c", pinned=axis is AXES[0]) for axis in AXES[:3]]
    assert caller.pin(ids[1], 999, bank="c") == 1
    assert [caller.get(chunk_id, "c").pinned for chunk_id in ids] == [True, True, False]
    (ack,) = caller.write(caller.chunk(), bank="c")
    assert list(ack.evicted_chunk_ids) == [ids[2]]
    caller.pin(ack.chunk_id, bank="c")
    with refused("BANK_FULL", RESOURCE_EXHAUSTED):
        caller.add(bank="c")
    assert caller.pin(ids[0], pinned=False, bank="c") == 1
    (ack,) = caller.write(caller.chunk(), bank="c")
    assert list(ack.evicted_chunk_ids) == [ids[0]]
    assert caller.usage("c").chunks == 3


def test_pinned_chunks_expire_and_can_be_deleted(caller):
    caller.add(pinned=True, expiry=lasting(1))
    wait_until(lambda: caller.usage().chunks_expired == 1)
    chunk_id = caller.add(pinned=True)
    request = pb.DeleteChunksRequest(bank="b", chunk_ids=[chunk_id])
    assert caller.stub.DeleteChunks(request).deleted == 1


def test_a_pin_saves_from_an_eviction_under_way(serving):
    """Chunks that a plan has named are pinned before the plan comes to them."""
    waiting = set()
    caller = serving(limits=Limits(step_rows=1), pauses=Pauses(left_out=waiting))
    caller.create("c", layers=[], capacity={"chunks": 40})
    acks = caller.write(*(caller.chunk(layers=[]) for _ in range(40)), bank="c")
    ids = [ack.chunk_id for ack in acks]
    caller.pin(ids[0], bank="c")
    waiting.add("evictions")
    caller.add(bank="c", layers=[])
    assert caller.pin(*ids[15:20], bank="c") == 5
    waiting.clear()
    caller.add(bank="c", layers=[])
    wait_until(lambda: caller.usage("c").chunks == 27)
    assert {ids[0], *ids[15:20]} <= set(caller.ids("c"))


# Least recently used


def test_least_recently_used_goes_first(caller):
    caller.create("c", capacity={"chunks": 4}, policy={"kind": bank_pb2.POLICY_KIND_LRU, "target": 75})
    ids = [caller.add(axis, bank="c") for axis in AXES]
    for axis in (0, 0, 0, 2):
        caller.retrieve(AXES[axis], banks=["c"], top_k=1)
    planned = caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="c")).victims
    assert [(victim.chunk_id, victim.reason) for victim in planned] == [(ids[1], pb.EVICTION_REASON_LEAST_RECENT)]
    (ack,) = caller.write(caller.chunk(), bank="c")
    assert list(ack.evicted_chunk_ids) == [ids[1]]
    (ack,) = caller.write(caller.chunk(), bank="c")
    assert list(ack.evicted_chunk_ids) == [ids[3]]


# Quotas


@pytest.mark.parametrize(("unit", "limit", "size"), [("chunks", 2, 1), ("tokens", 8, 3), ("bytes", 3500, 1682)])
def test_a_write_over_the_quota_is_refused(caller, refused, unit, limit, size):
    caller.create("q", quota={unit: limit})
    ids = [caller.add(bank="q") for _ in range(2)]
    with refused("QUOTA_EXCEEDED", RESOURCE_EXHAUSTED):
        caller.add(bank="q")
    told = {"subject": "bank:q", "unit": unit, "usage": str(2 * size), "limit": str(limit), "size": str(size)}
    assert dict(refused.info.metadata) == told
    assert caller.ids("q") == ids
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="q", chunk_ids=ids[:1]))
    caller.add(bank="q")


def test_the_refusal_carries_a_quota_failure(caller):
    caller.create("q", quota={"chunks": 1})
    caller.add(bank="q")
    with pytest.raises(grpc.RpcError) as caught:
        caller.add(bank="q")
    failure = error_details_pb2.QuotaFailure()
    assert rpc_status.from_call(caught.value).details[1].Unpack(failure)
    assert failure.violations[0].subject == "bank:q"


def test_the_quota_of_a_tenant_is_refused_and_shown_with_what_it_holds(caller, serving, refused):
    quota = TenantQuota(banks=2, chunks=1)
    serving.server.banks.engine.access.set_tenant_quota("default", quota)
    caller.create("q")
    chunk_id = caller.add(bank="q")
    for action in (caller.add, lambda: caller.create("third")):
        with pytest.raises(grpc.RpcError) as caught:
            action()
        failure = error_details_pb2.QuotaFailure()
        assert rpc_status.from_call(caught.value).details[1].Unpack(failure)
        assert failure.violations[0].subject == "tenant:default"
    with refused("QUOTA_EXCEEDED", RESOURCE_EXHAUSTED):
        caller.add(bank="q")
    assert caller.ids("q") == [chunk_id]
    (tenant,) = caller.stub.GetStats(pb.GetStatsRequest()).tenants
    assert (tenant.name, tenant.quota.banks, tenant.quota.chunks, tenant.quota.bytes) == ("default", 2, 1, 0)
    usage, held = tenant.usage, caller.usage("q")
    assert (usage.banks, usage.chunks, usage.tokens, usage.bytes) == (2, 1, held.tokens, held.bytes)


def test_quotas_come_after_the_evictions_and_a_refusal_takes_them_back(caller, refused):
    caller.create("q", capacity={"chunks": 4}, quota={"chunks": 4, "tokens": 9})
    ids = [caller.add(axis, bank="q", m=2) for axis in AXES]
    (ack,) = caller.write(caller.chunk(m=5), bank="q")
    assert list(ack.evicted_chunk_ids) == ids[:2]
    ids = [*ids[2:], ack.chunk_id]
    bank = bank_pb2.Bank(name="q", capacity={"chunks": 3})
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=bank, update_mask={"paths": ["capacity"]}))
    with refused("QUOTA_EXCEEDED", RESOURCE_EXHAUSTED):
        caller.write(caller.chunk(m=5), bank="q")
    assert caller.ids("q") == ids
    assert caller.usage("q").chunks_evicted == 2
    (ack,) = caller.write(caller.chunk(m=2), bank="q")
    assert list(ack.evicted_chunk_ids) == ids[:1]


def test_update_of_quota_and_index(caller, refused):
    bank = bank_pb2.Bank(name="b", quota={"chunks": 1}, index=bank_pb2.INDEX_KIND_IVF)
    changed = caller.stub.UpdateBank(pb.UpdateBankRequest(bank=bank, update_mask={"paths": ["quota", "index"]})).bank
    assert (changed.quota.chunks, changed.index) == (1, bank_pb2.INDEX_KIND_IVF)
    caller.add()
    with refused("QUOTA_EXCEEDED", RESOURCE_EXHAUSTED):
        caller.add()
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        caller.create("q", quota={"tokens": -1})


# In the background


def test_an_eviction_under_way_is_explained_though_there_is_room(serving):
    caller = serving(limits=Limits(step_rows=4), pauses=Pauses(left_out={"evictions"}))
    caller.create("c", layers=[], capacity={"chunks": 20})
    caller.write(*(caller.chunk(layers=[]) for _ in range(20)), bank="c")
    planned = caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="c")).victims
    caller.add(bank="c", layers=[])
    answer = caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="c"))
    assert list(answer.victims) == list(planned[4:])
    assert answer.explanation.startswith("6 of 17 chunks are about to go")


def test_a_second_plan_goes_on_after_a_restart_too(serving):
    """Writing took the last victim of one plan and made another plan."""
    caller = serving(limits=Limits(step_rows=1), pauses=Pauses(left_out={"evictions"}))
    caller.create("c", layers=[], capacity={"tokens": 40})
    caller.write(*(caller.chunk(layers=[], m=1) for _ in range(40)), bank="c")
    caller.add(bank="c", layers=[], m=1)
    first = caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="c")).victims
    caller.pin(*(victim.chunk_id for victim in first[1:]), bank="c")
    (ack,) = caller.write(caller.chunk(layers=[], m=2, original_length=2, token_ids=[1, 2]), bank="c")
    second = caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="c")).victims
    assert len(second) > 1
    assert not {*ack.evicted_chunk_ids} & {victim.chunk_id for victim in second}
    serving.stop()
    caller = serving()
    wait_until(lambda: not {victim.chunk_id for victim in second} & {*caller.ids("c")})


def test_a_new_capacity_ends_an_eviction_under_way(serving):
    caller = serving(limits=Limits(step_rows=1), pauses=Pauses(left_out={"evictions"}))
    caller.create("c", layers=[], capacity={"chunks": 40})
    caller.write(*(caller.chunk(layers=[]) for _ in range(41)), bank="c")
    assert "are about to go" in caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="c")).explanation
    bank = bank_pb2.Bank(name="c", capacity={"chunks": 50})
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=bank, update_mask={"paths": ["capacity"]}))
    assert caller.stub.ExplainEviction(pb.ExplainEvictionRequest(bank="c", need=1)) == pb.ExplainEvictionResponse()
    caller.write(*(caller.chunk(layers=[]) for _ in range(10)), bank="c")
    assert (caller.usage("c").chunks, caller.usage("c").chunks_evicted) == (50, 1)
