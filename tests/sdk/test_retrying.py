"""Calls that meet a server which is away: they ride through a restart, and give up a server that was never there."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import suppress
from typing import Any

import grpc
import numpy as np
import pytest

import kvbank
from kvbank._transport.retrying import STORAGE_ATTEMPTS, Attempts, Contact
from kvbank.v1 import service_pb2

Make = Callable[..., kvbank.NewChunk]
LOST = kvbank.Unavailable("lost")


# When


def test_attempts_go_on_until_the_deadline_with_pauses_that_grow() -> None:
    attempts = Attempts(3600.0)
    pauses = [attempts.pause(LOST) for _ in range(50)]
    assert pauses[0] < 0.2
    assert all(0.5 < pause < 2 for pause in pauses[10:])
    late = Attempts(0.0)
    with pytest.raises(kvbank.Unavailable):
        late.pause(LOST)


def test_no_pause_goes_beyond_the_deadline() -> None:
    attempts = Attempts(1.5)
    with suppress(kvbank.Unavailable):  # on a machine that is that busy
        assert all(attempts.pause(LOST) <= 0.75 for _ in range(10))


def test_the_deadline_and_the_pauses_begin_anew_with_progress() -> None:
    attempts = Attempts(3600.0)
    for _ in range(20):
        attempts.pause(LOST)
    attempts.progressed(time.monotonic())
    assert attempts.pause(LOST) < 0.2


def test_what_is_not_retryable_is_raised() -> None:
    with pytest.raises(kvbank.BankNotFound):
        Attempts(60).pause(kvbank.BankNotFound("gone"))


def test_a_server_that_says_when_to_call_again_is_taken_at_its_word() -> None:
    attempts, refusal = Attempts(3600.0), kvbank.RateExceeded("slowly", reason="RATE_EXCEEDED")
    refusal.retry_after = 7.0
    pauses = [attempts.pause(refusal) for _ in range(20)]
    assert all(7.0 <= pause <= 8.0 for pause in pauses)
    assert not attempts.unsure
    refusal.retry_after = 3601.0
    with pytest.raises(kvbank.RateExceeded):
        attempts.pause(refusal)


def test_a_broken_storage_is_asked_a_few_times() -> None:
    attempts, broken = Attempts(3600), kvbank.Unavailable("EIO", reason="STORAGE_ERROR")
    for _ in range(STORAGE_ATTEMPTS - 1):
        attempts.pause(broken)
    with pytest.raises(kvbank.Unavailable):
        attempts.pause(broken)


def test_a_server_that_was_never_reached_is_given_up_sooner() -> None:
    for contact in (Contact(0.0), Contact(0.0, made=True)):
        attempts = Attempts(3600, contact)
        if contact.made:
            attempts.pause(LOST)
            continue
        with pytest.raises(kvbank.Unavailable):
            attempts.pause(LOST)
    Attempts(3600, Contact(0.0)).pause(kvbank.Unavailable("stopping", reason="NOT_SERVING"))


def test_what_a_server_may_have_done_is_remembered() -> None:
    attempts = Attempts(3600)
    attempts.pause(kvbank.Unavailable("UNAVAILABLE: failed to connect to all addresses; last error: ..."))
    attempts.pause(kvbank.Unavailable("stopping", reason="NOT_SERVING"))
    assert not attempts.unsure
    attempts.pause(kvbank.Unavailable("UNAVAILABLE: Socket closed"))
    assert attempts.unsure


# Against servers


def test_every_call_rides_through_a_restart(
    killable: Any,
    kv: kvbank.KVSpec,
    embedding: kvbank.EmbeddingSpec,
    make_chunk: Make,
    digests: dict[str, str],
    unit: Callable[[int], np.ndarray],
) -> None:
    """Have all calls under way while no server listens; one starts when each call has failed at least once."""
    reader = digests["reader_digest"]
    bank = "rides"
    with kvbank.connect(killable.address, timeout=60) as client:
        client.create_bank(bank, kv=kv, embedding=embedding)
        ids = [result.chunk_id for result in client.write_many(bank, map(make_chunk, range(3)), **digests)]
        calls: dict[str, Callable[[], Any]] = {
            "retrieve": lambda: len(client.retrieve(bank, unit(0), top_k=1, **digests).chunks),
            "fetch": lambda: len(client.fetch(bank, ids[:1], reader_digest=reader)),
            "write": lambda: client.write(bank, make_chunk(9), **digests).replayed,
            "get_chunk": lambda: client.get_chunk(bank, ids[0]).chunk_id,
            "list_chunks": lambda: {chunk.chunk_id for chunk in client.list_chunks(bank)} >= set(ids[:2]),
            "update_chunk": lambda: client.update_chunk(bank, ids[1], {"a": "b"}).metadata,
            "delete_chunks": lambda: client.delete_chunks(bank, ids[2:]),
            "create_bank": lambda: client.create_bank("new", kv=kv, embedding=embedding).name,
            "stats": lambda: len(client.stats([bank]).banks),
        }
        expected = [1, 1, False, ids[0], True, {"a": "b"}, 1, "new", 1]

        async def asynchronously() -> list[Any]:
            async with kvbank.connect_async(killable.address, timeout=60, first_contact=60) as other:
                found, chunk, written = await asyncio.gather(
                    other.retrieve(bank, unit(0), top_k=1, **digests),
                    other.get_chunk(bank, ids[0]),
                    other.write(bank, make_chunk(8), **digests),
                )
                return [len(found.chunks), chunk.chunk_id, written.replayed]

        killable.kill()
        with futures.ThreadPoolExecutor(len(calls) + 1) as pool:
            answers = [pool.submit(call) for call in (*calls.values(), lambda: asyncio.run(asynchronously()))]
            assert not futures.wait(answers, timeout=1.0).done, "no server listens yet, and no call gives up"
            killable.start()
            found = [answer.result(60) for answer in answers]
        assert dict(zip(calls, found, strict=False)) == dict(zip(calls, expected, strict=True))
        assert found[-1] == [1, ids[0], False]


def test_a_server_that_is_not_there_is_named_within_seconds(unused_port: int) -> None:
    began = time.monotonic()
    with (
        kvbank.connect(f"127.0.0.1:{unused_port}", first_contact=0.5) as client,
        pytest.raises(kvbank.Unavailable, match=str(unused_port)),
    ):
        client.get_bank("b")

    async def ask() -> None:
        async with kvbank.connect_async(f"127.0.0.1:{unused_port}", first_contact=0.5) as client:
            await client.get_bank("b")

    with pytest.raises(kvbank.Unavailable, match=str(unused_port)):
        asyncio.run(ask())
    assert time.monotonic() - began < 8, "by default it would be twice 5 s, and the deadline is twice 30 s"


class Stopping:
    """A server that ends the first calls of each method as gRPC does when it is stopped: CANCELLED."""

    def __init__(self, times: int) -> None:
        self.left: dict[str, int] = {}
        self._times = times
        self._lock = threading.Lock()

    def service(self, details: Any) -> Any:
        """gRPC's name for the look-up of a method."""
        method = details.method.rpartition("/")[2]

        def call(_: Any, context: grpc.ServicerContext) -> Any:
            with self._lock:
                self.left[method] = self.left.get(method, self._times) - 1
            if self.left[method] >= 0:
                context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
            context.abort(grpc.StatusCode.NOT_FOUND, "the end")

        def calls(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield call(request, context)

        if method == "GetServerInfo":
            info = service_pb2.GetServerInfoResponse(max_unacknowledged_bytes=1 << 20)
            return grpc.unary_unary_rpc_method_handler(lambda *_: info.SerializeToString())
        if method == "WriteChunks":
            return grpc.stream_stream_rpc_method_handler(calls)
        if method in ("Retrieve", "FetchChunks"):
            return grpc.unary_stream_rpc_method_handler(calls)
        return grpc.unary_unary_rpc_method_handler(call)


@pytest.fixture
def stopping() -> Iterator[Callable[[int], str]]:
    servers: list[grpc.Server] = []

    def start(times: int) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(4))
        server.add_generic_rpc_handlers((Stopping(times),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def test_what_a_stopping_server_cancels_is_asked_again(stopping: Callable[[int], str], make_chunk: Make) -> None:
    address = stopping(1)
    with kvbank.connect(address) as client:
        for call in (
            lambda: client.get_bank("b"),
            lambda: client.retrieve("b", [1.0]),
            lambda: client.fetch("b", [1], reader_digest=""),
            lambda: client.write("b", make_chunk(0, None), reader_digest="", embedder_digest=""),
        ):
            with pytest.raises(kvbank.NotFound, match="the end"):
                call()


def test_what_a_stopping_server_cancels_is_asked_again_by_coroutines(
    stopping: Callable[[int], str], make_chunk: Make
) -> None:
    address = stopping(1)

    async def ask() -> None:
        async with kvbank.connect_async(address) as client:
            for call in (
                client.get_bank("b"),
                client.retrieve("b", [1.0]),
                client.fetch("b", [1], reader_digest=""),
                client.write("b", make_chunk(0, None), reader_digest="", embedder_digest=""),
            ):
                with pytest.raises(kvbank.NotFound, match="the end"):
                    await call

    asyncio.run(ask())


def test_what_a_stopping_server_cancels_is_unavailable(stopping: Callable[[int], str]) -> None:
    """Ask with a patience for a first contact that is over after one attempt, however long that took."""
    address = stopping(1 << 30)

    async def ask() -> None:
        async with kvbank.connect_async(address, first_contact=1e-6) as client:
            for call in (client.get_bank("b"), client.retrieve("b", [1.0])):
                with pytest.raises(kvbank.Unavailable, match="CANCELLED") as caught:
                    await call
                assert caught.value.retryable

    asyncio.run(ask())
