"""Connections, calls and banks have a bound, and what is beyond it is told so and served later."""

import queue
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest

import kvbank
from kvbank.v1 import bank_pb2, service_pb2_grpc
from kvbank.v1 import service_pb2 as pb
from memory_service.api import file_descriptors
from memory_service.domain.limits import Limits
from tests.proof.once import reason_of

EXHAUSTED, UNAVAILABLE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE
# Each channel with this option has a connection of its own.
OWN = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture
def connected() -> Iterator[Callable[[str], Any]]:
    """Stubs, each over a connection of its own."""
    with ExitStack() as channels:

        def connect(address: str) -> Any:
            channel = channels.enter_context(grpc.insecure_channel(address, options=OWN))
            stub = service_pb2_grpc.MemoryServiceStub(channel)
            stub.close = channel.close
            return stub

        yield connect


def ask(stub: Any) -> pb.GetServerInfoResponse:
    return stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30)


def test_connections_are_bounded(serving: Any, connected: Callable[[str], Any]) -> None:
    serving(max_connections=2)
    address = serving.server.address
    first, second, third = (connected(address) for _ in range(3))
    ask(first)
    ask(second)
    with pytest.raises(grpc.RpcError) as refusal:
        ask(third)
    assert refusal.value.code() == UNAVAILABLE
    second.close()
    third.GetServerInfo(pb.GetServerInfoRequest(), timeout=30, wait_for_ready=True)


def test_a_connection_that_ends_no_handshake_or_makes_no_call_is_closed(serving: Any) -> None:
    serving(limits=Limits(handshake_s=0.1))
    host, _, port = serving.server.address.rpartition(":")
    with socket.create_connection((host, int(port)), 60) as silent:
        while silent.recv(65536):
            pass
    serving(limits=Limits(connection_idle_s=0.1))
    with grpc.insecure_channel(serving.server.address, options=OWN) as channel:
        ask(service_pb2_grpc.MemoryServiceStub(channel))
        idle = threading.Event()
        channel.subscribe(lambda state: state is grpc.ChannelConnectivity.IDLE and idle.set())
        assert idle.wait(60)
        ask(service_pb2_grpc.MemoryServiceStub(channel))  # over another connection


def test_the_metadata_of_a_call_are_bounded(serving: Any, connected: Callable[[str], Any]) -> None:
    serving()
    stub = connected(serving.server.address)
    stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=[("x-a", "a" * 12_000)])
    with pytest.raises(grpc.RpcError) as refusal:
        stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=[("x-a", "a" * 17_000)])
    assert refusal.value.code() == EXHAUSTED
    ask(stub)


def test_calls_are_bounded_and_the_sdk_asks_again(serving: Any, connected: Callable[[str], Any]) -> None:
    serving(max_calls=4)
    address = serving.server.address
    requests: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(4)]
    streams = []
    for each in requests:
        stub = connected(address)
        ask(stub)
        streams.append(stub.WriteChunks(iter(each.get, None)))
    # The patience with a server that was never reached is over after one attempt, however long that took.
    with kvbank.connect(address, first_contact=1e-6) as client:
        with pytest.raises(kvbank.Unavailable, match="too many calls"):
            client.server_info()
        streams[0].cancel()
        assert client.server_info(timeout=30).store_id
    for each in requests:
        each.put(None)


@contextmanager
def without_requests(address: str, count: int, **options: Any) -> Iterator["queue.SimpleQueue[Any]"]:
    """Make calls that have one request, over one connection, and send none; give where those are put that have
    ended."""
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    nothing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with grpc.insecure_channel(address, options=OWN) as channel:
        calls = (
            channel.stream_unary("/kvbank.v1.MemoryService/GetBank").future,
            channel.stream_stream("/kvbank.v1.MemoryService/Retrieve"),
        )
        for number in range(count):
            calls[number % 2](iter(nothing.get, None), **options).add_done_callback(ended.put)
        yield ended
        for _ in range(count):
            nothing.put(None)


def test_a_call_whose_request_does_not_come_is_ended(serving: Any) -> None:
    serving(max_calls=4, limits=Limits(request_s=0.2, request_late_s=0.1))
    address = serving.server.address
    with without_requests(address, 4) as ended:
        # Of one connection there is one call at most whose request is late.
        found = [ended.get(timeout=60) for _ in range(4)]
        assert {reason_of(call) for call in found} == {"NOT_SERVING"}
        told = sorted(call.details().partition(": ")[2] for call in found)
        assert told[3] == "its request has not come within 0.2 s"
        assert set(told[:3]) <= {told[3], "1 calls of the connection wait for their requests, the most of one"}
        with kvbank.connect(address) as client:
            assert client.server_info().store_id


