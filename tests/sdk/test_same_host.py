"""Files of a server on this machine are read; whatever is wrong with them is noticed, and the stream helps
out."""

import asyncio
import os
import socket
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors import safe_open

import kvbank
from kvbank._transport.folder import Folder
from kvbank.v1 import service_pb2 as pb
from kvbank.wire import proof as _proof
from kvbank.wire.stub import make_stub
from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from tests.sdk.host import Host, flipped, truncated
from tests.sdk.relay import Relay
from tests.support.refusals import Refusals
from tests.support.waiting import wait_until

Make = Callable[..., kvbank.NewChunk]


def test_files_are_staged_and_read_and_no_byte_goes_through_the_socket(
    host: Host, make_chunk: Make, unit: Callable[[int], np.ndarray], assert_equal: Callable[..., None]
) -> None:
    made = [make_chunk(i) for i in range(4)]
    ids = host.write(*made)
    for found, new in zip(host.fetch(*ids), made, strict=True):
        assert_equal(found, new)
    hit = host.retrieve(unit(2), top_k=1)
    assert_equal(hit.chunks[ids[2]], made[2])
    assert host.staged() == []
    assert (host.sent("stream"), host.received("stream")) == (0, 0)
    assert host.received("staged") > 0
    assert host.sent("file") > 0


def test_a_staged_file_becomes_a_safetensors_file(host: Host, make_chunk: Make) -> None:
    new = make_chunk(1, "fp32")
    host.client.create_bank(
        "f",
        kv=kvbank.KVSpec(host.digests["reader_digest"], (1, 3), 2, 8, "fp32"),
        embedding=host.client.get_bank("b").embedding,
    )
    chunk_id = host.client.write("f", new, **host.digests).chunk_id
    with safe_open(host.file(chunk_id), "numpy") as file:
        assert file.metadata()["chunk"] == str(chunk_id)
        for name, array in (new.tensors or {}).items():
            assert np.array_equal(file.get_tensor(name), array)


def test_both_paths_and_both_clients_give_the_same_bits(host: Host, make_chunk: Make) -> None:
    ids = host.write(*(make_chunk(i) for i in range(3)))

    async def fetch() -> list[kvbank.Chunk]:
        async with kvbank.connect_async(host.address) as client:
            written = await client.write("b", make_chunk(3), **host.digests)
            return await client.fetch("b", [*ids, written.chunk_id], reader_digest=host.digests["reader_digest"])

    by_file = asyncio.run(fetch())
    assert host.sent("stream") == 0
    assert host.received("stream") == 0
    with grpc.insecure_channel(host.address) as channel:
        stub = make_stub(channel)
        request = pb.FetchChunksRequest(
            bank="b", reader_digest=host.digests["reader_digest"], chunk_ids=[c.chunk_id for c in by_file]
        )
        _, *frames = stub.FetchChunks(request)
    assert b"".join(frames) == b"".join(t.tobytes() for chunk in by_file for t in (chunk.tensors or {}).values())


def test_mapped_tensors_are_verified_views_that_outlive_their_chunk(
    host: Host, make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    made = [make_chunk(i) for i in range(3)]
    ids, reader = host.write(*made), host.digests["reader_digest"]
    with kvbank.connect(host.address, mapped=True) as client:
        found = client.fetch("b", ids, reader_digest=reader)
        host.client.delete_chunks("b", ids[:1])
        wait_until(lambda: not list(host.data.glob(f"payloads/*/*/{ids[0]}.safetensors")))
        for chunk, new in zip(found, made, strict=True):
            assert_equal(chunk, new)
            assert not any(tensor.flags.writeable for tensor in (chunk.tensors or {}).values())
        (cut,) = client.fetch("b", ids[1:2], layers=[1], reader_digest=reader)
        assert {name.rpartition(".")[2] for name in cut.tensors or {}} == {"1"}
        flipped(host.file(ids[2]))
        with pytest.raises(kvbank.DataLoss):
            client.fetch("b", ids[2:], reader_digest=reader)
    assert_equal(found[1], made[1])


def test_without_a_unix_socket_there_is_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="unix socket"):
        LocalServer(tmp_path, same_host=True)


