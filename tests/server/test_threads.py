"""The calls of one caller leave others their threads, end with their caller, and do not hold up the end of the
service."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc
from memory_service.api.calls.fairness import FairTurns
from tests.proof.floods import flood
from tests.proof.once import reason_of
from tests.support.waiting import wait_until

INVALID = grpc.StatusCode.INVALID_ARGUMENT
# Conditions each of which looks through all of a chunk's metadata: some seconds over the bank below.
SLOW = pb.Filter(metadata=[{"key": f"no {number}", "negate": number < 31} for number in range(32)])
CHUNKS, KEYS = 120, 1000
# Calls, more than there are threads.
EAGER = 12
GRACE = 0.2
MIB = 1 << 20
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture
def full(serving: Callable[..., Any]) -> Any:
    """Give a server with a bank "slow". alone: seconds that a slow call takes when there is no other."""
    caller = serving(grace=GRACE, max_inflight_bytes=8 * MIB)
    caller.create()
    caller.add()
    caller.create("slow", layers=[])
    chunks = [caller.chunk(layers=[], text="") for _ in range(CHUNKS)]
    for chunk, _ in chunks:
        chunk.metadata.update({f"key {number}": "value" for number in range(KEYS)})
    caller.write(*chunks, bank="slow")
    begun = time.monotonic()
    ask(caller).result()
    caller.alone = time.monotonic() - begun
    return caller


def ask(caller: Any) -> Any:
    return caller.stub.ListChunks.future(pb.ListChunksRequest(bank="slow", filter=SLOW))


def all_running(caller: Any) -> list[Any]:
    calls = [ask(caller) for _ in range(EAGER)]
    wait_until(lambda: running(caller) == EAGER)
    return calls


def running(caller: Any, method: str = "ListChunks") -> int:
    """Count the calls under way."""
    samples = caller.stub.GetStats(pb.GetStatsRequest()).samples
    found = [some for some in samples if some.name == "kvbank_requests_running"]
    return sum(int(some.value) for some in found if some.labels["method"] == method)


def test_slow_calls_leave_others_their_threads_and_end_with_their_caller(full: Any, serving: Any) -> None:
    calls = all_running(full)
    assert full.usage().chunks == 1
    assert len(full.retrieve()[0].chunks) == 1
    assert not any(call.done() for call in calls), "those were answered in spite of these"

    with grpc.insecure_channel(serving.server.address, options=OWN_CONNECTION) as channel:
        other = service_pb2_grpc.MemoryServiceStub(channel)
        assert len(other.ListChunks(pb.ListChunksRequest(bank="b")).chunks) == 1
    assert not any(call.done() for call in calls), "another caller has a thread for the same kind of call"

    for call in calls:
        call.cancel()  # in the middle of a statement; those that wait never begin
    begun = time.monotonic()
    assert len(full.ids()) == 1
    assert time.monotonic() - begun < full.alone

    # Of a field that comes twice, the last one counts.
    asked = pb.ListChunksRequest(bank="slow", filter=SLOW).SerializeToString()
    long = flood(pb.ListChunksRequest.DESCRIPTOR, "bank", 3 * MIB) + asked
    list_chunks = full.channel.unary_unary("/kvbank.v1.MemoryService/ListChunks")
    calls = [list_chunks.future(long) for _ in range(EAGER)]
    wait_until(lambda: sum(call.done() for call in calls) >= EAGER - 2)
    assert {reason_of(call.exception()) for call in calls if call.done()} == {"NOT_SERVING"}, "no more are held"
    for call in calls:
        call.cancel()

    calls = all_running(full)
    begun = time.monotonic()
    serving.server.stop()
    assert time.monotonic() - begun < GRACE + 2 * full.alone, "the end waits for none longer than its grace"
    assert all(call.code() != grpc.StatusCode.OK for call in calls)


def test_calls_that_wait_for_the_disk_leave_others_a_thread(caller: Any, serving: Any) -> None:
    """Calls that wait for the disk are short, and may be many."""
    hold = threading.Event()
    serving.server.banks.store.in_order(hold.wait)
    calls = [
        caller.stub.DeleteChunks.future(pb.DeleteChunksRequest(bank="b", chunk_ids=[number + 1]))
        for number in range(EAGER)
    ]
    try:
        wait_until(lambda: running(caller, "DeleteChunks") == EAGER)
        assert caller.stub.GetBank(pb.GetBankRequest(name="b"), timeout=60).bank.name == "b"
        assert not any(call.done() for call in calls)
    finally:
        hold.set()
    assert [call.result().deleted for call in calls] == [0] * EAGER


def test_what_a_request_may_ask_for_is_bounded(caller: Any, refused: Any) -> None:
    caller.add()
    for count in (0, 101):
        with refused("INVALID_FIELD", INVALID):
            caller.retrieve(banks=[f"b{number}" for number in range(count)])
    for names in (["b"] * 2, ["b"] * 50_000, [f"b{number}" for number in range(101)]):
        with refused("INVALID_FIELD", INVALID):
            caller.stub.GetStats(pb.GetStatsRequest(banks=names))
        assert refused.info.metadata["field"] == "banks"
    with refused("INVALID_FIELD", INVALID):
        caller.retrieve(np.ones((101, 4)), top_k=1000)
    assert refused.message == "top_k: 101 queries for 1000 chunks each are 101000 hits; at most 100000 are taken"
    assert len(caller.retrieve(np.ones((100, 4)), top_k=1000)[0].queries) == 100


def test_a_caller_who_goes_as_his_turn_comes_leaves_room_for_one() -> None:
    async def turns_are_counted() -> None:
        turns = FairTurns(1)
        await turns.take("a")
        gone = asyncio.create_task(turns.take("b"))
        await asyncio.sleep(0)
        gone.cancel()
        turns.give("a")  # the task of b has not run since
        await asyncio.gather(gone, return_exceptions=True)
        await turns.take("a")
        waiting = asyncio.create_task(turns.take("c"))
        await asyncio.sleep(0)
        assert not waiting.done()
        turns.give("a")
        await waiting

    asyncio.run(turns_are_counted())
