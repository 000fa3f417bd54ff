"""Metadata keep the types of their values, and filters compare numbers with numbers."""

import asyncio
import json
import math
import random
import sqlite3
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

import kvbank
from kvbank import Range
from kvbank._calls import search_messages
from kvbank.v1 import bank_pb2, service_pb2, service_pb2_grpc
from tests.sdk.relay import Relay

Make = Callable[..., kvbank.NewChunk]
VECTORS = {"reader_digest": "", "embedder_digest": "cd" * 32}
TYPED: Mapping[str, Any] = {
    **{"title": "a book", "digits": "2024", "year": 2024, "score": 0.1, "whole": 2.0, "draft": True, "final": False},
    **{"most": 2**63 - 1, "least": -(2**63), "odd": 2**53 + 1, "tiny": 5e-324, "empty": "", "none": 0, "": "no key"},
}


def typed(metadata: Mapping[str, Any]) -> dict[str, tuple[type, Any]]:
    return {key: (type(value), value) for key, value in metadata.items()}


@pytest.fixture
def relay(address: str) -> Iterator[Relay]:
    with closing(Relay(address)) as relay:
        yield relay


@pytest.fixture
def bank(make_bank: Callable[..., str]) -> str:
    return make_bank(None)


@pytest.fixture
def write(client: kvbank.Client, bank: str) -> Callable[..., list[int]]:
    """Chunks with these values of the key "a"; None is a chunk without it."""

    def write(*values: Any) -> list[int]:
        chunks = [kvbank.NewChunk(np.ones(16), metadata={} if value is None else {"a": value}) for value in values]
        return [written.chunk_id for written in client.write_many(bank, chunks, **VECTORS)]

    return write


@pytest.fixture
def found(client: kvbank.Client, bank: str) -> Callable[..., list[int]]:
    """Ids of the chunks that a filter lets pass, the same to a search and to a list."""

    def found(**wanted: Any) -> list[int]:
        filter_ = kvbank.Filter(**wanted)
        listed = [chunk.chunk_id for chunk in client.list_chunks(bank, filter=filter_)]
        hits = client.retrieve(bank, np.ones(16), top_k=1000, filter=filter_, embedder_digest="cd" * 32)
        assert sorted(hits.chunks) == listed
        return listed

    return found


def test_values_come_back_as_they_were(
    client: kvbank.Client, embedding: kvbank.EmbeddingSpec, bank: str, make_chunk: Make
) -> None:
    new = kvbank.NewChunk(np.ones(16), metadata=TYPED)
    chunk_id = client.write(bank, new, **VECTORS).chunk_id
    assert client.write(bank, new, **VECTORS).replayed
    assert typed(client.get_chunk(bank, chunk_id).metadata) == typed(TYPED)
    (hit,) = client.retrieve(bank, np.ones(16), embedder_digest="cd" * 32).chunks.values()
    assert typed(hit.metadata) == typed(TYPED)
    assert typed(client.update_chunk(bank, chunk_id, {"year": 2025, "title": 7}).metadata) == {
        "year": (int, 2025),
        "title": (int, 7),
    }
    made = client.create_bank(uuid.uuid4().hex, kv=None, embedding=embedding, metadata=TYPED)
    assert typed(client.get_bank(made.name).metadata) == typed(TYPED)
    assert typed(client.update_bank(made.name, metadata={"n": 1.5}).metadata) == {"n": (float, 1.5)}


def test_evictions_tell_them(client: kvbank.Client, make_bank: Callable[..., str]) -> None:
    bank = make_bank(None, capacity=kvbank.Capacity(chunks=1), policy=kvbank.Policy("lru"))
    for number in (1, 2):
        client.write(bank, kvbank.NewChunk(np.ones(16), metadata={"number": number, "name": "x"}), **VECTORS)
    (went,) = client.list_evictions(bank)
    assert typed(went.metadata) == {"number": (int, 1), "name": (str, "x")}


def test_numbers_of_numpy_and_torch_are_numbers(client: kvbank.Client, bank: str) -> None:
    given = {"i": np.int32(3), "f": np.float32(0.5), "b": np.bool_(True), "t": torch.tensor(4), "z": np.array(2.5)}
    given |= {"h": torch.tensor(0.5, dtype=torch.bfloat16), "g": torch.tensor(1.5, requires_grad=True)}
    chunk_id = client.write(bank, kvbank.NewChunk(np.ones(16), metadata=given), **VECTORS).chunk_id
    plain = {"i": (int, 3), "f": (float, 0.5), "b": (bool, True), "t": (int, 4), "z": (float, 2.5)}
    plain |= {"h": (float, 0.5), "g": (float, 1.5)}
    assert typed(client.get_chunk(bank, chunk_id).metadata) == plain


