"""Payloads are staged for a server on this machine: what it takes, what it refuses, and what is left behind."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import kvbank
from kvbank.v1 import chunk_pb2
from kvbank.v1 import service_pb2 as pb
from kvbank.wire.stub import make_stub
from memory_service.api.embedded import LocalServer
from tests.sdk.host import Host, flipped, truncated
from tests.sdk.relay import Relay
from tests.support.chunks import described
from tests.support.service_process import ServiceHost

Make = Callable[..., kvbank.NewChunk]


def staged_header(host: Host, make_chunk: Make, **change: Any) -> pb.WriteChunksRequest:
    """Return a header whose file is staged well, and which is then changed."""
    new, name, offset = make_chunk(7), uuid.uuid4().hex, 4096
    descriptors, data = described(new.tensors or {})
    file = host.data / "staging" / name
    file.touch(0o600)
    file.write_bytes(bytes(offset) + data)
    embedding = np.asarray(new.embedding, "<f4").tobytes()
    chunk = chunk_pb2.Chunk(idempotency_key=new.idempotency_key, embedding=embedding, token_ids=new.token_ids)
    chunk.original_length = chunk.stored_length = len(new.token_ids)
    chunk.payload.kind = chunk_pb2.PAYLOAD_KIND_LAYER_KV
    chunk.payload.tensors.extend(descriptors)
    header = pb.ChunkHeader(bank="b", chunk=chunk, **host.digests)
    header.staged.CopyFrom(pb.StagedPayload(name=name, offset=offset, proof=host.proof()))
    for name, value in change.items():
        setattr(header.staged, name, value)
    return pb.WriteChunksRequest(header=header)


def refusal(host: Host, header: pb.WriteChunksRequest) -> str:
    with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(make_stub(channel).WriteChunks(iter([header])))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    return str(caught.value.details())


def test_what_is_staged_wrongly_is_refused(host: Host, make_chunk: Make) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"proof": b"x" * 32},
        {"name": "../../etc/passwd"},
        {"name": "0" * 32},
        {"name": ""},
        {"offset": 4},
        {"offset": 8},
        {"offset": -8},
        {"offset": 8192},
    )
    for change in changes:
        assert "staged file" in refusal(host, staged_header(host, make_chunk, **change)), change
        assert host.client.get_bank("b").usage.chunks == 0, change


def test_what_is_staged_for_a_repeated_write_is_not_taken_over(host: Host, make_chunk: Make) -> None:
    """Keep the payload that is there, and leave nothing of the other."""
    new = make_chunk(7)
    (first,) = host.write_all([new])
    file = host.file(first)
    before = (file.stat().st_ino, file.parent.stat().st_mtime_ns)
    assert host.write_all([new]) == [first]
    assert host.staged() == []
    assert (file.stat().st_ino, file.parent.stat().st_mtime_ns) == before
    assert host.received("staged") > 0


def symlink(path: Path) -> None:
    path.rename(path.with_suffix(".x"))
    path.symlink_to(path.with_suffix(".x"))


def second_name(path: Path) -> None:
    os.link(path, path.with_suffix(".x"))


def longer(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [symlink, second_name, longer, truncated, pipe, Path.unlink])
def test_a_staged_file_of_another_kind_is_refused(host: Host, make_chunk: Make, change: Callable[[Path], None]) -> None:
    header = staged_header(host, make_chunk)
    change(host.data / "staging" / header.header.staged.name)
    refusal(host, header)
    assert not list(host.data.glob("payloads/*/*/*"))


def test_a_server_that_shares_nothing_refuses_staged_files(
    tmp_path: Path, kv: kvbank.KVSpec, embedding: kvbank.EmbeddingSpec, host: Host, make_chunk: Make
) -> None:
    header = staged_header(host, make_chunk)
    with LocalServer(tmp_path / "other") as server, kvbank.connect(server.address) as client:
        client.create_bank("b", kv=kv, embedding=embedding)
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
            list(make_stub(channel).WriteChunks(iter([header])))
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_other_bytes_than_stated_are_refused(host: Host, make_chunk: Make) -> None:
    header = staged_header(host, make_chunk)
    flipped(host.data / "staging" / header.header.staged.name)
    with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(make_stub(channel).WriteChunks(iter([header])))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not list(host.data.glob("payloads/*/*/*"))
    assert host.staged() == []


def test_a_refused_file_goes_over_the_stream(
    host: Host, relay: Relay, make_chunk: Make, assert_equal: Callable[..., None]
) -> None:
    """Write to a server that learns of another place in the file, where there is no room for a header."""

    def misplaced(request: bytes) -> bytes:
        frame = pb.WriteChunksRequest.FromString(request)
        for header in (frame.header, *frame.headers.headers):
            if header.HasField("staged"):
                header.staged.offset = 8
        return frame.SerializeToString() if frame.WhichOneof("frame") != "data" else request

    relay.change_written(misplaced)
    made = [make_chunk(i) for i in range(1, 4)]
    with kvbank.connect(relay.unix) as client:
        written = client.write_many("b", made, **host.digests)
    assert relay.calls.count("WriteChunks") > 1
    found = host.client.fetch("b", [each.chunk_id for each in written], reader_digest=host.digests["reader_digest"])
    for chunk, new in zip(found, made, strict=True):
        assert_equal(chunk, new)
    assert host.received("stream") > 0
    assert host.staged() == []


def test_a_full_disk_while_staging_falls_to_the_stream(host: Host, make_chunk: Make) -> None:
    host.write(make_chunk(0))
    assert host.received("stream") == 0
    os.chmod(host.data / "staging", 0o500)
    try:
        if os.access(host.data / "staging", os.W_OK):  # root may write anywhere: a folder that is no folder then
            (host.data / "staging").rename(host.data / "was-staging")
        host.write(make_chunk(1))
    finally:
        if (host.data / "was-staging").exists():
            (host.data / "was-staging").rename(host.data / "staging")
        os.chmod(host.data / "staging", 0o700)
    assert host.received("stream") > 0


def test_what_was_staged_and_not_taken_is_swept_at_the_start(host: Host, make_chunk: Make) -> None:
    staged_header(host, make_chunk)
    assert len(host.staged()) == 1
    host.stop()
    host.start()
    assert host.staged() == []


def test_only_forgotten_files_are_swept_later(host: Host, make_chunk: Make) -> None:
    """Go by how long the server has seen files: the wall clock, which their own times are of, may have been set."""
    same_host = host.server.server.same_host
    assert same_host is not None
    old = host.data / "staging" / staged_header(host, make_chunk).header.staged.name
    os.utime(old, (0, 0))
    same_host.sweep()
    assert host.staged() == [old]
    new = host.data / "staging" / staged_header(host, make_chunk).header.staged.name
    os.utime(new, (0, 0))
    same_host.sweep(1e-9)
    assert host.staged() == [new]


def test_a_server_killed_with_files_staged_shows_none_of_them(
    services: ServiceHost,
    tmp_path: Path,
    kv: kvbank.KVSpec,
    embedding: kvbank.EmbeddingSpec,
    digests: dict[str, str],
    make_chunk: Make,
) -> None:
    """Staged, taken over or not: what was not acknowledged is not there, or is there whole."""
    data = tmp_path / "data"
    service = services.start(data, same_host=True)
    address = service.address
    with kvbank.connect(address) as client:
        client.create_bank("b", kv=kv, embedding=embedding)
        made: list[kvbank.NewChunk] = []

        def chunks() -> Iterator[kvbank.NewChunk]:
            nonlocal service
            for i in range(30):
                if i == 20:
                    service.kill()
                    service = services.start(data, listen=address, same_host=True)
                made.append(make_chunk(i, tokens=64))
                yield made[-1]

        results = client.write_many("b", chunks(), **digests)
        found = client.fetch("b", [r.chunk_id for r in results], reader_digest=digests["reader_digest"])
        for chunk, new in zip(found, made, strict=True):
            for name, array in (new.tensors or {}).items():
                assert (chunk.tensors or {})[name].tobytes() == array.tobytes()
        assert client.get_bank("b").usage.chunks == 30
    assert list((data / "staging").iterdir()) == []
    service.stop()
    assert len(list(data.glob("payloads/*/*/*"))) == 30
