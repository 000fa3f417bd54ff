"""Every reason of the public list, with its code; and that the service goes on afterwards."""

import queue
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import grpc
import numpy as np
import pytest
import xxhash
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvbank.v1 import bank_pb2, error_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.api.messages.status import CODE_OF
from memory_service.api.server import SERVICES
from memory_service.api.streams.receiving import LARGEST_HEADER
from memory_service.domain.errors import Reason
from memory_service.domain.validate import LARGEST_METADATA
from memory_service.operations import reading

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
EXISTS = grpc.StatusCode.ALREADY_EXISTS
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("vector", [(NAN, 0, 0, 0), (0, -INF, 0, 0), (3e38, 3e38, 0, 0)])
def test_not_finite(caller, refused, vector):
    caller.add()
    with refused("NOT_FINITE", INVALID):
        caller.add(vector)
    with refused("NOT_FINITE", INVALID):
        caller.retrieve(vector)
    assert len(caller.retrieve()[1]) == 1


def test_long_words_of_a_caller_leave_room_for_the_reason(caller, refused):
    """Trailing metadata of an answer have a few kB, beyond which gRPC drops code and reason."""
    long = "\N{SNOWMAN}" * 100_000
    with refused("BANK_NOT_FOUND", NOT_FOUND):
        caller.retrieve(banks=[long])
    with refused("READER_MISMATCH", PRECONDITION):
        caller.retrieve(reader_digest=long)
    with refused("EMBEDDER_MISMATCH", PRECONDITION):
        caller.retrieve(embedder_digest=long)
    assert caller.retrieve()


def test_bad_chunk_field(caller, refused):
    for field, value in (
        ("idempotency_key", b"short"),
        ("start", -1),
        ("original_length", 2),
        ("stored_length", 9),
        ("stored_length", 2),
        ("embedding", b"123"),
        ("embedding", bytes(32)),
    ):
        print(field, value)
        with refused("INVALID_FIELD", INVALID):
            caller.add(**{field: value})
        assert field in refused.info.metadata["field"] or field == "original_length"
        assert caller.ids() == []


def test_long_words_about_a_producer(caller, refused):
    chunk, data = caller.chunk()
    chunk.payload.producer.version = "1" * 1025
    with refused("INVALID_FIELD", INVALID):
        caller.write((chunk, data))
    assert refused.info.metadata["field"] == "chunk.payload.producer.version"


def test_bad_bank_fields(caller, refused):
    for fields in (
        {"name": ""},
        {"name": " b"},
        {"name": "a\nb"},
        {"layers": [2, 1]},
        {"kv": bank_pb2.KvSpec(layers=[1])},
        {"kv": bank_pb2.KvSpec(reader_digest="r" * 1025, layers=[1], kv_heads=1, head_dim=1, dtype=1)},
        {"layers": range(1025)},
        {"embedding": bank_pb2.EmbeddingSpec(embedder_digest="e" * 1025, dimension=1)},
        {"kv": bank_pb2.KvSpec(reader_digest="r", layers=[1], kv_heads=1, head_dim=0, dtype=1)},
        {"kv": bank_pb2.KvSpec(reader_digest="r", layers=[1], kv_heads=1, head_dim=1, dtype=4)},
        {"embedding": bank_pb2.EmbeddingSpec(dimension=0)},
        {"capacity": {"chunks": 0}},
        {"policy": {"lower": 60, "upper": 50}},
        {"policy": {"target": 101}},
        {"policy": {"kind": 99}},
    ):
        with refused("INVALID_FIELD", INVALID):
            caller.create(**({"name": "new"} | fields))


