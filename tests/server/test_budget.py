"""Bytes under way are bounded, and a caller who stalls is ended for those who wait."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from kvbank.v1 import service_pb2 as pb
from memory_service.api.calls.budget import SMALL, Budget, Share
from memory_service.api.calls.fairness import Owner
from memory_service.domain.limits import Limits, Pauses
from tests.support.caller import BIG, MIB


def nobody() -> None:
    pytest.fail("nobody is to be ended")


def test_a_budget_is_given_in_order_and_one_piece_at_a_time_goes_beyond_it() -> None:
    async def run() -> list[str]:
        budget, order = Budget(8), []  # 7 for what is not small

        async def use(name: str, size: int) -> None:
            share = await budget.take(size, nobody, whole=2 * SMALL)
            order.append(name)
            await asyncio.sleep(0)
            share.give()

        first = await budget.take(6, nobody, whole=2 * SMALL)
        beyond = await budget.take(50, nobody, whole=2 * SMALL)
        tasks = [asyncio.create_task(use(name, size)) for name, size in (("large", 60), ("little", 1), ("other", 6))]
        await asyncio.sleep(0)
        assert order == []
        beyond.give()
        first.give()
        await asyncio.gather(*tasks)
        assert budget.taken == 0
        return order

    assert asyncio.run(run()) == ["large", "little", "other"]


def test_shares_that_grow_do_not_wait_for_each_other() -> None:
    """Shares have begun that cannot all be finished within the bound: one goes beyond it, to its end."""

    async def run() -> None:
        budget = Budget(16)
        shares = [await budget.take(7, nobody, whole=2 * SMALL) for _ in range(2)]
        growing = [asyncio.create_task(share.grow(5)) for share in shares]
        await growing[0]
        await shares[0].grow(5)
        assert not growing[1].done()
        shares[0].give()
        await growing[1]
        shares[1].give()
        assert budget.taken == 0

    asyncio.run(run())


def test_what_is_small_does_not_wait_for_what_is_large() -> None:
    async def run() -> None:
        budget = Budget(80 * SMALL)
        await budget.take(70 * SMALL, nobody)
        await budget.take(2 * SMALL, nobody)  # beyond
        waiting = asyncio.create_task(budget.take(2 * SMALL, nobody))
        await asyncio.sleep(0)
        assert not waiting.done()
        (await budget.take(SMALL, nobody)).give()
        waiting.cancel()

    asyncio.run(run())


def test_who_gives_up_waiting_holds_nothing_and_lets_the_next_one_pass() -> None:
    async def run() -> None:
        budget = Budget(16)
        beyond, first = await budget.take(20, nobody, whole=2 * SMALL), None
        waiting = asyncio.create_task(budget.take(9, nobody, whole=2 * SMALL))
        behind = asyncio.create_task(budget.take(2, nobody, whole=2 * SMALL))
        await asyncio.sleep(0)
        waiting.cancel()
        beyond.give()
        beyond.give()
        first = await behind
        assert budget.taken == 2
        first.give()
        assert budget.taken == 0

    asyncio.run(run())


def test_a_connection_that_holds_less_comes_first_and_none_holds_more_than_half() -> None:
    async def run() -> None:
        budget, order = Budget(16), []

        async def use(owner: str, size: int) -> None:
            share = await budget.take(size, nobody, whole=2 * SMALL, owner=Owner(owner))
            order.append(owner)
            share.give()

        greedy = await budget.take(7, nobody, whole=2 * SMALL, owner=Owner("greedy"))
        beyond = await budget.take(8, nobody, whole=2 * SMALL, owner=Owner("beyond"))
        tasks = [asyncio.create_task(use(owner, 3)) for owner in ("greedy", "greedy", "beyond", "new")]
        await asyncio.sleep(0)
        assert order == []
        beyond.give()
        await asyncio.gather(*tasks[2:])
        assert order[0] == "beyond", "both hold nothing, and it came first"
        assert not tasks[0].done() or order.index("new") < order.index("greedy")
        greedy.give()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_tenant_holds_at_most_three_quarters_and_another_one_does_not_wait_for_it() -> None:
    async def run() -> None:
        budget = Budget(16)  # of which 14 are for shares that are not small

        async def take(size: int, connection: str, tenant: str) -> Share:
            return await budget.take(size, nobody, whole=2 * SMALL, owner=Owner(connection, tenant))

        noisy = [await take(6, "a", "noisy"), await take(4, "b", "noisy"), await take(1, "c", "noisy")]
        waiting = asyncio.create_task(take(1, "d", "noisy"))
        await asyncio.sleep(0)
        quiet = await asyncio.wait_for(take(2, "e", "quiet"), 60)
        assert not waiting.done(), "it would fit, but for the share of its tenant"
        quiet.give()
        assert not waiting.done()
        for share in noisy:
            share.give()
        (await waiting).give()
        assert budget.taken == 0

    asyncio.run(run())


def test_a_caller_who_stalls_is_ended_when_others_wait_and_not_before() -> None:
    async def run() -> None:
        budget, ended = Budget(16, stalled=0.05), asyncio.Event()
        stalled = await budget.take(7, ended.set, whole=2 * SMALL)
        ours = await budget.take(8, nobody, whole=2 * SMALL)
        ours.ours()
        assert not ended.is_set()
        waiting = asyncio.create_task(budget.take(5, nobody, whole=2 * SMALL))
        while not ended.is_set():
            stalled.progress(1)  # next to nothing
            await asyncio.sleep(0.01)
        stalled.give()
        ours.give()
        await waiting

    asyncio.run(run())


LARGE = {"m": 16_384, "original_length": 16_384, "token_ids": ()}  # 2.1 MiB


PACE_S = 0.05


class Trickle:
    """A write of a chunk that sends all but its last bytes, and then next to nothing."""

    def __init__(self, caller: Any, size: int | None = None, **options: Any) -> None:
        chunk, data = caller.chunk(**(LARGE | options))
        begun = data[: len(data) - 100 if size is None else size]
        self.acks: list[Any] = []
        self.sent, self._over = threading.Event(), threading.Event()
        self._call = caller.stub.WriteChunks(self._frames(next(caller.frames(chunk, data)), begun))

    def _frames(self, header: Any, begun: bytes) -> Iterator[Any]:
        yield header
        for begin in range(0, len(begun), MIB):
            yield pb.WriteChunksRequest(data=begun[begin : begin + MIB])
        self.sent.set()
        while not self._over.wait(PACE_S):
            yield pb.WriteChunksRequest(data=b"")

    def end(self) -> grpc.RpcError:
        """Wait for the end of the call, and return its error."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self._call)
        self._over.set()
        return caught.value

    def cancel(self) -> None:
        self._over.set()
        self._call.cancel()