def test_an_opened_folder_shares_it(tmp_path: Path) -> None:
    with kvbank.connect(tmp_path / "memory"):
        nonce = tmp_path / "memory" / "same-host.nonce"
        assert nonce.stat().st_mode & 0o777 == 0o600
        first = nonce.read_bytes()
    with kvbank.connect(tmp_path / "memory"):
        assert nonce.read_bytes() != first


def test_a_wrong_nonce_is_refused_and_a_new_server_is_noticed(
    host: Host, make_chunk: Make, unit: Callable[[int], np.ndarray], assert_equal: Callable[..., None]
) -> None:
    new = make_chunk(1)
    (chunk_id,) = host.write(new)
    with grpc.insecure_channel(host.address) as channel:
        stub = make_stub(channel)
        fetch = pb.FetchChunksRequest(bank="b", reader_digest=host.digests["reader_digest"], chunk_ids=[chunk_id])
        retrieve = pb.RetrieveRequest(banks=["b"], queries=unit(1).tobytes(), top_k=1, **host.digests)

        def ask(proof: bytes) -> Iterator[Callable[[], Any]]:
            yield lambda: stub.FetchFiles(pb.FetchFilesRequest(fetch=fetch, proof=proof))
            yield lambda: stub.RetrieveFiles(pb.RetrieveFilesRequest(retrieve=retrieve, proof=proof))

        nonce = (host.data / "same-host.nonce").read_bytes()
        for proof in (b"", b"x" * 32, nonce):
            for call in ask(proof):
                with Refusals()("NOT_SAME_HOST", grpc.StatusCode.FAILED_PRECONDITION):
                    call()
        for call in ask(_proof.of_client(nonce)):
            assert call().files
    host.stop()
    host.start()
    for _ in range(3):  # with the nonce of before, after asking for the new one, with the new one
        assert_equal(host.fetch(chunk_id)[0], new)
    assert host.sent("file") > 0
    host.write(make_chunk(2))


def test_a_new_server_is_noticed_by_who_only_writes(host: Host, make_chunk: Make) -> None:
    """Write one chunk over the stream, because its file is not taken; the next ones are staged again."""

    async def write() -> None:
        async with kvbank.connect_async(host.address) as client:
            await client.write("b", make_chunk(1), **host.digests)
            host.stop()
            host.start()
            await client.write("b", make_chunk(2), **host.digests)
            await client.write("b", make_chunk(3), **host.digests)

    host.write(make_chunk(1))
    host.stop()
    host.start()
    host.write(make_chunk(2))
    host.write(make_chunk(3))
    assert host.received("staged") == host.received("stream") > 0
    asyncio.run(write())
    assert host.received("staged") == host.received("stream") > 0


