"""A service and a proxy before its database: how often that is asked, and what happens where it takes what is sent and
answers nothing, as one whose host or network hangs does."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Limits
from tests.support.caller import EMBEDDER, Caller
from tests.support.engines import ENGINES
from tests.support.stalling import StallingProxy

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
# Far more than any of this takes, and far less than a database is waited for.
SOON_S = 20
# Nothing recurs while a test runs.
IDLE = Limits(expiry_s=3600)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    with KIND.place(tmp_path) as made:
        yield made


@pytest.fixture
def proxy(place: Mapping[str, Any]) -> Iterator[StallingProxy]:
    """Stand before the database of the test."""
    made = StallingProxy.before(place["data"])
    yield made
    made.close()


def test_a_warm_retrieval_asks_the_database_once(place: Mapping[str, Any], proxy: StallingProxy) -> None:
    with LocalServer(**{**place, "data": proxy.url, "durability": "os"}, limits=IDLE) as server:
        caller = Caller(server.address)
        caller.create("v", layers=[])
        written = {caller.add(bank="v", layers=[]) for _ in range(3)}
        asked = []
        for _ in range(9):  # the first ones open connections, load the index and have statements prepared
            before = proxy.questions
            header, _ = caller.retrieve(banks=["v"], reader_digest="")
            assert {chunk.chunk_id for chunk in header.chunks} == written
            asked.append(proxy.questions - before)
        assert min(asked) == 1
        caller.channel.close()


def test_calls_that_ask_no_database_are_answered_while_one_is_silent(
    place: Mapping[str, Any], proxy: StallingProxy
) -> None:
    with LocalServer(**{**place, "data": proxy.url, "durability": "os"}) as server:
        caller = Caller(server.address)
        caller.create("v", layers=[])
        caller.add(bank="v", layers=[])
        proxy.stall()
        try:
            chunk, _ = caller.chunk(layers=[])
            header = pb.ChunkHeader(bank="v", embedder_digest=EMBEDDER, chunk=chunk)
            acks = caller.stub.WriteChunks(iter([pb.WriteChunksRequest(header=header)]))
            info = caller.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=SOON_S)
            health = health_pb2_grpc.HealthStub(caller.channel)
            health.Check(health_pb2.HealthCheckRequest(), timeout=SOON_S)
        finally:
            proxy.go_on()
        assert info.store_id
        assert [ack.chunk_id for ack in acks] == [max(caller.ids("v"))]
        caller.channel.close()