def test_headers_alone_keep_nobody_waiting(caller: Any) -> None:
    """Headers say that 8.5 MiB follow each, more than all that may be held; no call is ended for that."""
    idle = [Trickle(caller, 0, **BIG) for _ in range(40)]
    for each in idle:
        assert each.sent.wait(30)
    chunk, data = caller.chunk(**BIG)
    assert caller.write_at_once(chunk, data)
    assert all(each._call.is_active() for each in idle)
    for each in idle:
        each.cancel()


def test_who_sends_next_to_nothing_does_not_keep_others_waiting_and_is_told(
    serving: Callable[..., Any],
) -> None:
    caller = serving(max_inflight_bytes=4 * MIB, limits=Limits(stalled_s=0.5))
    caller.create()
    slow = [Trickle(caller) for _ in range(5)]
    assert slow[0].sent.wait(30)
    chunk, data = caller.chunk(**LARGE)
    assert caller.write_at_once(chunk, data)
    ended = [each.end() for each in slow[:1]]
    for each in slow[1:]:
        each.cancel()
    assert ended[0].code() == grpc.StatusCode.UNAVAILABLE
    assert "others waited" in str(ended[0].details())


def test_an_answer_that_nobody_takes_keeps_nobody_waiting_and_its_caller_is_told(
    serving: Callable[..., Any],
) -> None:
    caller = serving(max_inflight_bytes=4 * MIB, limits=Limits(stalled_s=0.5))
    caller.create()
    ids = [caller.write_at_once(*caller.chunk(**BIG)) for _ in range(2)]
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=ids)
    idle = [iter(caller.stub.FetchChunks(request)) for _ in range(4)]
    for answers in idle:
        assert next(answers).HasField("header")
    assert sum(len(frame.data) for frame in caller.stub.FetchChunks(request)) > 16 * MIB
    with pytest.raises(grpc.RpcError) as caught:
        [list(answers) for answers in idle]
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "others waited" in str(caught.value.details())


def test_a_writer_is_not_told_that_it_is_slow_while_the_disk_is(serving: Callable[..., Any]) -> None:
    """Hold up the write of a chunk whose bytes have all come; the caller behind it is ended for others that
    wait, though it has been slow for a shorter time."""
    storing, hold = threading.Event(), threading.Event()

    def wait() -> None:
        storing.set()
        assert hold.wait(60)

    pauses = Pauses(at={"object stored": wait})
    caller = serving(max_inflight_bytes=8 * MIB, limits=Limits(stalled_s=0.5), pauses=pauses)
    caller.create()
    written, waiting = [caller.chunk(**LARGE) for _ in range(2)]
    call = caller.stub.WriteChunks(caller.frames(*written))
    assert storing.wait(30)
    slow = Trickle(caller)
    assert slow.sent.wait(30)
    other = caller.stub.WriteChunks(caller.frames(*waiting))
    assert "others waited" in str(slow.end().details())
    hold.set()
    assert len(list(call)) == len(list(other)) == 1
