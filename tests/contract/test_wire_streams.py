"""Streams of writes and answers: their order, refusals in the middle, and what the server does not share."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from kvbank.v1 import service_pb2 as pb
from tests.support.caller import BIG, EMBEDDER, MIB, READER

# Writing


def test_acks_come_in_order_whatever_the_sizes(caller: Any, frames: Callable[..., Any]) -> None:
    chunks = [caller.chunk(**(BIG if i % 5 == 0 else {})) for i in range(15)]
    requests = [frame for chunk, data in chunks for frame in frames(chunk, data, step=MIB)]
    acks = list(caller.stub.WriteChunks(iter(requests)))
    assert [ack.idempotency_key for ack in acks] == [chunk.idempotency_key for chunk, _ in chunks]


def brought(chunk: Any, data: bytes) -> pb.ChunkHeader:
    """Make a header that brings the bytes of its chunk along."""
    return pb.ChunkHeader(bank="b", reader_digest=READER, embedder_digest=EMBEDDER, chunk=chunk, data=data)


def test_small_chunks_that_bring_their_bytes_share_a_frame(caller: Any, frames: Callable[..., Any]) -> None:
    chunks = [caller.chunk() for _ in range(20)]
    together = pb.WriteChunksRequest(headers={"headers": [brought(*each) for each in chunks[:15]]})
    alone = [pb.WriteChunksRequest(header=brought(*each)) for each in chunks[15:18]]
    streamed = [frame for each in chunks[18:] for frame in frames(*each)]
    acks = list(caller.stub.WriteChunks(iter([together, *alone, *streamed])))
    ids = [each.chunk_id for ack in acks for each in (ack, *ack.more)]
    assert caller.fetch(*ids) == dict(zip(ids, (data for _, data in chunks), strict=True))


def test_bytes_of_a_header_are_all_of_a_small_chunk(caller: Any, refused: Any) -> None:
    chunk, data = caller.chunk()
    most = caller.stub.GetServerInfo(pb.GetServerInfoRequest()).max_inline_bytes
    m = most // 68 + 1  # 68 bytes a token and layer
    large = caller.chunk(m=m, original_length=m, token_ids=())
    caller.create("v", layers=())
    vectors = pb.ChunkHeader(bank="v", embedder_digest=EMBEDDER, data=b"x")
    vectors.chunk.CopyFrom(caller.chunk(layers=(), stored_length=0)[0])
    damaged = bytes(len(data))
    for header in (brought(chunk, data[:-1]), brought(chunk, data + b"x"), brought(*large), vectors):
        with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
            list(caller.stub.WriteChunks(iter([pb.WriteChunksRequest(header=header)])))
        assert refused.message.startswith("data: ")
    with refused("CHECKSUM_IN_TRANSIT", grpc.StatusCode.INVALID_ARGUMENT):
        list(caller.stub.WriteChunks(iter([pb.WriteChunksRequest(header=brought(chunk, damaged))])))
    assert caller.ids() == caller.ids("v") == []


def test_what_came_before_a_refused_chunk_is_acknowledged(
    caller: Any, frames: Callable[..., Any], refused: Any
) -> None:
    caller.create("v", layers=())
    good = [caller.chunk(layers=(), stored_length=0) for _ in range(50)]
    bad = caller.chunk((1, 0), layers=(), stored_length=0)
    requests = [frame for chunk, data in (*good, bad, *good) for frame in frames(chunk, data, "v")]
    acks: list[Any] = []
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        for ack in caller.stub.WriteChunks(iter(requests)):
            acks.append(ack)
    assert [ack.idempotency_key for ack in acks] == [chunk.idempotency_key for chunk, _ in good]
    assert caller.usage("v").chunks == 50


def test_chunks_that_are_never_finished_keep_nothing(serving: Callable[..., Any], frames: Callable[..., Any]) -> None:
    """Room for two such chunks at once; forty are begun, and their callers go."""
    caller = serving(max_inflight_bytes=20 * MIB)
    caller.create()
    chunk, data = caller.chunk(**BIG)
    for _ in range(20):
        begun, received = iter(frames(chunk, data, step=MIB)), []

        def some() -> Iterator[Any]:
            for _ in range(3):
                yield next(begun)  # noqa: B023
            received.append(True)  # noqa: B023
            yield next(begun)  # noqa: B023

        call = caller.stub.WriteChunks(some())
        while not received and call.is_active():
            pass
        call.cancel()
    assert caller.write_at_once(chunk, data)


def test_writers_wait_for_the_budget_of_the_server(serving: Callable[..., Any]) -> None:
    """Writers come one at a time where the budget is smaller than any chunk, and every one of them comes."""
    caller = serving(max_inflight_bytes=1)
    caller.create()
    chunks = [caller.chunk() for _ in range(30)]
    calls = [caller.stub.WriteChunks(iter(list(caller.frames(chunk, data)))) for chunk, data in chunks]
    ids = {ack.chunk_id for call in calls for ack in call}
    assert len(ids) == 30


def test_a_server_that_shares_nothing_takes_no_staged_file(caller: Any, refused: Any) -> None:
    chunk, _ = caller.chunk()
    staged = pb.StagedPayload(name="0" * 32, offset=4096, proof=b"n")
    header = pb.ChunkHeader(
        bank="b", reader_digest="reader-a", embedder_digest="embedder-a", chunk=chunk, staged=staged
    )
    with refused("STAGED_FILE", grpc.StatusCode.FAILED_PRECONDITION):
        list(caller.stub.WriteChunks(iter([pb.WriteChunksRequest(header=header)])))
    assert not caller.stub.GetServerInfo(pb.GetServerInfoRequest()).HasField("same_host")
    assert caller.ids() == []


def test_a_server_that_shares_nothing_names_no_files(caller: Any, refused: Any) -> None:
    chunk_id = caller.add()
    fetch = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=[chunk_id])
    retrieve = pb.RetrieveRequest(banks=["b"], reader_digest="reader-a", embedder_digest="embedder-a")
    with refused("NOT_SAME_HOST", grpc.StatusCode.FAILED_PRECONDITION):
        caller.stub.FetchFiles(pb.FetchFilesRequest(fetch=fetch))
    with refused("NOT_SAME_HOST", grpc.StatusCode.FAILED_PRECONDITION):
        caller.stub.RetrieveFiles(pb.RetrieveFilesRequest(retrieve=retrieve, proof=b"n"))


# Reading


def test_callers_that_do_not_read_hold_little_and_stop_nobody_else_from_writing(
    serving: Callable[..., Any],
) -> None:
    caller = serving(max_inflight_bytes=8 * MIB)
    caller.create()
    ids = [caller.write_at_once(*caller.chunk(**BIG)) for _ in range(2)]
    request = pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=ids)
    idle = [caller.stub.FetchChunks(request) for _ in range(6)]
    begun = [next(iter(call)) for call in idle]
    assert all(first.HasField("header") for first in begun)
    assert caller.add()
    for call in idle:
        call.cancel()
    assert set(caller.fetch(*ids)) == set(ids)


def test_small_chunks_share_frames(caller: Any) -> None:
    ids = [caller.add() for _ in range(40)]
    _, *frames = caller.stub.FetchChunks(pb.FetchChunksRequest(bank="b", reader_digest="reader-a", chunk_ids=ids))
    assert len(frames) == 1


# Chunks that go together


def together(caller: Any, *chunks: Any) -> pb.WriteChunksRequest:
    """Make one request with the headers of several chunks."""
    headers = [next(caller.frames(chunk, b"")).header for chunk, _ in chunks]
    return pb.WriteChunksRequest(headers=pb.ChunkHeaders(headers=headers))


def acks_of(call: Any) -> Iterator[pb.WriteChunksResponse]:
    for response in call:
        yield response
        yield from response.more


def test_headers_that_come_together_are_acknowledged_in_order(caller: Any) -> None:
    caller.create("c", layers=[])
    chunks = [caller.chunk(layers=[]) for _ in range(600)]
    requests = [together(caller, *chunks[:400]), together(caller, *chunks[400:])]
    for request in requests:
        for header in request.headers.headers:
            header.bank = "c"
    acks = list(acks_of(caller.stub.WriteChunks(iter(requests))))
    assert [ack.idempotency_key for ack in acks] == [chunk.idempotency_key for chunk, _ in chunks]
    assert [ack.chunk_id for ack in acks] == caller.ids_of_all("c")


def test_a_refusal_in_the_middle_comes_behind_the_acks_before_it(caller: Any, refused: Any) -> None:
    caller.create("c", layers=[])
    chunks = [caller.chunk(layers=[], embedding=bytes(8) if place == 3 else bytes(16)) for place in range(5)]
    request = together(caller, *chunks)
    for header in request.headers.headers:
        header.bank = "c"
    acks = []
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        acks.extend(acks_of(caller.stub.WriteChunks(iter([request]))))
    assert len(acks) == len(caller.ids("c")) == 3


def test_a_chunk_with_bytes_to_come_does_not_come_with_others(caller: Any, refused: Any) -> None:
    with refused("INVALID_FIELD", grpc.StatusCode.INVALID_ARGUMENT):
        list(caller.stub.WriteChunks(iter([together(caller, caller.chunk())])))
    assert refused.info.metadata["field"] == "headers"
    assert caller.ids() == []
