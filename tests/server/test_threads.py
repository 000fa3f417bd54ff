"""The calls of one caller leave others their threads, end with their caller, and do not hold up the end of the
service."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from kvbank.v1 import service_pb2 as pb
from kvbank.v1 import service_pb2_grpc
from memory_service.api.calls.fairness import FairTurns, Owner
from memory_service.domain.limits import Pauses
from memory_service.storage.local.records.schema import raw
from tests.proof.floods import flood
from tests.proof.once import reason_of
from tests.support.store import new_bank
from tests.support.waiting import wait_until

INVALID = grpc.StatusCode.INVALID_ARGUMENT
# Threads that the calls of one kind may have, and of these the calls of one connection; calls, more than that.
THREADS, OWN, EAGER = 8, 5, 12
MIB = 1 << 20
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
# It calls `begun` in its first row. Where nothing interrupts it, it ends after minutes.
ENDLESS = """
    WITH RECURSIVE rows(row) AS (SELECT begun() UNION ALL SELECT 1 FROM rows LIMIT 1000000000) SELECT count(*) FROM rows
"""


class EndlessCalls:
    """The calls that begin while `on` is set run a statement that does not end by itself."""

    def __init__(self, serving: Callable[..., Any]) -> None:
        self.on = False
        self._begun = threading.Semaphore(0)
        self._serving = serving
        self.caller = serving(
            grace=0.1,
            max_inflight_bytes=8 * MIB,
            storage_threads=THREADS,
            pauses=Pauses(at={"answer": self._answer}),
        )

    def _answer(self) -> None:
        if self.on:
            with self._serving.server.banks.engine.records.read() as connection:
                raw(connection).create_function("begun", 0, self._begun.release)
                connection.exec_driver_sql(ENDLESS)

    def begin(self, call: Callable[[], Any], count: int, at_once: int) -> list[Any]:
        """Make `count` calls, and return their futures when the statements of `at_once` of them run."""
        self.on = True
        calls = [call() for _ in range(count)]
        for _ in range(at_once):
            assert self._begun.acquire(timeout=60)
        self.on = False
        return calls


@pytest.fixture
def endless(serving: Callable[..., Any]) -> EndlessCalls:
    """Give a server with a bank "b" of one chunk."""
    made = EndlessCalls(serving)
    made.caller.create()
    made.caller.add()
    return made


def ask(caller: Any) -> Any:
    return caller.stub.ListChunks.future(pb.ListChunksRequest(bank="b"))


def running(caller: Any, method: str = "ListChunks") -> int:
    """Count the calls under way."""
    samples = caller.stub.GetStats(pb.GetStatsRequest()).samples
    found = [some for some in samples if some.name == "kvbank_requests_running"]
    return sum(int(some.value) for some in found if some.labels["method"] == method)


def test_slow_calls_leave_others_their_threads_and_end_with_their_caller(
    endless: EndlessCalls, serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caller = endless.caller
    calls = endless.begin(lambda: ask(caller), EAGER, OWN)
    wait_until(lambda: running(caller) == EAGER)
    assert caller.usage().chunks == 1
    assert len(caller.retrieve()[0].chunks) == 1
    with grpc.insecure_channel(serving.server.address, options=OWN_CONNECTION) as channel:
        other = service_pb2_grpc.MemoryServiceStub(channel)
        assert len(other.ListChunks(pb.ListChunksRequest(bank="b"), timeout=60).chunks) == 1, "one thread is left"
    assert not any(call.done() for call in calls), "those were answered in spite of these"

    for call in calls:
        call.cancel()  # in the middle of a statement; those that wait never begin
    assert len(ask(caller).result(60).chunks) == 1, "the statements were interrupted"

    # Of a field that comes twice, the last one counts.
    asked = pb.ListChunksRequest(bank="b").SerializeToString()
    long = flood(pb.ListChunksRequest.DESCRIPTOR, "bank", 3 * MIB) + asked
    list_chunks = caller.channel.unary_unary("/kvbank.v1.MemoryService/ListChunks")
    calls = endless.begin(lambda: list_chunks.future(long), EAGER, 2)
    wait_until(lambda: sum(call.done() for call in calls) == EAGER - 2)
    assert {reason_of(call.exception()) for call in calls if call.done()} == {"NOT_SERVING"}, "no more are held"
    for call in calls:
        call.cancel()

    calls = endless.begin(lambda: ask(caller), EAGER, OWN)
    serving.server.stop()
    assert "did not end" not in caplog.text, "the end of the service interrupts what outlasts the grace time"
    assert all(call.code() != grpc.StatusCode.OK for call in calls)


def test_calls_that_wait_for_the_disk_leave_others_a_thread(caller: Any, serving: Any) -> None:
    """Calls that wait for the disk are short, and may be many."""
    hold = threading.Event()
    serving.server.banks.store.in_order(new_bank(), hold.wait)
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
        await turns.take(Owner("a"))
        gone = asyncio.create_task(turns.take(Owner("b")))
        await asyncio.sleep(0)
        gone.cancel()
        turns.give(Owner("a"))  # the task of b has not run since
        await asyncio.gather(gone, return_exceptions=True)
        await turns.take(Owner("a"))
        waiting = asyncio.create_task(turns.take(Owner("c")))
        await asyncio.sleep(0)
        assert not waiting.done()
        turns.give(Owner("a"))
        await waiting

    asyncio.run(turns_are_counted())


def test_a_tenant_that_holds_fewer_turns_comes_first_however_many_connections_another_has() -> None:
    async def turns_are_counted() -> None:
        turns, order = FairTurns(4), list[str]()

        async def use(connection: str, tenant: str) -> None:
            owner = Owner(connection, tenant)
            await turns.take(owner)
            order.append(tenant)
            turns.give(owner)

        held = [Owner(connection, "noisy") for connection in "abc"]
        for owner in held:
            await turns.take(owner)
        waiting = [asyncio.create_task(use(connection, "noisy")) for connection in "defg"]
        await asyncio.sleep(0)
        await asyncio.wait_for(use("h", "quiet"), 60)
        assert order == ["quiet"], "one turn is left for another tenant"
        await turns.take(last := Owner("i", "quiet"))
        waiting.append(asyncio.create_task(use("j", "quiet")))
        await asyncio.sleep(0)
        turns.give(held[0])
        await asyncio.gather(*waiting)
        assert order[:2] == ["quiet", "quiet"], "the quiet tenant holds one turn, the noisy one two"
        for owner in (last, *held[1:]):
            turns.give(owner)

    asyncio.run(turns_are_counted())