@pytest.mark.parametrize(
    "value", [None, math.nan, math.inf, 2**63, -(2**63) - 1, 10**400, [1], {"a": 1}, b"x", 1j, "\ud800", np.ones(2)]
)
def test_other_values_are_refused(client: kvbank.Client, bank: str, value: Any) -> None:
    for call in (
        lambda: client.write(bank, kvbank.NewChunk(np.ones(16), metadata={"a": value}), **VECTORS),
        lambda: client.update_bank(bank, metadata={"a": value}),
        lambda: client.update_chunk(bank, 1, {"a": value}),
    ):
        with pytest.raises(kvbank.InvalidArgument, match=r"^metadata: expected") as caught:
            call()
        assert caught.value.metadata["field"] == "metadata"


def test_the_same_key_with_another_type_is_another_request(client: kvbank.Client, bank: str) -> None:
    key = uuid.uuid4().bytes
    client.write(bank, kvbank.NewChunk(np.ones(16), metadata={"a": 1}, idempotency_key=key), **VECTORS)
    for other in (1.0, True, "1"):
        with pytest.raises(kvbank.AlreadyExists):
            client.write(bank, kvbank.NewChunk(np.ones(16), metadata={"a": other}, idempotency_key=key), **VECTORS)


def test_values_are_equal_by_what_they_are(write: Callable[..., list[int]], found: Callable[..., list[int]]) -> None:
    one, real, true, text, two, half, false, none = write(1, 1.0, True, "1", 2, 0.5, False, None)
    assert found(metadata={"a": 1}) == found(metadata={"a": 1.0}) == [one, real]
    assert found(metadata={"a": True}) == [true]
    assert found(metadata={"a": False}) == [false]
    assert found(metadata={"a": "1"}) == [text]
    assert found(metadata={"a": [2, 0.5, "1"]}) == [text, two, half]
    assert found(metadata={"a": np.array([1, 2])}) == [one, real, two]
    assert found(metadata={"a": [True, 0.5]}) == [true, half]
    assert found(metadata={"a": ...}) == [one, real, true, text, two, half, false]
    assert found(exclude={"a": 1}) == [true, text, two, half, false, none]
    assert found(exclude={"a": ...}) == [none]


def test_ranges_are_of_numbers(write: Callable[..., list[int]], found: Callable[..., list[int]]) -> None:
    ids = write(1, 1.5, 2, -3, 2.5)
    one, one_half, two, minus, two_half = ids
    others = write(True, "2", "", None, False)
    assert found(metadata={"a": Range(at_least=1)}) == [one, one_half, two, two_half]
    assert found(metadata={"a": Range(above=1)}) == [one_half, two, two_half]
    assert found(metadata={"a": Range(at_least=1, below=2)}) == [one, one_half]
    assert found(metadata={"a": Range(above=1.0, at_most=2.0)}) == [one_half, two]
    assert found(metadata={"a": Range(below=-2.5)}) == [minus]
    assert found(metadata={"a": Range(at_least=3)}) == []
    assert found(exclude={"a": Range(at_least=1)}) == [minus, *others]


def test_large_numbers_are_compared_exactly(write: Callable[..., list[int]], found: Callable[..., list[int]]) -> None:
    """Compare numbers that a float cannot tell apart."""
    low, high, most, least = write(2**53, 2**53 + 1, 2**63 - 1, -(2**63))
    assert found(metadata={"a": 2**53 + 1}) == [high]
    assert found(metadata={"a": float(2**53)}) == [low]
    assert found(metadata={"a": Range(above=float(2**53))}) == [high, most]
    assert found(metadata={"a": Range(at_least=2**63 - 1)}) == [most]
    assert found(metadata={"a": Range(at_most=-(2**63))}) == [least]


def test_every_float_is_equal_to_itself(write: Callable[..., list[int]], found: Callable[..., list[int]]) -> None:
    choose = random.Random(7)
    drawn = (struct.unpack("<d", choose.randbytes(8))[0] for _ in range(8))
    values = [0.1, -0.0, 5e-324, 1.7976931348623157e308, *filter(math.isfinite, drawn)]
    for chunk_id, value in zip(write(*values), values, strict=True):
        assert chunk_id in found(metadata={"a": value})
        assert found(metadata={"a": Range(at_least=value, at_most=value)}) == found(metadata={"a": value})


@pytest.mark.parametrize(
    "make",
    [
        Range,
        lambda: Range(at_least=math.nan),
        lambda: Range(below=math.inf),
        lambda: Range(above="1"),  # type: ignore[arg-type]
        lambda: Range(above=True),
        lambda: Range(at_most=2**63),
        lambda: kvbank.Filter(metadata={"a": None}),  # type: ignore[dict-item]
        lambda: kvbank.Filter(metadata={"a": []}),
        lambda: kvbank.Filter(exclude={"a": [1, None]}),  # type: ignore[list-item]
        lambda: kvbank.Filter(metadata={"a": math.nan}),
        lambda: kvbank.Filter(metadata={"a": {"b": 1}}),  # type: ignore[dict-item]
    ],
)
def test_conditions_that_make_no_sense(make: Callable[[], object]) -> None:
    with pytest.raises(kvbank.InvalidArgument):
        make()


