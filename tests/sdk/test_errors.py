"""Each class of error, made by the real service or by gRPC itself."""

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

import kvbank
from kvbank._transport import status
from kvbank.v1 import service_pb2, service_pb2_grpc
from tests.support.synced import wait_until_synced

Make = Callable[..., kvbank.NewChunk]
MakeBank = Callable[..., str]
Unit = Callable[[int], np.ndarray]
SPEC = kvbank.EmbeddingSpec("e", 4)


def test_what_is_not_there(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], unit: Unit
) -> None:
    bank = make_bank()
    for call in (
        lambda: client.get_bank("nobody"),
        lambda: client.write("nobody", make_chunk(0), **digests),
        lambda: client.retrieve("nobody", unit(0), **digests),
        lambda: list(client.list_chunks("nobody")),
        lambda: client.explain_eviction("nobody"),
    ):
        with pytest.raises(kvbank.BankNotFound) as caught:
            call()
        assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "BANK_NOT_FOUND")
        assert not caught.value.retryable
    for call in (
        lambda: client.get_chunk(bank, 2**60),
        lambda: client.fetch(bank, [2**60], reader_digest=digests["reader_digest"]),
        lambda: client.update_chunk(bank, 2**60, {}),
    ):
        with pytest.raises(kvbank.ChunkNotFound):
            call()


def test_another_model_and_another_embedder(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], unit: Unit
) -> None:
    bank, other = make_bank(), "ef" * 32
    chunk_id = client.write(bank, make_chunk(0), **digests).chunk_id
    for call in (
        lambda: client.write(bank, make_chunk(1), **{**digests, "reader_digest": other}),
        lambda: client.retrieve(bank, unit(0), **{**digests, "reader_digest": other}),
        lambda: client.fetch(bank, [chunk_id], reader_digest=other),
    ):
        with pytest.raises(kvbank.ReaderMismatch) as caught:
            call()
        assert caught.value.metadata["bank_digest"] == digests["reader_digest"]
        assert caught.value.metadata["request_digest"] == other
    for call in (
        lambda: client.write(bank, make_chunk(1), **{**digests, "embedder_digest": other}),
        lambda: client.retrieve(bank, unit(0), **{**digests, "embedder_digest": other}),
    ):
        with pytest.raises(kvbank.EmbedderMismatch):
            call()


def test_what_exists(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], kv: kvbank.KVSpec
) -> None:
    bank, key = make_bank(), uuid.uuid4().bytes
    client.write(bank, make_chunk(0, idempotency_key=key), **digests)
    with pytest.raises(kvbank.AlreadyExists) as caught:
        client.write(bank, make_chunk(1, idempotency_key=key), **digests)
    assert caught.value.reason == "KEY_REUSED"
    with pytest.raises(kvbank.AlreadyExists) as caught:
        client.create_bank(bank, kv=kv, embedding=kvbank.EmbeddingSpec("ef" * 32, 4), exist_ok=True)
    assert caught.value.reason == "BANK_EXISTS"


def test_malformed_requests(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], unit: Unit
) -> None:
    bank = make_bank()
    for call in (
        lambda: client.create_bank("", kv=None, embedding=client.get_bank(bank).embedding),
        lambda: client.write(bank, make_chunk(0, "fp32"), **digests),
        lambda: client.write(bank, kvbank.NewChunk([1.0, 2.0]), **digests),
        lambda: client.retrieve(bank, [1.0, 2.0], **digests),
        lambda: client.retrieve(bank, unit(0), top_k=100_000, **digests),
        lambda: client.retrieve([], unit(0), **digests),
    ):
        with pytest.raises(kvbank.InvalidArgument) as caught:
            call()
        assert caught.value.reason in {"INVALID_FIELD", "TENSOR_MISMATCH"}


def test_banks_that_differ(client: kvbank.Client, make_bank: MakeBank, digests: dict[str, str], unit: Unit) -> None:
    with pytest.raises(kvbank.FailedPrecondition) as caught:
        client.retrieve([make_bank("bf16"), make_bank("fp32")], unit(0), **digests)
    assert caught.value.reason == "BANKS_DIFFER"
    assert len(bytes.fromhex(caught.value.request_id)) == 16