def test_few_calls_of_a_connection_wait_for_their_requests(serving: Any) -> None:
    """Have a patience that does not end, so that only their number bounds them."""
    caller = serving(max_calls=16, limits=Limits(request_s=1e6, request_late_s=0.1))
    with without_requests(serving.server.address, 7) as ended:
        for _ in range(3):
            assert "4 calls of the connection wait" in ended.get(timeout=60).details()
        with without_requests(serving.server.address, 5) as others:
            assert "4 calls of the connection wait" in others.get(timeout=60).details()
            assert ask(caller.stub).store_id
        assert ended.empty()


def test_calls_without_their_request_count_for_their_tenant(serving: Any) -> None:
    serving(max_calls=8, limits=Limits(request_late_s=1e6))
    with kvbank.connect(serving.server.address) as owner:
        operator = owner.access.create_key("operator").secret
    with kvbank.connect(serving.server.address, api_key=operator) as client:
        client.access.create_tenant("red")
        red = client.access.create_key("read", tenant="red").secret
        metadata = [("api-key", red)]
        with without_requests(serving.server.address, 8, metadata=metadata) as ended:
            for _ in range(2):
                assert "6 calls under way" in ended.get(timeout=60).details()
            assert client.server_info().store_id


def test_descriptors_are_kept_for_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
        assert file_descriptors.for_connections(10_000) == 232
        assert file_descriptors.for_connections(100) == 100
        file_descriptors.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_banks_are_bounded_in_number_and_in_memory(serving: Any, refused: Any) -> None:
    caller = serving(max_banks=3)
    for name in "abc":
        caller.create(name)
    with refused("TOO_LARGE", EXHAUSTED):
        caller.create("d")
    # How many there are says how many other tenants have.
    assert dict(refused.info.metadata) == {"limit": "3"}
    assert caller.create("a").name == "a", "there is one already"
    caller.stub.DeleteBank(pb.DeleteBankRequest(name="b"))
    caller.create("d")


def test_what_banks_say_is_bounded_together(serving: Any, refused: Any) -> None:
    caller = serving(max_bank_bytes=40_000)
    caller.create("a", metadata={"note": "x" * 30_000})
    with refused("TOO_LARGE", EXHAUSTED):
        caller.create("b", metadata={"note": "x" * 10_000})
    caller.create("b")
    longer = bank_pb2.Bank(name="b", metadata={"note": "x" * 10_000})
    with refused("TOO_LARGE", EXHAUSTED):
        caller.stub.UpdateBank(pb.UpdateBankRequest(bank=longer, update_mask={"paths": ["metadata"]}))
    shorter = bank_pb2.Bank(name="a")
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=shorter, update_mask={"paths": ["metadata"]}))
    caller.stub.UpdateBank(pb.UpdateBankRequest(bank=longer, update_mask={"paths": ["metadata"]}))


def test_what_the_banks_of_one_tenant_say_counts_for_all_unless_a_quota_bounds_them(serving: Any) -> None:
    """Let a tenant take all of `max_bank_bytes`: another one has no bank more then, but for a quota of banks."""
    serving(max_bank_bytes=40_000)
    spec, long = kvbank.EmbeddingSpec("e", 4), {"note": "x" * 19_000}
    address = serving.server.address
    with kvbank.connect(address) as owner:
        operator = owner.access.create_key("operator").secret
    with kvbank.connect(address, api_key=operator) as client, ExitStack() as stack:
        tenants = {}
        for name in ("greedy", "other"):
            client.access.create_tenant(name)
            key = client.access.create_key("admin", tenant=name).secret
            tenants[name] = stack.enter_context(kvbank.connect(address, api_key=key))
        for bank in "ab":
            tenants["greedy"].create_bank(bank, kv=None, embedding=spec, metadata=long)
        with pytest.raises(kvbank.TooLarge) as refusal:
            tenants["other"].create_bank("a", kv=None, embedding=spec, metadata=long)
        # What others have is not told.
        assert refusal.value.metadata == {"limit": "40000"}
        tenants["greedy"].delete_bank("a")
        client.access.set_tenant_quota("greedy", kvbank.TenantQuota(banks=1))
        with pytest.raises(kvbank.QuotaExceeded):
            tenants["greedy"].create_bank("a", kv=None, embedding=spec, metadata=long)
        tenants["other"].create_bank("a", kv=None, embedding=spec, metadata=long)


def test_stats_of_all_banks_come_in_pages(serving: Any) -> None:
    caller = serving()
    names = [f"bank {number:03}" for number in range(120)]
    for name in names:
        caller.create(name, metadata={"note": "x" * 30_000})
    with kvbank.connect(serving.server.address) as client:
        for asked, expected in (((), names), ([*names, names[0]], names)):
            found = client.stats(asked)
            assert [each.bank.name for each in found.banks] == expected
            assert len({(each.name, *each.labels.items()) for each in found.samples}) > 100
    first = caller.stub.GetStats(pb.GetStatsRequest(page_size=1000))
    assert 0 < len(first.banks) < len(names)
    second = caller.stub.GetStats(pb.GetStatsRequest(page_size=1000, page_token=first.next_page_token))
    assert [each.bank.name for each in (*first.banks, *second.banks)] == names[: len(first.banks) + len(second.banks)]