def test_bad_requests(caller, refused):
    stub = caller.stub
    for call, request in (
        (stub.ListBanks, pb.ListBanksRequest(page_size=-1)),
        (stub.ListChunks, pb.ListChunksRequest(bank="b", page_size=1001)),
        (stub.ListChunks, pb.ListChunksRequest(bank="b", page_token="x")),
        (stub.ListEvictions, pb.ListEvictionsRequest(bank="b", page_token="-1")),
        (stub.ListChunks, pb.ListChunksRequest(bank="b", page_token="9" * 5000)),
        (stub.UpdateBank, pb.UpdateBankRequest(bank={"name": "b"}, update_mask={"paths": ["name"]})),
        (stub.UpdateBank, pb.UpdateBankRequest(bank={"name": "b"})),
        (stub.DeleteChunks, pb.DeleteChunksRequest(bank="b")),
        (stub.ExplainEviction, pb.ExplainEvictionRequest(bank="b", need=-1)),
    ):
        with refused("INVALID_FIELD", INVALID):
            call(request)
    for fields in ({"top_k": 1001}, {"layers": [2]}, {"banks": []}, {"banks": ["b", "b"]}, {"request_id": b"x"}):
        with refused("INVALID_FIELD", INVALID):
            caller.retrieve(**fields)
    with refused("INVALID_FIELD", INVALID):
        caller.retrieve(vector=(1, 2, 3))
    with refused("INVALID_FIELD", INVALID):
        caller.retrieve(vector=np.zeros((reading.MOST_QUERIES + 1, 4)))
    with refused("INVALID_FIELD", INVALID):
        caller.fetch()


def test_a_query_of_another_dimension_is_refused(caller, refused):
    """8 numbers could be two queries of 4; a caller who says what they are is not misunderstood."""
    caller.add()
    eight = np.ones(8)
    with refused("INVALID_FIELD", INVALID):
        caller.retrieve(eight, dimension=8)
    assert refused.info.metadata["field"] == "queries"
    assert refused.message == "queries: have 8 numbers each, and the embeddings of bank b 4"
    with refused("INVALID_FIELD", INVALID):
        caller.retrieve(eight, dimension=-4)
    assert len(caller.retrieve(eight, dimension=4)[0].queries) == len(caller.retrieve(eight)[0].queries) == 2


def test_broken_streams(caller, refused, frames):
    chunk, data = caller.chunk()
    header, *rest = frames(chunk, data)
    for stream in ([rest[0]], [header, header], [header], [header, *rest[:-1]], [header, *rest, rest[0]]):
        with refused("INVALID_FIELD", INVALID):
            list(caller.stub.WriteChunks(iter(stream)))
    with refused("INVALID_FIELD", INVALID):
        list(caller.stub.WriteChunks(iter([header, pb.WriteChunksRequest(data=data + b"more")])))


def _edit(caller, edit):
    chunk, data = caller.chunk()
    edit(chunk.payload.tensors)
    return chunk, data


def test_tensor_mismatch(caller, refused):
    for what, edit in {
        "the name of a layer that the bank has not": lambda tensors: setattr(tensors[0], "name", "k.2"),
        "one name twice": lambda tensors: setattr(tensors[0], "name", tensors[1].name),
        "another type": lambda tensors: setattr(tensors[0], "dtype", bank_pb2.DATA_TYPE_FP16),
        "no type": lambda tensors: setattr(tensors[0], "dtype", 77),
        "other sizes of heads": lambda tensors: tensors[0].shape.__setitem__(2, 9),
        "fewer tokens": lambda tensors: tensors[1].shape.__setitem__(1, 2),
        "a dimension too many": lambda tensors: tensors[0].shape.append(1),
        "another length": lambda tensors: setattr(tensors[0], "length", 4),
        "a tensor too few": lambda tensors: tensors.pop(),
    }.items():
        print(what)
        with refused("TENSOR_MISMATCH", INVALID):
            caller.write(_edit(caller, edit))
        assert caller.ids() == []


def test_bad_positions(caller, refused):
    for positions in ([0, 0, 1], [2, 1, 0], [-1, 0, 1], [0, 1, 5]):
        print(positions)
        chunk, data = caller.chunk()
        part = np.array(positions, "<i4").tobytes()
        chunk.payload.tensors[-1].checksum = xxhash.xxh3_64_intdigest(part)
        with refused("TENSOR_MISMATCH", INVALID):
            caller.write((chunk, data[: -len(part)] + part))
        assert caller.ids() == []


def test_payload_where_none_belongs(caller, refused):
    caller.create("v", layers=[])
    with refused("READER_MISMATCH", PRECONDITION):
        caller.add(bank="v")
    with refused("READER_MISMATCH", PRECONDITION):
        caller.add(layers=[])
    caller.create("u", kv=bank_pb2.KvSpec(reader_digest="reader-a"))
    with refused("TENSOR_MISMATCH", INVALID):
        caller.add(bank="u")