def test_a_client_of_an_earlier_version(address: str, client: kvbank.Client, bank: str, make_chunk: Make) -> None:
    """Answer it the strings, the one map that it knows; it filters by them, and what it writes has these alone."""
    client.write(bank, kvbank.NewChunk(np.ones(16), metadata={"year": 2024, "who": "ann"}), **VECTORS)
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
        condition = service_pb2.MetadataCondition(key="who", values=["ann"])
        request = service_pb2.ListChunksRequest(bank=bank, filter=service_pb2.Filter(metadata=[condition]))
        (chunk,) = stub.ListChunks(request).chunks
        assert dict(chunk.metadata) == {"who": "ann"}
        request.filter.metadata[0].key, request.filter.metadata[0].values[:] = "year", ["2024"]
        assert not stub.ListChunks(request).chunks


@pytest.mark.parametrize(
    ("strings", "scalars"),
    [
        ({"a": "x"}, {"a": bank_pb2.Scalar(integer=1)}),
        ({}, {"a": bank_pb2.Scalar()}),
        ({}, {"a": bank_pb2.Scalar(text="x")}),
        ({}, {"a": bank_pb2.Scalar(real=math.nan)}),
        ({}, {"a": bank_pb2.Scalar(real=math.inf)}),
        ({}, {f"key {i}": bank_pb2.Scalar(flag=True) for i in range(2000)}),
    ],
)
def test_messages_that_say_more_than_metadata_can(address: str, bank: str, strings: Any, scalars: Any) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
        changed = bank_pb2.Bank(name=bank, metadata=strings, typed_metadata=scalars)
        request = service_pb2.UpdateBankRequest(bank=changed)
        request.update_mask.paths.append("metadata")
        with pytest.raises(grpc.RpcError) as caught:
            stub.UpdateBank(request)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_server_of_an_earlier_version_drops_nothing(relay: Relay, bank: str, embedding: kvbank.EmbeddingSpec) -> None:
    """Send no other metadata than strings to a server that does not say that it keeps others."""

    def older(frames: list[bytes]) -> list[bytes]:
        info = service_pb2.GetServerInfoResponse.FromString(frames[0])
        info.ClearField("typed_metadata")
        return [info.SerializeToString()]

    relay.change("GetServerInfo", older)
    mixed = {"name": "x", "year": 2024}

    async def asynchronous(call: Callable[[kvbank.AsyncClient], Any]) -> None:
        async with kvbank.connect_async(relay.address) as client:
            await call(client)

    calls: list[Callable[[Any], Any]] = [
        lambda client: client.write(bank, kvbank.NewChunk(np.ones(16), metadata=mixed), **VECTORS),
        lambda client: client.create_bank(uuid.uuid4().hex, kv=None, embedding=embedding, metadata=mixed),
        lambda client: client.update_bank(bank, metadata=mixed),
        lambda client: client.update_chunk(bank, 1, mixed),
    ]
    with kvbank.connect(relay.address) as client:
        for call in calls:
            with pytest.raises(kvbank.FailedPrecondition, match="earlier version") as caught:
                call(client)
            assert caught.value.reason == "TYPED_METADATA"
            with pytest.raises(kvbank.FailedPrecondition, match="earlier version"):
                asyncio.run(asynchronous(call))
        client.write(bank, kvbank.NewChunk(np.ones(16), metadata={"name": "x"}), **VECTORS)
    assert set(relay.calls) == {"GetServerInfo", "WriteChunks"}


def test_a_condition_that_an_earlier_version_does_not_know_is_one_that_it_refuses() -> None:
    """Send a condition without a key, which it refuses; a field that it does not know it would drop."""
    filters = [kvbank.Filter(metadata={"a": wanted}) for wanted in (1, True, [1, "a"], Range(below=2))]
    for known in (search_messages.list_chunks("b", False, filter_).filter.metadata[0] for filter_ in filters):
        known.ClearField("typed")
        assert not known.key
    (condition,) = search_messages.list_chunks("b", False, kvbank.Filter(metadata={"a": ["x", "y"]})).filter.metadata
    assert (condition.key, list(condition.values), condition.HasField("typed")) == ("a", ["x", "y"], False)


def test_rows_of_earlier_versions_stay_what_they_were(tmp_path: Path, run: Callable[..., Any]) -> None:
    """Check that the digest of a request with strings is the one that was written before, and that a folder with all
    types is sound."""
    folder, key = tmp_path / "memory", bytes(range(16))
    options: dict[str, Any] = {"start": 3, "token_ids": [1, 2], "text": "text", "idempotency_key": key}
    with kvbank.connect(folder) as client:
        client.create_bank("b", kv=None, embedding=kvbank.EmbeddingSpec("e", 2))
        plain = kvbank.NewChunk([1.0, 0.5], metadata={"z": "1", "a": "b"}, **options)
        typed = kvbank.NewChunk([0.5, 1.0], metadata=TYPED)
        client.write_many("b", [plain, typed], reader_digest="", embedder_digest="e")
    with closing(sqlite3.connect(folder / "metadata.db")) as database:
        digest, meta = database.execute("SELECT hex(substr(digest, 1, 16)), meta FROM chunks").fetchone()
    assert (digest, json.loads(meta)) == ("E6950574174BA42BD37F71CC27D63597", {"a": "b", "z": "1"})
    assert run("check", str(folder)).returncode == 0
