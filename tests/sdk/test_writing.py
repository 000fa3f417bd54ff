"""Pipelined writes are tried: bounds, exceptions of the caller, and a server killed in the middle."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import kvbank
from kvbank._calls.writing import Upload, WriteSession
from kvbank._transport.folder import Folder
from kvbank._transport.retrying import Attempts
from kvbank._transport.same_host import SameHost
from kvbank._transport.write_stream import WriteStream
from kvbank.v1 import service_pb2
from kvbank.wire.frames import FRAME_BYTES
from memory_service.api.embedded import LocalServer
from tests.sdk.host import Host
from tests.sdk.relay import Relay
from tests.support.waiting import wait_until

Make = Callable[..., kvbank.NewChunk]
MakeBank = Callable[..., str]

CHUNKS = 40
KILL_AT = 25


def test_nothing_to_write(client: kvbank.Client, make_bank: MakeBank, digests: dict[str, str]) -> None:
    assert client.write_many(make_bank(), [], **digests) == []


def test_more_than_the_bound_goes_through(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    """40 MiB, with 32 MiB allowed in flight."""
    bank = make_bank("fp32")
    big = make_chunk(0, "fp32", tokens=65_536, token_ids=())
    chunks = [kvbank.NewChunk(big.embedding, big.tensors) for _ in range(3)]
    assert sum(array.nbytes for array in (big.tensors or {}).values()) * len(chunks) > 40 << 20
    results = client.write_many(bank, chunks, **digests)
    assert len({result.chunk_id for result in results}) == len(chunks)
    (found,) = client.fetch(bank, [results[-1].chunk_id], reader_digest=digests["reader_digest"])
    assert found.tensors is not None
    assert np.array_equal(found.tensors["v.3"], (big.tensors or {})["v.3"])


def test_no_more_is_on_its_way_than_the_server_allows(
    tmp_path: Path, embedding: kvbank.EmbeddingSpec, make_chunk: Make, digests: dict[str, str]
) -> None:
    """Write to a server that allows one chunk: when the last is asked for, all but the one before it are durable."""
    vectors, durable = {**digests, "reader_digest": ""}, []

    def chunks(bank: str) -> Iterator[kvbank.NewChunk]:
        for i in range(50):
            yield make_chunk(i, None)
        durable.append(client.get_bank(bank).usage.chunks)
        yield make_chunk(50, None)

    async def write(bank: str) -> None:
        async with kvbank.connect_async(server.address) as asynchronous:
            await asynchronous.write_many(bank, chunks(bank), **vectors)

    with LocalServer(tmp_path, max_unacknowledged_bytes=1) as server, kvbank.connect(server.address) as client:
        for bank in ("b", "a"):
            client.create_bank(bank, kv=None, embedding=embedding)
        client.write_many("b", chunks("b"), **vectors)
        asyncio.run(write("a"))
    assert min(durable) >= 49


def raising(chunks: list[kvbank.NewChunk], error: Exception) -> Iterator[kvbank.NewChunk]:
    yield from chunks
    raise error


async def raising_later(chunks: list[kvbank.NewChunk], error: Exception) -> AsyncIterator[kvbank.NewChunk]:
    for chunk in chunks:
        yield chunk
    raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of ideas"),
        ValueError("out of ideas"),
        # Of another server that the chunks come from: no word of this one's that the stream is to be sent again.
        kvbank.Unavailable("out of ideas"),
        kvbank.FailedPrecondition("out of ideas", reason="STAGED_FILE"),
        grpc.RpcError("out of ideas"),
    ],
    ids=repr,
)
def test_an_exception_of_the_caller_comes_through_behind_the_chunks_before_it(
    host: Host, make_chunk: Make, error: Exception
) -> None:
    async def write(chunks: Any) -> None:
        async with kvbank.connect_async(host.address) as client:
            await client.write_many("b", chunks, **host.digests)

    def new() -> list[kvbank.NewChunk]:
        return [make_chunk(i) for i in range(12)]

    for times, call in enumerate(
        (
            lambda: host.write_all(raising(new(), error)),
            lambda: asyncio.run(write(raising(new(), error))),
            lambda: asyncio.run(write(raising_later(new(), error))),
        ),
        1,
    ):
        with pytest.raises(type(error), match="out of ideas") as caught:
            call()
        assert caught.value is error
        assert host.client.get_bank("b").usage.chunks == 12 * times


@pytest.mark.parametrize("wrong", [None, kvbank.NewChunk([float("nan")] * 16)], ids=["no chunk", "NaN"])
def test_what_is_before_a_chunk_that_the_client_refuses_is_written(host: Host, make_chunk: Make, wrong: Any) -> None:
    async def write(chunks: list[kvbank.NewChunk]) -> None:
        async with kvbank.connect_async(host.address) as client:
            await client.write_many("b", chunks, **host.digests)

    good = [make_chunk(i) for i in range(40)]
    with pytest.raises(kvbank.InvalidArgument):
        host.write(*good[:20], wrong, *good[20:])
    assert host.client.get_bank("b").usage.chunks == 20
    with pytest.raises(kvbank.InvalidArgument):
        asyncio.run(write([*good, wrong]))
    assert host.client.get_bank("b").usage.chunks == 40


def test_the_first_refused_chunk_raises_and_writing_again_repeats_none(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank = make_bank()
    good = [make_chunk(i) for i in range(4)]
    with pytest.raises(kvbank.InvalidArgument):
        client.write_many(bank, [*good[:2], make_chunk(9, "fp32"), *good[2:]], **digests)
    assert client.get_bank(bank).usage.chunks == 2
    results = client.write_many(bank, good, **digests)
    assert [result.replayed for result in results] == [True, True, False, False]


def test_a_slow_caller_outlives_the_deadline(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    """Write more slowly than the deadline, which is for an acknowledgement: idle time between chunks harms nothing."""
    stops = [client.server_info]  # a call takes time without being a sleep

    def chunks() -> Iterator[kvbank.NewChunk]:
        for i in range(60):
            for _ in range(10):
                stops[0]()
            yield make_chunk(i, tokens=1)

    results = client.write_many(make_bank(), chunks(), timeout=0.5, **digests)
    assert len({result.chunk_id for result in results}) == 60


def test_a_lost_service_fails_a_write_within_its_timeout(
    tmp_path: Path, embedding: kvbank.EmbeddingSpec, make_chunk: Make, digests: dict[str, str]
) -> None:
    """Attempts to connect again end with the caller's patience; with the default they would go on for ten seconds."""
    lost = (kvbank.Unavailable, kvbank.DeadlineExceeded)
    vectors = {**digests, "reader_digest": ""}
    server = LocalServer(tmp_path)

    async def write() -> None:
        async with kvbank.connect_async(server.address) as asynchronous:
            await asynchronous.write("bank", make_chunk(1, None), **vectors)
            await asyncio.to_thread(server.stop)
            began = time.monotonic()
            with pytest.raises(lost):
                await asyncio.to_thread(client.write, "bank", make_chunk(2, None), timeout=0.5, **vectors)
            with pytest.raises(lost):
                await asynchronous.write("bank", make_chunk(3, None), timeout=0.5, **vectors)
            assert time.monotonic() - began < 8, "by default each goes on for ten seconds"

    with kvbank.connect(server.address) as client:
        client.create_bank("bank", kv=None, embedding=embedding)
        client.write("bank", make_chunk(0, None), **vectors)
        asyncio.run(write())