def test_checksum_in_transit(caller, refused):
    chunk, data = caller.chunk()
    with refused("CHECKSUM_IN_TRANSIT", INVALID):
        caller.write((chunk, data[:10] + bytes([data[10] ^ 1]) + data[11:]))
    assert refused.info.metadata["tensor"] == "k.1"


def test_bank_not_found(caller, refused):
    for call in (
        lambda: caller.add(bank="no"),
        lambda: caller.retrieve(banks=["no"]),
        lambda: caller.fetch(1, bank="no"),
        lambda: caller.ids("no"),
        lambda: caller.usage("no"),
        lambda: caller.stub.DeleteBank(pb.DeleteBankRequest(name="no")),
        lambda: caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="no")),
    ):
        with refused("BANK_NOT_FOUND", NOT_FOUND):
            call()


def test_chunk_not_found(caller, refused):
    caller.create("c")
    mine = caller.add(bank="c")
    for chunk_id in (mine, 10**9):
        with refused("CHUNK_NOT_FOUND", NOT_FOUND):
            caller.fetch(chunk_id)
        with refused("CHUNK_NOT_FOUND", NOT_FOUND):
            caller.count(chunk_id)
        with refused("CHUNK_NOT_FOUND", NOT_FOUND):
            caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=chunk_id))


def test_bank_exists(caller, refused):
    with refused("BANK_EXISTS", EXISTS):
        caller.create(layers=[1])


def test_key_reused(caller, refused):
    chunk, data = caller.chunk()
    caller.write((chunk, data))
    chunk.text = "another"
    with refused("KEY_REUSED", EXISTS):
        caller.write((chunk, data))


def test_reader_and_embedder_mismatch(caller, refused):
    chunk_id = caller.add()
    with refused("READER_MISMATCH", PRECONDITION):
        caller.retrieve(reader_digest="reader-b")
    assert dict(refused.info.metadata) == {"bank_digest": "reader-a", "request_digest": "reader-b"}
    with refused("READER_MISMATCH", PRECONDITION):
        caller.retrieve(reader_digest="")
    with refused("EMBEDDER_MISMATCH", PRECONDITION):
        caller.retrieve(embedder_digest="embedder-b")
    with refused("READER_MISMATCH", PRECONDITION):
        list(caller.stub.FetchChunks(pb.FetchChunksRequest(bank="b", reader_digest="x", chunk_ids=[chunk_id])))


def test_banks_differ(caller, refused):
    caller.create("c", layers=[1])
    with refused("BANKS_DIFFER", PRECONDITION):
        caller.retrieve(banks=["b", "c"])


def test_bank_full(caller, refused):
    caller.create("c", capacity={"chunks": 2}, policy={"kind": bank_pb2.POLICY_KIND_REJECT})
    ids = [caller.add(bank="c") for _ in range(2)]
    with refused("BANK_FULL", EXHAUSTED):
        caller.add(bank="c")
    assert caller.ids("c") == ids


def test_too_large(serving, refused):
    caller = serving(max_chunk_bytes=1000, max_answer_bytes=1000)
    caller.create()
    caller.create("c", capacity={"tokens": 2})
    with refused("TOO_LARGE", EXHAUSTED):
        caller.add(bank="c")
    with refused("TOO_LARGE", EXHAUSTED):
        caller.add(m=50, original_length=50, token_ids=[])
    caller.add()
    caller.add()
    caller.add()
    with refused("TOO_LARGE", EXHAUSTED):
        caller.retrieve()
    assert len(caller.retrieve(top_k=2)[1]) == 2


def test_what_is_not_a_tensor_is_bounded_too(caller, refused):
    """Else one chunk, or one bank, could make every page that it is on too large for a message."""
    with refused("TOO_LARGE", EXHAUSTED):
        caller.add(text="x" * LARGEST_HEADER)
    long = {"note": "x" * LARGEST_METADATA}
    chunk, data = caller.chunk()
    chunk.metadata.update(long)
    with refused("INVALID_FIELD", INVALID):
        caller.write((chunk, data))
    assert refused.info.metadata["field"] == "chunk.metadata"
    with refused("INVALID_FIELD", INVALID):
        caller.create("c", metadata=long)
    chunk_id = caller.add()
    with refused("INVALID_FIELD", INVALID):
        caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=chunk_id, metadata=long))
    assert caller.ids() == [chunk_id]


