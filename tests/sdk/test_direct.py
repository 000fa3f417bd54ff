"""Direct calls are tried: who may make them, what goes wrong on the socket, and gRPC where they cannot be had."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import kvbank
from kvbank.v1 import direct_pb2 as pb
from kvbank.v1 import service_pb2
from kvbank.wire import local_socket
from memory_service.api.local_socket import MOST_CONNECTIONS
from tests.sdk.host import Host
from tests.sdk.relay import Relay
from tests.support.refusals import error_of
from tests.support.service_process import ServiceHost
from tests.support.waiting import wait_until

Make = Callable[..., kvbank.NewChunk]


def dialled(host: Host) -> socket.socket:
    """Return a connection of a stranger to the socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(20)
    connection.connect(str(host.data / "direct.sock"))
    return connection


@pytest.fixture
def stored(host: Host, make_chunk: Make) -> int:
    return host.write(make_chunk(1))[0]


def test_the_socket_is_this_users_and_goes_with_the_server(host: Host, stored: int) -> None:
    path = host.data / "direct.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    host.fetch(stored)
    fetch = service_pb2.FetchChunksRequest(bank="b", chunk_ids=[stored], reader_digest=host.digests["reader_digest"])
    asked = service_pb2.FetchFilesRequest(fetch=fetch, proof=host.proof())
    with closing(dialled(host)) as connection:
        local_socket.send(connection, pb.DirectRequest(fetch=asked).SerializeToString())
        answer = pb.DirectResponse.FromString(local_socket.receive(connection) or b"")
    assert answer.fetch.files == [str(host.file(stored).relative_to(host.data))]
    host.stop()
    assert not path.exists()
    host.start()
    assert path.exists()