@pytest.fixture
def slow_link(address: str) -> Iterator[str]:
    """Give the address of a relay to the service that takes 64 KiB each 40 ms."""
    host, _, port = address.rpartition(":")
    ends: list[socket.socket] = []

    def relay(source: socket.socket, target: socket.socket, pause: float) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                time.sleep(pause)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                ends.extend((near, far))
                threading.Thread(target=relay, args=(near, far, 0.04), daemon=True).start()
                threading.Thread(target=relay, args=(far, near, 0), daemon=True).start()

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=accept, args=(listener,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        thread.join()


def test_a_slow_link_that_moves_is_no_deadline(
    slow_link: str, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    """Write for some four seconds on one stream, with two for each acknowledgement."""
    bank, big = make_bank("fp32"), make_chunk(0, "fp32", tokens=1024, token_ids=())
    chunks = [kvbank.NewChunk(big.embedding, big.tensors) for _ in range(24)]
    with kvbank.connect(slow_link) as client:
        results = client.write_many(bank, chunks, timeout=2, **digests)
    assert len({result.chunk_id for result in results}) == len(chunks)


@pytest.fixture
def relayed(address: str) -> Iterator[Relay]:
    """Give a relay to the server of these tests."""
    with closing(Relay(address)) as relay:
        yield relay


async def written_async(address: str, bank: str, chunks: list[kvbank.NewChunk], **digests: str) -> list[int]:
    async with kvbank.connect_async(address) as client:
        return [result.chunk_id for result in await client.write_many(bank, chunks, **digests)]


def test_small_chunks_bring_their_bytes_along_in_few_messages(
    relayed: Relay, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank, chunks = make_bank(), [make_chunk(i) for i in range(CHUNKS)]
    with kvbank.connect(relayed.address) as client:
        # One that is too large for that goes between the others, in frames of its own.
        large = make_chunk(CHUNKS, tokens=1024, token_ids=())
        written = client.write_many(bank, [*chunks, large, *chunks], **digests)
        requests = [
            service_pb2.WriteChunksRequest.FromString(request)
            for method, request in zip(relayed.calls, relayed.requests, strict=True)
            if method == "WriteChunks"
        ]
        found = client.fetch(
            bank, [result.chunk_id for result in written[: CHUNKS + 1]], reader_digest=digests["reader_digest"]
        )
    assert {request.WhichOneof("frame") for request in requests} >= {"header", "data", "headers"}
    assert sum(len(request.data) for request in requests) == sum(array.nbytes for array in large.tensors.values())
    for chunk, kept in zip([*chunks, large], found, strict=True):
        assert all(kept.tensors[name].tobytes() == array.tobytes() for name, array in chunk.tensors.items())


@pytest.mark.parametrize("count", [1, CHUNKS])
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_an_older_server_gets_frames_of_bytes(
    relayed: Relay, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], count: int, kind: str
) -> None:
    """Write to a server behind the same address that does not know headers with bytes, as in a rolling upgrade."""

    def unknown(request: bytes) -> bytes:
        message = service_pb2.WriteChunksRequest.FromString(request)
        for header in [message.header] if message.HasField("header") else message.headers.headers:
            header.ClearField("data")
        return message.SerializeToString()

    relayed.change_written(unknown)
    bank, chunks = make_bank(), [make_chunk(i) for i in range(count)]
    if kind == "asyncio":
        ids = asyncio.run(written_async(relayed.address, bank, chunks, **digests))
    else:
        with kvbank.connect(relayed.address) as client:
            ids = [result.chunk_id for result in client.write_many(bank, chunks, **digests)]
    with kvbank.connect(relayed.address) as client:
        found = client.fetch(bank, ids, reader_digest=digests["reader_digest"])
    for chunk, kept in zip(chunks, found, strict=True):
        assert all(kept.tensors[name].tobytes() == array.tobytes() for name, array in chunk.tensors.items())


@pytest.fixture
def silent_for_writes(address: str) -> Iterator[str]:
    """Give the address of a server that answers no write."""
    with closing(Relay(address)) as relay:
        relay.silence("WriteChunks")
        yield relay.address


def test_a_silent_service_fails_a_write_within_its_timeout(silent_for_writes: str, make_chunk: Make) -> None:
    with kvbank.connect(silent_for_writes) as client:
        client.server_info()
        began = time.monotonic()
        with pytest.raises((kvbank.Unavailable, kvbank.DeadlineExceeded)):
            client.write("bank", make_chunk(0, None), timeout=0.5, reader_digest="", embedder_digest="")
    assert time.monotonic() - began < 20, "by default it goes on for 30 s"


def test_a_deadline_leaves_no_coroutine_behind(silent_for_writes: str, make_chunk: Make) -> None:
    """Leave no coroutine that is never awaited: that is a warning, and warnings are errors here."""

    async def write() -> None:
        async with kvbank.connect_async(silent_for_writes) as client:
            with pytest.raises(kvbank.DeadlineExceeded):
                await client.write("bank", make_chunk(0, None), timeout=0.2, reader_digest="", embedder_digest="")

    asyncio.run(write())


def test_tasks_write_side_by_side(address: str, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]) -> None:
    bank = make_bank()

    async def write() -> list[kvbank.WriteResult]:
        async with kvbank.connect_async(address) as client:
            return await asyncio.gather(*(client.write(bank, make_chunk(i), **digests) for i in range(30)))

    assert len({result.chunk_id for result in asyncio.run(write())}) == 30


def chunks_around_a_kill(killable: Any, make_chunk: Make, made: list[kvbank.NewChunk]) -> Iterator[kvbank.NewChunk]:
    for i in range(CHUNKS):
        if i == KILL_AT:
            killable.kill()
            killable.start()
        made.append(make_chunk(i, tokens=512))
        yield made[-1]


def assert_written_once(
    client: kvbank.Client, bank: str, made: list[kvbank.NewChunk], results: list[kvbank.WriteResult]
) -> None:
    assert len({result.chunk_id for result in results}) == CHUNKS
    assert not any(result.gone for result in results)
    stored = {chunk.chunk_id: chunk.idempotency_key for chunk in client.list_chunks(bank)}
    acknowledged = {result.chunk_id: chunk.idempotency_key for result, chunk in zip(results, made, strict=True)}
    assert stored == acknowledged


def test_a_killed_server_costs_no_chunk_and_no_retrieve(
    killable: Any,
    kv: kvbank.KVSpec,
    embedding: kvbank.EmbeddingSpec,
    make_chunk: Make,
    digests: dict[str, str],
    unit: Callable[[int], np.ndarray],
) -> None:
    made: list[kvbank.NewChunk] = []
    with kvbank.connect(killable.address) as client:
        client.create_bank("bank", kv=kv, embedding=embedding)
        results = client.write_many("bank", chunks_around_a_kill(killable, make_chunk, made), **digests)
        assert_written_once(client, "bank", made, results)
        killable.kill()
        killable.start()
        assert len(client.retrieve("bank", unit(0), top_k=3, **digests).chunks) == 3


def test_a_killed_server_costs_the_async_client_no_chunk(
    killable: Any, kv: kvbank.KVSpec, embedding: kvbank.EmbeddingSpec, make_chunk: Make, digests: dict[str, str]
) -> None:
    made: list[kvbank.NewChunk] = []

    async def write() -> list[kvbank.WriteResult]:
        async with kvbank.connect_async(killable.address) as client:
            await client.create_bank("other", kv=kv, embedding=embedding)
            return await client.write_many("other", chunks_around_a_kill(killable, make_chunk, made), **digests)

    results = asyncio.run(write())
    with kvbank.connect(killable.address) as client:
        assert_written_once(client, "other", made, results)


class Abandoned:
    """A call as gRPC makes it: a thread of its own takes the requests; no answer comes, and `cancel` ends it."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def begin(self, requests: Iterator[Any]) -> "Abandoned":
        self.thread = threading.Thread(target=lambda: list(requests))
        self.thread.start()
        return self

    def __iter__(self) -> Iterator[Any]:
        self.cancelled.wait()
        return iter(())

    def cancel(self) -> None:
        self.cancelled.set()


class Held(list[memoryview]):
    """Buffers that are not to be had before the call is cancelled, and who reads its answers has ended."""

    def __init__(self, call: Abandoned) -> None:
        super().__init__([memoryview(b"bytes")])
        self._call = call

    def __iter__(self) -> Iterator[memoryview]:
        self._call.cancelled.wait()
        wait_until(lambda: all(thread.name != "kvbank-write-acks" for thread in threading.enumerate()))
        return super().__iter__()


def test_a_cancelled_stream_leaves_no_staged_file(tmp_path: Path) -> None:
    """Leave neither the file that is being written meanwhile, nor one that comes after."""
    call, staging = Abandoned(), tmp_path / "staging"
    staging.mkdir()
    session, folder = WriteSession("b", (), "", "", 1 << 20), SameHost(Folder(str(tmp_path)), "staging", b"nonce")
    session.pending += [Upload(bytes([i]), service_pb2.ChunkHeader(), Held(call), 5) for i in range(3)]
    stream = WriteStream(call.begin, session, Attempts(60.0), lambda: None, folder)
    wait_until(lambda: list(staging.iterdir()))
    stream.cancel()
    call.thread.join()
    assert not list(staging.iterdir())


class Paused(Abandoned):
    """A call whose thread takes one request, and all others when it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.go_on = threading.Event(), threading.Event()

    def begin(self, requests: Iterator[Any]) -> "Paused":
        def take() -> None:
            next(requests)
            self.taken.set()
            self.go_on.wait()
            list(requests)

        self.thread = threading.Thread(target=take)
        self.thread.start()
        return self


def test_a_cancelled_stream_stages_nothing_more(tmp_path: Path) -> None:
    """Let gRPC's thread ask for two more chunks after the end; their headers are so long that each goes alone."""
    call, staging = Paused(), tmp_path / "staging"
    staging.mkdir()
    session, folder = WriteSession("b", (), "", "", 1 << 20), SameHost(Folder(str(tmp_path)), "staging", b"nonce")
    header = service_pb2.ChunkHeader(bank="b" * (FRAME_BYTES + 1))
    session.pending += [Upload(bytes([i]), header, [memoryview(b"bytes")], 5) for i in range(3)]
    stream = WriteStream(call.begin, session, Attempts(60.0), lambda: None, folder)
    call.taken.wait()
    assert list(staging.iterdir())
    stream.cancel()
    assert not list(staging.iterdir())
    call.go_on.set()
    call.thread.join()
    assert not list(staging.iterdir())