def test_metadata_has_no_nul(caller, refused):
    """SQLite reads a text of JSON up to it: a filter for "a" would find "a\\0b", and one for "a\\0b" nothing."""
    chunk_id = caller.add()
    for metadata in ({"speaker": "a\0b"}, {"a\0b": "speaker"}):
        with refused("INVALID_FIELD", INVALID):
            caller.stub.UpdateChunk(pb.UpdateChunkRequest(bank="b", chunk_id=chunk_id, metadata=metadata))


def test_a_page_of_what_is_large_is_shorter(serving):
    """However many were asked for."""
    caller = serving(max_message_bytes=4 * 1024 * 1024)
    note = {"note": "x" * 30_000}
    names = [f"bank {number:03}" for number in range(90)]
    for name in names:
        caller.create(name, metadata=note)
    assert pages(caller.stub.ListBanks, pb.ListBanksRequest(page_size=1000), lambda bank: bank.name) == names
    caller.create("full", layers=[], capacity={"chunks": 1})
    chunks = [caller.chunk(layers=[]) for _ in range(91)]
    for chunk, _ in chunks:
        chunk.metadata.update(note)
    ids = [ack.chunk_id for ack in caller.write(*chunks, bank="full")]
    request = pb.ListEvictionsRequest(bank="full", page_size=1000)
    assert sorted(pages(caller.stub.ListEvictions, request, lambda eviction: eviction.chunk_id)) == ids[:-1]


def pages(ask, request, of):
    """Ask for all pages, check that there are several and that none is much larger than 2 MiB, and return their
    entries."""
    found, count = [], 0
    while not count or request.page_token:
        page = ask(request)
        assert page.ByteSize() < 3 << 20
        found += map(of, getattr(page, "banks", None) or page.evictions)
        request.page_token, count = page.next_page_token, count + 1
    assert count > 1
    return found


def test_message_beyond_the_limit_has_no_details(serving):
    caller = serving(max_message_bytes=4 << 20)
    caller.create()
    with pytest.raises(grpc.RpcError) as caught:
        list(caller.stub.WriteChunks(iter([pb.WriteChunksRequest(data=bytes(5 << 20))])))
    assert caught.value.code() == EXHAUSTED
    caller.add()


def test_draining_stream_is_told(serving, refused, frames):
    """Health turns first, an open stream may finish its chunk and begins none."""
    caller = serving(grace=60)  # a busy machine must not cut the stream before the answer
    caller.create()
    requests: queue.SimpleQueue = queue.SimpleQueue()
    stream = caller.stub.WriteChunks(iter(requests.get, None))
    for frame in frames(*caller.chunk()):
        requests.put(frame)
    next(stream)
    health = health_pb2_grpc.HealthStub(caller.channel).Watch(
        health_pb2.HealthCheckRequest(service=SERVICES[0].full_name)
    )
    assert next(health).status == health_pb2.HealthCheckResponse.SERVING
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(serving.server.stop)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        health.cancel()
        for frame in frames(*caller.chunk()):
            requests.put(frame)
        with refused("NOT_SERVING", UNAVAILABLE):
            next(stream)
        requests.put(None)
        stopping.result()


def test_every_reason_is_documented():
    """docs/errors.md lists exactly the enum."""
    names = {name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \|", text, re.MULTILINE)
    assert {reason for reason, _ in rows} == names
    assert len(rows) == len(names)
    assert dict(rows) == {reason: code.name for reason, code in CODE_OF.items()}
    assert set(get_args(Reason)) == names


def test_every_reason_is_tested():
    names = {name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    folders = (Path(__file__).parent, Path(__file__).parents[1] / "local")
    tests = "".join(path.read_text() for folder in folders for path in folder.glob("test_*.py"))
    assert {name for name in names if f'"{name}"' not in tests} == set()