def test_a_new_server_is_noticed_by_a_reader_of_asyncio(
    host: Host, make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    """Read once over the stream, because the proof is of the server before; then out of files again."""
    (chunk_id,) = host.write(make_chunk(1))

    async def fetch() -> None:
        async with kvbank.connect_async(host.address) as client:
            for restarted in (False, True, False):
                if restarted:
                    host.stop()
                    host.start()
                (found,) = await client.fetch("b", [chunk_id], reader_digest=host.digests["reader_digest"])
                assert_equal(found, make_chunk(1))

    asyncio.run(fetch())
    assert host.sent("file") == host.sent("stream") > 0


def test_a_nonce_that_cannot_be_read_leaves_the_stream(
    host: Host, make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    os.rename(host.data / "same-host.nonce", host.data / "hidden")
    os.symlink("hidden", host.data / "same-host.nonce")
    with kvbank.connect(host.address) as client:
        chunk_id = client.write("b", make_chunk(1), **host.digests).chunk_id
        assert_equal(client.fetch("b", [chunk_id], reader_digest=host.digests["reader_digest"])[0], make_chunk(1))
    assert host.received("staged") == host.sent("file") == 0


def test_first_calls_at_the_same_time_find_the_path(host: Host, make_chunk: Make) -> None:
    ids = host.write(*(make_chunk(i) for i in range(3)))

    async def fetch() -> None:
        async with kvbank.connect_async(host.address) as client:
            reader = host.digests["reader_digest"]
            await asyncio.gather(*(client.fetch("b", [i], reader_digest=reader) for i in ids))
            await client.fetch("b", ids, reader_digest=reader)

    asyncio.run(fetch())
    assert host.sent("stream") == 0


def test_the_deadline_of_a_call_holds_for_a_server_that_does_not_answer() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{folder}/s")
        silent.listen()
        begun = time.monotonic()
        with kvbank.connect(f"unix:{folder}/s") as client, pytest.raises(kvbank.ServiceError):
            client.fetch("b", [1], reader_digest="r", timeout=0.2)

        async def fetch() -> None:
            async with kvbank.connect_async(f"unix:{folder}/s") as client:
                await client.fetch("b", [1], reader_digest="r", timeout=0.2)

        with pytest.raises(kvbank.ServiceError):
            asyncio.run(fetch())
        assert time.monotonic() - begun < 10


def test_only_the_layers_asked_for_are_read(host: Host, make_chunk: Make) -> None:
    (chunk_id,) = host.write(make_chunk(1))
    with open(host.file(chunk_id), "r+b") as file:
        file.seek(-1, os.SEEK_END)  # in the last layer
        file.write(b"\xff")
    assert set(host.fetch(chunk_id, layers=[1])[0].tensors or {}) == {"k.1", "v.1", "pos.1"}
    with pytest.raises(kvbank.DataLoss):
        host.fetch(chunk_id, layers=[3])


def linked(path: Path) -> None:
    """Replace a file by a link to a copy of the same bytes."""
    path.rename(path.with_suffix(".copy"))
    path.symlink_to(path.with_suffix(".copy"))


@pytest.mark.parametrize("damage", [flipped, truncated, linked])
def test_a_damaged_file_is_data_loss_and_quarantined(
    host: Host, make_chunk: Make, unit: Callable[[int], np.ndarray], damage: Callable[[Path], None]
) -> None:
    ids = host.write(make_chunk(1), make_chunk(2))
    damage(host.file(ids[0]))
    with pytest.raises(kvbank.DataLoss):
        host.retrieve(unit(1), top_k=2)
    assert host.client.get_bank("b").usage.chunks_quarantined == 1
    assert list(host.retrieve(unit(1), top_k=2).chunks) == [ids[1]]
    assert host.client.get_chunk("b", ids[1]).retrieval_count == 2, "the first answer had named it"


def test_a_row_that_cannot_be_read_hides_nothing_that_is_written_later(host: Host, make_chunk: Make) -> None:
    """Raise an error that must not hold a statement open, through which later reads would see the past."""
    (good,) = host.write(make_chunk(1))
    for number in range(2, 22, 2):
        (bad,) = host.write(make_chunk(number))
        with closing(sqlite3.connect(host.data / "metadata.db")) as database, database:
            database.execute("UPDATE chunks SET meta = '{' WHERE chunk_id = ?", (bad,))
        with pytest.raises(kvbank.DataLoss):
            host.fetch(bad, good)
        host.fetch(*host.write(make_chunk(number + 1)))


def test_swapped_files_are_data_loss(host: Host, make_chunk: Make) -> None:
    ids = host.write(make_chunk(1), make_chunk(2))
    first, second = map(host.file, ids)
    first.rename(first.with_suffix(".aside"))
    second.rename(first)
    first.with_suffix(".aside").rename(second)
    for chunk_id in ids:
        with pytest.raises(kvbank.DataLoss):
            host.fetch(chunk_id)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", "", ".", "a/\0"])
def test_names_outside_of_the_folder_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    (tmp_path / "root" / "a").mkdir(parents=True)
    with pytest.raises((OSError, ValueError)), Folder(str(tmp_path / "root")).opened(name):
        pytest.fail("opened")


def test_links_on_the_way_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    (tmp_path / "root" / "x").symlink_to(tmp_path / "x")
    for name in ("out/x", "x"):
        with pytest.raises(OSError, match=name.partition("/")[0]), Folder(str(tmp_path / "root")).opened(name):
            pytest.fail("opened")


def between(relay: Relay, method: str, action: Callable[[], object]) -> None:
    """Do something between the server's answer to a call for files and the reading of them."""

    def answered(frames: list[bytes]) -> list[bytes]:
        action()
        return frames

    relay.change(method, answered)


def test_a_file_that_is_gone_comes_over_the_stream(
    host: Host, relay: Relay, make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    """Move the file away between the answer and the reading; the server has it back then."""
    (chunk_id,) = host.write(make_chunk(1))
    aside, file = host.data / "aside", host.file(chunk_id)
    between(relay, "FetchFiles", lambda: file.rename(aside))
    relay.before("FetchChunks", lambda: aside.rename(file))
    with kvbank.connect(relay.unix) as client:
        (found,) = client.fetch("b", [chunk_id], reader_digest=host.digests["reader_digest"])
    assert_equal(found, make_chunk(1))
    assert relay.calls[-2:] == ["FetchFiles", "FetchChunks"]
    assert host.sent("stream") > 0


def test_what_is_read_anew_is_of_the_same_store(
    host: Host, relay: Relay, make_chunk: Make, unit: Callable[[int], np.ndarray], assert_equal: Callable[..., None]
) -> None:
    """Serve another folder between the answer and the reading, in which the id is another chunk's."""
    (chunk_id,) = host.write(make_chunk(1))
    file, bank, first = host.file(chunk_id), host.client.get_bank("b"), host.data
    other, aside = first.with_name("other"), first / "aside"

    def serve(data: Path) -> None:
        host.stop()
        host.data = data
        host.start()

    def replaced() -> None:
        serve(other)
        file.rename(aside)

    def put_back() -> None:
        aside.rename(file)
        serve(first)
        (first / "direct.sock").unlink()

    serve(other)
    host.client.create_bank("b", kv=bank.kv, embedding=bank.embedding)
    assert host.write(make_chunk(2)) == [chunk_id]
    serve(first)
    (first / "direct.sock").unlink()

    between(relay, "FetchFiles", replaced)
    with kvbank.connect(relay.unix) as client, pytest.raises(kvbank.ChunkNotFound):
        client.fetch("b", [chunk_id], reader_digest=host.digests["reader_digest"])
    put_back()
    between(relay, "RetrieveFiles", replaced)
    with kvbank.connect(relay.unix) as client:
        found = client.retrieve("b", unit(1), top_k=1, **host.digests)
    assert_equal(found.chunks[chunk_id], make_chunk(2))


def test_a_chunk_that_went_is_replaced_by_the_next_best_and_counted_once(
    host: Host, relay: Relay, make_chunk: Make, unit: Callable[[int], np.ndarray]
) -> None:
    near, far = host.write(make_chunk(1), make_chunk(2))
    file = host.file(near)

    def deleted() -> None:
        host.client.delete_chunks("b", [near])
        file.unlink(missing_ok=True)

    between(relay, "RetrieveFiles", deleted)
    with kvbank.connect(relay.unix) as client:
        found = client.retrieve("b", unit(1), top_k=1, **host.digests)
    assert list(found.chunks) == [far]
    assert found.chunks[far].tensors
    # The request had been counted, for the chunk that went.
    assert host.client.get_chunk("b", far).retrieval_count == 0
