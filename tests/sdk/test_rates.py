"""Calls of a tenant that makes too many: the clients wait as the server says, and try again."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

import kvbank
from kvbank.v1 import service_pb2, service_pb2_grpc
from memory_service.api.embedded import LocalServer


class Refusing(service_pb2_grpc.MemoryServiceServicer):
    """A server of another maker, which refuses some calls, and says when they can be made again."""

    def __init__(self) -> None:
        self.refusals, self.after = 0, Duration()

    def GetServerInfo(self, _: Any, context: Any) -> service_pb2.GetServerInfoResponse:  # noqa: N802
        if self.refusals:
            self.refusals -= 1
            info = error_details_pb2.ErrorInfo(reason="RATE_EXCEEDED", domain="kvbank", metadata={"limit": "5"})
            details = [packed(error_details_pb2.RetryInfo(retry_delay=self.after)), packed(info)]
            status = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="slowly", details=details)
            context.abort_with_status(rpc_status.to_status(status))
        return service_pb2.GetServerInfoResponse(version="other")


def packed(message: Message) -> Packed:
    made = Packed()
    made.Pack(message)
    return made


@pytest.fixture
def refusing() -> Iterator[tuple[str, Refusing]]:
    server, service = grpc.server(ThreadPoolExecutor(1)), Refusing()
    service_pb2_grpc.add_MemoryServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", service
    server.stop(None)


def blocking(address: str) -> str:
    with kvbank.connect(address) as client:
        return client.server_info().version


def awaited(address: str) -> str:
    async def call() -> str:
        async with kvbank.connect_async(address) as client:
            return (await client.server_info()).version

    return asyncio.run(call())


@pytest.mark.parametrize("ask", [blocking, awaited])
def test_a_refused_call_is_made_again(refusing: tuple[str, Refusing], ask: Any) -> None:
    address, service = refusing
    service.refusals, service.after = 2, Duration(nanos=1)
    assert ask(address) == "other"
    assert service.refusals == 0


@pytest.mark.parametrize("ask", [blocking, awaited])
def test_where_the_deadline_is_sooner_the_error_says_when(refusing: tuple[str, Refusing], ask: Any) -> None:
    address, service = refusing
    service.refusals, service.after = 2, Duration(seconds=3600, nanos=500_000_000)
    with pytest.raises(kvbank.RateExceeded) as caught:
        ask(address)
    assert service.refusals == 1
    assert caught.value.retry_after == 3600.5
    assert caught.value.metadata == {"limit": "5"}
    assert caught.value.retryable


@pytest.mark.parametrize("odd", [Duration(seconds=-5), Duration(nanos=-1)], ids=["seconds", "nanos"])
def test_a_time_that_makes_no_sense_is_not_gone_by(refusing: tuple[str, Refusing], odd: Duration) -> None:
    address, service = refusing
    service.refusals, service.after = 1, odd
    assert blocking(address) == "other"


def test_both_clients_write_and_read_at_their_rate(tmp_path: Path) -> None:
    """Make more calls than the bucket has, by the clock of the machine: none fails, and everything is written."""
    chunks = [kvbank.NewChunk(embedding=np.ones(4, np.float32), original_length=1) for _ in range(60)]

    async def write(address: str, key: str) -> int:
        async with kvbank.connect_async(address, api_key=key) as client:
            return len(await client.write_many("b", chunks[30:], reader_digest="", embedder_digest="e"))

    with LocalServer(tmp_path / "data", durability="os") as server:
        with kvbank.connect(server.address) as owner:
            owner.create_bank("b", kv=None, embedding=kvbank.EmbeddingSpec("e", 4))
            operator = owner.access.create_key("operator").secret
        with kvbank.connect(server.address, api_key=operator) as client:
            key = client.access.create_key("admin").secret
            client.access.set_tenant_quota("default", kvbank.TenantQuota(calls=40))
        with kvbank.connect(server.address, api_key=key) as client:
            written = len(list(client.write_many("b", chunks[:30], reader_digest="", embedder_digest="e")))
            for _ in range(45):
                client.get_bank("b")
            assert (written, asyncio.run(write(server.address, key))) == (30, 30)
            assert client.get_bank("b").usage.chunks == 60