def test_a_full_bank_refuses(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank = make_bank(capacity=kvbank.Capacity(chunks=2), policy=kvbank.Policy("reject"))
    with pytest.raises(kvbank.BankFull):
        client.write_many(bank, map(make_chunk, range(5)), **digests)
    assert client.get_bank(bank).usage.chunks == 2


def test_limits_of_the_server(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kv: kvbank.KVSpec,
    embedding: kvbank.EmbeddingSpec,
    make_chunk: Make,
    digests: dict[str, str],
) -> None:
    monkeypatch.setenv("KVBANK_MAX_CHUNK_BYTES", "4096")
    with kvbank.connect(tmp_path) as client:
        assert client.server_info().max_chunk_bytes == 4096
        client.create_bank("bank", kv=kv, embedding=embedding)
        client.write("bank", make_chunk(0), **digests)
        with pytest.raises(kvbank.TooLarge):
            client.write("bank", make_chunk(1, tokens=1000), **digests)
    monkeypatch.setenv("KVBANK_MIN_FREE", str(1 << 60))
    with kvbank.connect(tmp_path) as client, pytest.raises(kvbank.DiskFull):
        client.write("bank", make_chunk(2), **digests)


def test_damage_on_disk(
    tmp_path: Path,
    kv: kvbank.KVSpec,
    embedding: kvbank.EmbeddingSpec,
    make_chunk: Make,
    digests: dict[str, str],
    unit: Unit,
) -> None:
    with kvbank.connect(tmp_path) as client:
        client.create_bank("bank", kv=kv, embedding=embedding)
        chunk_id = client.write("bank", make_chunk(0), **digests).chunk_id
        (payload,) = tmp_path.rglob(f"{chunk_id}.safetensors")
        wait_until_synced(payload.parents[3])
        payload.chmod(0o600)
        content = bytearray(payload.read_bytes())
        content[-1] ^= 1
        payload.write_bytes(content)
        with pytest.raises(kvbank.DataLoss) as caught:
            client.fetch("bank", [chunk_id], reader_digest=digests["reader_digest"])
        assert caught.value.reason == "CHECKSUM_MISMATCH"
        assert caught.value.metadata["chunk_id"] == str(chunk_id)


def test_an_over_long_message_names_the_limit(
    address: str, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str]
) -> None:
    bank, chunk = make_bank(), make_chunk(0, text="x" * 2_000_000)
    options = [("grpc.max_send_message_length", 1_000_000)]
    with kvbank.connect(address, options=options) as client, pytest.raises(kvbank.TooLarge, match="1000000") as caught:
        client.write(bank, chunk, **digests)
    assert caught.value.metadata["limit"] == "1000000"

    async def write() -> None:
        async with kvbank.connect_async(address, options=options) as client:
            await client.write(bank, chunk, **digests)

    with pytest.raises(kvbank.TooLarge, match="1000000"):
        asyncio.run(write())


def test_errors_that_have_no_reason(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        unknown = channel.unary_unary("/kvbank.v1.MemoryService/MakeTea")
        with pytest.raises(grpc.RpcError) as caught:
            unknown(b"")
    error = status.from_rpc_error(caught.value)
    assert isinstance(error, kvbank.Internal)
    assert (error.code, error.reason) == ("UNIMPLEMENTED", "")


def test_bytes_that_are_no_message(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/kvbank.v1.MemoryService/GetBank")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff")
    error = status.from_rpc_error(caught.value)
    assert isinstance(error, kvbank.InvalidArgument)
    assert error.reason == "INVALID_FIELD"


def test_the_service_checks_what_the_client_would_not_send(
    address: str, make_bank: MakeBank, digests: dict[str, str], unit: Unit
) -> None:
    queries = np.full_like(unit(0), np.nan)
    request = service_pb2.RetrieveRequest(banks=[make_bank()], queries=queries.tobytes(), **digests)
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.MemoryServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Retrieve(request))
    error = status.from_rpc_error(caught.value)
    assert isinstance(error, kvbank.InvalidArgument)
    assert error.reason == "NOT_FINITE"