def test_the_blocking_client_asks_the_socket_and_grpc_hears_nothing_of_it(
    host: Host, stored: int, unit: Callable[[int], np.ndarray], make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    """Listen between client and server, which the socket passes by with retrievals and fetches, and with no others."""
    with closing(Relay(host.address)) as relay, kvbank.connect(relay.unix) as client:
        bare = client.retrieve("b", unit(1), top_k=1, payload=False, **host.digests)
        held = kvbank.Held(bare.store_id, {stored: bare.chunks[stored].checksum})
        known = client.retrieve("b", unit(1), top_k=1, held=held, **host.digests)
        (fetched,) = client.fetch("b", [stored], reader_digest=host.digests["reader_digest"])
        found = client.retrieve("b", unit(1), top_k=1, **host.digests)
        client.get_bank("b")
        assert relay.calls == ["GetServerInfo", "GetBank"]
    for chunk in (fetched, found.chunks[stored]):
        assert_equal(chunk, make_chunk(1))
    for chunk in (bare.chunks[stored], known.chunks[stored]):
        assert chunk.tensors is None
        assert chunk.layout == fetched.layout


def test_the_asyncio_client_asks_the_socket_too(
    host: Host, stored: int, unit: Callable[[int], np.ndarray], make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    async def ask(relay: Relay) -> None:
        async with kvbank.connect_async(relay.unix) as client:
            bare = await client.retrieve("b", unit(1), top_k=1, payload=False, **host.digests)
            (fetched,) = await client.fetch("b", [stored], reader_digest=host.digests["reader_digest"])
            found = await client.retrieve("b", unit(1), top_k=1, **host.digests)
            await client.get_bank("b")
            with pytest.raises(kvbank.ChunkNotFound):
                await client.fetch("b", [9999], reader_digest=host.digests["reader_digest"])
        assert bare.chunks[stored].tensors is None
        for chunk in (fetched, found.chunks[stored]):
            assert_equal(chunk, make_chunk(1))

    with closing(Relay(host.address)) as relay:
        asyncio.run(ask(relay))
        assert relay.calls == ["GetServerInfo", "GetBank"]


def test_a_task_that_is_cancelled_leaves_its_answer_to_nobody(
    host: Host, make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    """Cancel calls at all their steps; what is asked after each of them gets its own answer, and few connections are
    made anew."""
    made = [make_chunk(i) for i in range(2)]
    ids = host.write(*made)

    async def fetch() -> None:
        async with kvbank.connect_async(host.address) as client:
            ask = partial(client.fetch, "b", reader_digest=host.digests["reader_digest"])
            await ask([ids[0]])
            for steps in range(12):
                left = asyncio.ensure_future(ask([ids[0]]))
                for _ in range(steps):
                    await asyncio.sleep(0)
                left.cancel()
                (chunk,) = await ask([ids[1]])
                assert_equal(chunk, made[1])
                await asyncio.wait([left])

    asyncio.run(fetch())
    assert host.sent("stream") == 0


def test_grpc_helps_out_where_there_is_no_socket(
    host: Host, stored: int, make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    os.rename(host.data / "direct.sock", host.data / "hidden")
    with kvbank.connect(host.address) as client:
        (chunk,) = client.fetch("b", [stored], reader_digest=host.digests["reader_digest"])
    assert_equal(chunk, make_chunk(1))
    assert host.sent("file") > 0
    assert host.sent("stream") == 0


def test_a_kept_connection_of_a_server_that_went_is_made_anew(host: Host, stored: int) -> None:
    for _ in range(3):
        host.fetch(stored)
        host.stop()
        host.start()
    host.fetch(stored)
    host.fetch(stored)
    assert host.sent("file") > 0


def test_an_error_is_the_same_as_over_grpc(host: Host, stored: int, unit: Callable[[int], np.ndarray]) -> None:
    with pytest.raises(kvbank.ChunkNotFound) as caught:
        host.fetch(stored, 9999)
    assert caught.value.reason == "CHUNK_NOT_FOUND"
    assert len(caught.value.request_id) == 32
    with pytest.raises(kvbank.ReaderMismatch) as caught:
        host.client.fetch("b", [stored], reader_digest="00" * 32)
    assert "00" * 32 in caught.value.metadata.values()
    with pytest.raises(kvbank.BankNotFound):
        host.client.retrieve("nowhere", unit(1), **host.digests)


def test_nonsense_is_refused_and_everybody_else_is_answered(host: Host, stored: int) -> None:
    with closing(dialled(host)) as connection:
        for nonsense in (b"", b"\xff\xff\xff", b"hello"):
            local_socket.send(connection, nonsense)
            assert error_of(local_socket.receive(connection) or b"")[1] == "INVALID_FIELD"
        strange = pb.DirectRequest(fetch=service_pb2.FetchFilesRequest(proof=b"guessed"))
        local_socket.send(connection, strange.SerializeToString())
        assert error_of(local_socket.receive(connection) or b"")[1] == "NOT_SAME_HOST"
    for begun in (b"\x07", b"\x07\0\0\0abc", b"\xff\xff\xff\xff", b"\x01\0\0\0ab"):
        with closing(dialled(host)) as connection:
            connection.sendall(begun)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b""
    host.fetch(stored)


def test_more_callers_than_threads_ask_over_grpc(host: Host, stored: int) -> None:
    taken = [dialled(host) for _ in range(MOST_CONNECTIONS)]
    try:
        with kvbank.connect(host.address) as client:
            assert client.fetch("b", [stored], reader_digest=host.digests["reader_digest"])
    finally:
        for connection in taken:
            connection.close()


def test_many_threads_and_tasks_share_a_client(host: Host, make_chunk: Make, assert_equal: Callable[..., None]) -> None:
    made = [make_chunk(i) for i in range(8)]
    ids = host.write(*made)

    def check(turn: int) -> None:
        assert_equal(host.fetch(ids[turn % 8])[0], made[turn % 8])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(160)))

    async def fetch() -> None:
        async with kvbank.connect_async(host.address) as client:
            calls = [client.fetch("b", [ids[i % 8]], reader_digest=host.digests["reader_digest"]) for i in range(40)]
            for turn, (chunk,) in enumerate(await asyncio.gather(*calls)):
                assert_equal(chunk, made[turn % 8])

    asyncio.run(fetch())
    assert host.sent("stream") == 0


def test_a_long_answer_comes_over_grpc(host: Host, make_chunk: Make, assert_equal: Callable[..., None]) -> None:
    made = [replace(make_chunk(i), text=f"{i}" * (1 << 20)) for i in range(3)]
    ids = host.write(*made)
    assert host.received("staged") > 0
    for found, new in zip(host.fetch(*ids), made, strict=True):
        assert_equal(found, new)
    assert host.sent("stream") == 0


def test_a_caller_who_takes_no_answer_does_not_keep_the_server_from_its_end(host: Host, make_chunk: Make) -> None:
    (chunk_id,) = host.write(replace(make_chunk(1), text="x" * 1_500_000))
    host.fetch(chunk_id)
    fetch = service_pb2.FetchChunksRequest(bank="b", chunk_ids=[chunk_id], reader_digest=host.digests["reader_digest"])
    asked = service_pb2.FetchFilesRequest(fetch=fetch, proof=host.proof())
    with closing(dialled(host)) as connection:
        local_socket.send(connection, pb.DirectRequest(fetch=asked).SerializeToString())
        assert connection.recv(1)  # it is being sent, and is longer than what the socket holds
        host.stop()
        host.start()


def test_a_retrieval_counts_once(host: Host, stored: int, unit: Callable[[int], np.ndarray]) -> None:
    for _ in range(3):
        host.retrieve(unit(1), top_k=1)
    assert host.client.get_chunk("b", stored).retrieval_count == 3


def test_a_long_path_has_no_socket(tmp_path: Path, kv: kvbank.KVSpec, embedding: kvbank.EmbeddingSpec) -> None:
    with kvbank.connect(tmp_path / ("x" * 100)) as client:
        client.create_bank("b", kv=kv, embedding=embedding)
    assert not list(tmp_path.rglob("direct.sock"))


def test_a_server_that_does_not_answer_ends_with_the_deadline(
    services: ServiceHost,
    tmp_path: Path,
    kv: kvbank.KVSpec,
    embedding: kvbank.EmbeddingSpec,
    digests: dict[str, str],
    make_chunk: Make,
) -> None:
    service = services.start(tmp_path / "d", same_host=True)
    with kvbank.connect(service.address) as client:
        client.create_bank("b", kv=kv, embedding=embedding)
        chunk_id = client.write("b", make_chunk(1), **digests).chunk_id
        client.fetch("b", [chunk_id], reader_digest=digests["reader_digest"])
        os.kill(service.process_id, signal.SIGSTOP)
        stat = Path(f"/proc/{service.process_id}/stat")
        wait_until(lambda: ") T " in stat.read_text())  # it may answer until then
        with pytest.raises(kvbank.DeadlineExceeded):
            client.fetch("b", [chunk_id], reader_digest=digests["reader_digest"], timeout=0.3)
        closed = threading.Timer(0.3, client.close)
        closed.start()
        with pytest.raises(kvbank.ClientClosed):
            client.fetch("b", [chunk_id], reader_digest=digests["reader_digest"], timeout=60)
        closed.join()
    service.kill()


def test_a_server_that_does_not_answer_keeps_no_task(
    services: ServiceHost, tmp_path: Path, kv: kvbank.KVSpec, embedding: kvbank.EmbeddingSpec, digests: dict[str, str]
) -> None:
    service = services.start(tmp_path / "d", same_host=True)

    async def ask() -> None:
        client = kvbank.connect_async(service.address)
        await client.create_bank("b", kv=kv, embedding=embedding)
        search = partial(client.retrieve, "b", np.ones(embedding.dimension), payload=False, **digests)
        await search()
        os.kill(service.process_id, signal.SIGSTOP)
        stat = Path(f"/proc/{service.process_id}/stat")
        wait_until(lambda: ") T " in stat.read_text())
        with pytest.raises(kvbank.DeadlineExceeded):
            await search(timeout=0.3)
        left = asyncio.ensure_future(search(timeout=60))
        await asyncio.wait([left], timeout=0.3)
        await client.close()
        with pytest.raises(kvbank.ClientClosed):
            await left

    asyncio.run(ask())
    service.kill()