def test_numbers_that_the_wire_cannot_carry_are_refused_by_name(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], unit: Unit
) -> None:
    bank, large = make_bank(), 2**63
    for field, call in (
        ("top_k", lambda: client.retrieve(bank, unit(0), top_k=2**31, **digests)),
        ("layers", lambda: client.retrieve(bank, unit(0), layers=[1, 2**31], **digests)),
        ("chunk_id", lambda: client.retrieve(bank, unit(0), held=kvbank.Held("s", {large: 1}), **digests)),
        ("checksum", lambda: client.retrieve(bank, unit(0), held=kvbank.Held("s", {1: -1}), **digests)),
        ("start_from", lambda: client.retrieve(bank, unit(0), filter=kvbank.Filter(start_from=large), **digests)),
        ("start_before", lambda: list(client.list_chunks(bank, filter=kvbank.Filter(start_before=large)))),
        ("chunk_ids", lambda: client.fetch(bank, [1, large], reader_digest=digests["reader_digest"])),
        ("layers", lambda: client.fetch(bank, [1], layers=[2**40], reader_digest=digests["reader_digest"])),
        ("chunk_id", lambda: client.get_chunk(bank, large)),
        ("chunk_id", lambda: client.update_chunk(bank, large, {})),
        ("chunk_ids", lambda: client.delete_chunks(bank, [large])),
        ("chunk_ids", lambda: client.pin_chunks(bank, [-large - 1])),
        ("need", lambda: client.explain_eviction(bank, need=large)),
        ("start", lambda: client.write(bank, make_chunk(0, start=large), **digests)),
        ("original_length", lambda: client.write(bank, make_chunk(0, original_length=2**31), **digests)),
        ("token_ids", lambda: client.write(bank, make_chunk(0, token_ids=[2**31] * 4), **digests)),
        ("token_ids", lambda: client.write(bank, make_chunk(0, token_ids=np.full(4, 2**31)), **digests)),
        ("chunks", lambda: client.update_bank(bank, capacity=kvbank.Capacity(chunks=large))),
        ("bytes", lambda: client.update_bank(bank, quota=kvbank.Quota(bytes=large))),
        ("target", lambda: client.update_bank(bank, policy=kvbank.Policy(target=2**31))),
        ("dimension", lambda: client.create_bank("n", kv=None, embedding=kvbank.EmbeddingSpec("e", 2**31))),
        ("head_dim", lambda: client.create_bank("n", kv=kvbank.KVSpec("r", [1], 1, 2**31), embedding=SPEC)),
    ):
        with pytest.raises(kvbank.InvalidArgument, match=f"^{field}: ") as caught:
            call()
        assert isinstance(caught.value, ValueError)
        assert (caught.value.reason, caught.value.metadata["field"]) == ("INVALID_FIELD", field)
    client.get_bank(bank)


def test_no_hits_are_never_asked_for(
    client: kvbank.Client, make_bank: MakeBank, digests: dict[str, str], unit: Unit
) -> None:
    """Refuse 0, which means on the wire that nothing is said."""
    with pytest.raises(kvbank.InvalidArgument, match=r"^top_k: must be at least 1$"):
        client.retrieve(make_bank(), unit(0), top_k=0, **digests)


def test_a_query_of_another_dimension(
    client: kvbank.Client, make_bank: MakeBank, digests: dict[str, str], unit: Unit
) -> None:
    bank = make_bank()
    for query in (np.ones(32), np.ones((2, 8))):
        with pytest.raises(kvbank.InvalidArgument, match=f"have {query.shape[-1]} numbers each, and .* 16$") as caught:
            client.retrieve(bank, query, **digests)
        assert caught.value.metadata["field"] == "queries"


def test_every_failed_call_names_its_request(
    client: kvbank.Client, make_bank: MakeBank, make_chunk: Make, digests: dict[str, str], unit: Unit
) -> None:
    bank, key = make_bank(), uuid.uuid4().bytes
    client.write(bank, make_chunk(0, idempotency_key=key), **digests)
    ids = set()
    for call in (
        lambda: client.get_bank("nobody"),
        lambda: client.write(bank, make_chunk(1, idempotency_key=key), **digests),
        lambda: client.retrieve("nobody", unit(0), **digests),
        lambda: client.fetch(bank, [2**60], reader_digest=digests["reader_digest"]),
        lambda: list(client.list_chunks("nobody")),
    ):
        with pytest.raises(kvbank.ServiceError) as caught:
            call()
        assert len(caught.value.request_id) == 32
        ids.add(caught.value.request_id)
    assert len(ids) == 5
