"""A tenant that calls more often than its quota says is held back, then refused, and costs other tenants no call."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import kvbank
from kvbank.v1 import access_pb2, access_pb2_grpc, service_pb2_grpc
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.limits import Limits
from memory_service.domain.tenants import TenantQuota
from tests.support.caller import Caller
from tests.support.clocks import SECOND, Hands
from tests.support.waiting import wait_until

RATE = 8
# What is over the rate is refused at once; or it is held back for as long as its caller waits.
AT_ONCE, FOR_LONG = Limits(held_back_s=0.0), Limits(held_back_s=1e6)
# Of the calls that the server takes, one tenant has at most so many held back.
MOST_CALLS, MOST_HELD = 16, 4
Metadata = Sequence[tuple[str, str]]


class Tenants:
    """A server by a clock that stands still, the tenant "red" with a quota of calls, and "blue" without one, each with
    a bank "b"."""

    def __init__(self, serving: Callable[..., Any], **options: Any) -> None:
        self.hands = Hands()
        self.caller: Caller = serving(clock=self.hands.clock(), **options)
        self.server = serving.server  # type: ignore[attr-defined]
        with kvbank.connect(self.server.address) as owner:
            self.operator = owner.access.create_key("operator").secret
        self.keys = {}
        with self.client(self.operator) as operator:
            for name in ("red", "blue"):
                operator.access.create_tenant(name)
                self.keys[name] = operator.access.create_key("admin", tenant=name).secret
        for name in self.keys:
            with self.client(self.keys[name]) as client:
                client.create_bank("b", kv=None, embedding=kvbank.EmbeddingSpec("embedder-a", 4))
        self.bound("red", RATE)

    def client(self, key: str) -> kvbank.Client:
        return kvbank.connect(self.server.address, api_key=key)

    def bound(self, name: str, calls: int | None) -> None:
        with self.client(self.operator) as operator:
            quota = kvbank.TenantQuota(calls=calls)
            assert operator.access.set_tenant_quota(name, quota).quota == quota

    def metadata(self, name: str) -> Metadata:
        return [("api-key", self.keys[name])]

    def asked(self, name: str, channel: grpc.Channel | None = None) -> str:
        """Make a call for a tenant, once; return its reason, "" for an answer."""
        return asked(channel or self.caller.channel, self.metadata(name))

    def accepted(self, name: str, calls: int) -> int:
        """Make some calls for a tenant; return how many were answered, where the others are RATE_EXCEEDED."""
        found = Counter(self.asked(name) for _ in range(calls))
        assert found.keys() <= {"", "RATE_EXCEEDED"}
        return found[""]

    def begun(self, name: str, timeout: float | None = None) -> Any:
        """Begin a call for a tenant; return its future. timeout: the seconds of its deadline, None for none."""
        stub = access_pb2_grpc.AccessServiceStub(self.caller.channel)
        return stub.WhoAmI.future(access_pb2.WhoAmIRequest(), metadata=self.metadata(name), timeout=timeout)

    def held_back(self, name: str, calls: int) -> list[Any]:
        """Begin some calls for a tenant, one after the other, and return their futures when all are held back."""
        before, futures = self.running(), []
        for number in range(calls):
            futures.append(self.begun(name))
            wait_until(lambda number=number: self.running() == before + number + 1)  # type: ignore[misc]
        return futures

    def running(self) -> float:
        return self.figure("kvbank_requests_running", method="WhoAmI")

    def figure(self, name: str, **labels: str) -> float:
        """Return a figure of the service, by its labels."""
        with self.client(self.operator) as operator:
            found = [each.value for each in operator.stats().samples if (each.name, each.labels) == (name, labels)]
        return found[0]

    def chunks(self, count: int, name: str = "red") -> Any:
        """Begin to write chunks for a tenant in one stream; return the call."""
        chunks = [self.caller.chunk(layers=()) for _ in range(count)]
        headers = [
            pb.WriteChunksRequest(header=pb.ChunkHeader(bank="b", embedder_digest="embedder-a", chunk=chunk))
            for chunk, _ in chunks
        ]
        stub = service_pb2_grpc.MemoryServiceStub(self.caller.channel)
        return stub.WriteChunks(iter(headers), metadata=self.metadata(name))


def asked(channel: grpc.Channel, metadata: Metadata) -> str:
    """Make a call, once; return its reason, "" for an answer."""
    try:
        access_pb2_grpc.AccessServiceStub(channel).WhoAmI(access_pb2.WhoAmIRequest(), metadata=metadata)
    except grpc.RpcError as error:
        return detail(error, error_details_pb2.ErrorInfo()).reason
    return ""


def detail(error: grpc.RpcError, message: Any) -> Any:
    """Return the detail of an error that is of this kind."""
    assert any(each.Unpack(message) for each in rpc_status.from_call(error).details), error
    return message


def reason(call: Any) -> str:
    """Return the reason with which a call ended that had an error."""
    return str(detail(call.exception(timeout=60), error_details_pb2.ErrorInfo()).reason)


@pytest.fixture
def tenants(serving: Callable[..., Any]) -> Tenants:
    return Tenants(serving, limits=AT_ONCE)


@pytest.fixture
def patient(serving: Callable[..., Any]) -> Tenants:
    """Tenants whose calls are held back, all of whose bucket is empty."""
    tenants = Tenants(serving, limits=FOR_LONG, max_calls=MOST_CALLS)
    assert tenants.accepted("red", RATE) == RATE
    return tenants


def test_a_tenant_is_answered_as_often_as_its_bucket_holds(tenants: Tenants) -> None:
    assert tenants.accepted("red", 3 * RATE) == RATE
    tenants.hands.go_on(SECOND // 2)
    assert tenants.accepted("red", 3 * RATE) == RATE // 2
    tenants.hands.go_on(SECOND // RATE - 1)
    assert tenants.accepted("red", 2) == 0
    tenants.hands.go_on(1)
    assert tenants.accepted("red", 2) == 1
    tenants.hands.go_on(3600 * SECOND)
    assert tenants.accepted("red", 3 * RATE) == RATE


def test_a_refusal_says_whose_quota_it_is_and_when_to_call_again(tenants: Tenants) -> None:
    tenants.accepted("red", RATE)
    stub = access_pb2_grpc.AccessServiceStub(tenants.caller.channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.WhoAmI(access_pb2.WhoAmIRequest(), metadata=tenants.metadata("red"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info = detail(caught.value, error_details_pb2.ErrorInfo())
    assert (info.reason, dict(info.metadata)) == ("RATE_EXCEEDED", {"subject": "tenant:red", "limit": str(RATE)})
    (violation,) = detail(caught.value, error_details_pb2.QuotaFailure()).violations
    assert violation.subject == "tenant:red"
    retry = detail(caught.value, error_details_pb2.RetryInfo()).retry_delay
    tenants.hands.go_on(retry.ToMicroseconds())
    assert tenants.accepted("red", 2) == 1


def test_a_noisy_tenant_has_its_own_calls_refused_and_no_other(tenants: Tenants) -> None:
    """Let a tenant call from 8 connections at ten times its quota, beside a quiet one."""
    address = tenants.server.address
    channels = [grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(8)]
    seconds, accepted, quiet = 3, 0, Counter[str]()
    with ThreadPoolExecutor(9) as threads:
        for _ in range(seconds):
            noisy = [threads.submit(tenants.asked, "red", channels[call % 8]) for call in range(10 * RATE)]
            quiet.update(threads.submit(tenants.asked, "blue").result() for _ in range(RATE))
            found = Counter(call.result() for call in noisy)
            assert found.keys() <= {"", "RATE_EXCEEDED"}
            assert found[""] == RATE
            accepted += found[""]
            tenants.hands.go_on(SECOND)
    for channel in channels:
        channel.close()
    assert quiet == {"": seconds * RATE}
    assert accepted == seconds * RATE
    assert tenants.figure("kvbank_errors_total", method="WhoAmI", reason="RATE_EXCEEDED") == seconds * 9 * RATE


# Calls that are held back


def test_a_call_over_the_rate_waits_until_there_is_one_again(patient: Tenants) -> None:
    first, second = patient.held_back("red", 2)
    assert patient.asked("blue") == ""
    assert not first.done()
    patient.hands.go_on(SECOND // RATE)
    first.result(timeout=60)
    assert not second.done()
    patient.hands.go_on(SECOND // RATE)
    second.result(timeout=60)
    patient.hands.go_on(SECOND)
    assert patient.accepted("red", RATE) == RATE


def test_few_calls_are_held_back_and_the_others_refused_with_their_time(patient: Tenants) -> None:
    held = patient.held_back("red", MOST_HELD)
    refused = patient.begun("red").exception(timeout=60)
    assert detail(refused, error_details_pb2.ErrorInfo()).reason == "RATE_EXCEEDED"
    retry = detail(refused, error_details_pb2.RetryInfo()).retry_delay
    assert retry.ToMicroseconds() == (MOST_HELD + 1) * SECOND // RATE
    assert patient.asked("blue") == ""
    assert not any(call.done() for call in held)


def test_a_caller_that_goes_leaves_its_place(patient: Tenants) -> None:
    held = patient.held_back("red", MOST_HELD)
    held[0].cancel()
    wait_until(lambda: patient.running() == MOST_HELD - 1)
    (late,) = patient.held_back("red", 1)
    patient.hands.go_on(MOST_HELD * SECOND // RATE)
    for call in (*held[1:], late):
        call.result(timeout=60)


def test_a_call_whose_deadline_is_sooner_is_refused_at_once(patient: Tenants) -> None:
    """Refuse a call that could be let in only after its deadline, though the clock stands still until then."""
    patient.bound("red", 1)
    patient.hands.go_on(SECOND)
    assert patient.asked("red") == ""
    held = patient.held_back("red", MOST_HELD - 1)
    # The next one is let in after MOST_HELD seconds.
    refused = patient.begun("red", timeout=1.9 * MOST_HELD).exception(timeout=60)
    assert detail(refused, error_details_pb2.ErrorInfo()).reason == "RATE_EXCEEDED"
    assert detail(refused, error_details_pb2.RetryInfo()).retry_delay.ToSeconds() == MOST_HELD
    assert not any(call.done() for call in held)


def test_a_stop_ends_what_is_held_back(patient: Tenants) -> None:
    held = patient.held_back("red", MOST_HELD)
    with ThreadPoolExecutor(1) as thread:
        stopping = thread.submit(patient.server.stop)
        assert {reason(call) for call in held} == {"NOT_SERVING"}
        assert {call.details() for call in held} == {"the service is shutting down"}
        stopping.result()


def test_a_call_is_held_back_before_its_message_is_read(tenants: Tenants) -> None:
    """Refuse a call over the rate whose message never comes."""
    assert tenants.accepted("red", RATE) == RATE
    never = threading.Event()
    method = tenants.caller.channel.stream_unary("/kvbank.v1.AccessService/WhoAmI")
    with pytest.raises(grpc.RpcError) as caught:
        method((never.wait() for _ in range(1)), metadata=tenants.metadata("red"))
    never.set()
    assert detail(caught.value, error_details_pb2.ErrorInfo()).reason == "RATE_EXCEEDED"


def test_chunks_and_calls_that_wait_take_turns(patient: Tenants) -> None:
    """Hold calls back, so that there is never half of a bucket: a stream goes on nevertheless."""
    patient.hands.go_on(SECOND // RATE)
    acks, came = patient.chunks(2), queue.Queue[Any]()
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(lambda: [came.put(ack) for ack in acks])
        wait_until(lambda: patient.figure("kvbank_requests_running", method="WriteChunks") == 1)
        held = patient.held_back("red", MOST_HELD)
        for _ in range(2):
            patient.hands.go_on(2 * SECOND // RATE)
            came.get(timeout=60)
        wait_until(lambda: sum(call.done() for call in held) == 2)
        reading.result()
    patient.hands.go_on(SECOND)
    for call in held:
        call.result(timeout=60)


# Chunks


def test_the_chunks_of_a_stream_wait_instead(tenants: Tenants) -> None:
    """Write more chunks than the bucket has: the stream goes on with the clock, and leaves half of the bucket to
    calls."""
    rate = 64
    tenants.bound("red", rate)
    tenants.hands.go_on(SECOND)
    acks, came = tenants.chunks(rate), queue.Queue[Any]()
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(lambda: [came.put(ack) for ack in acks])
        for _ in range(rate // 2 - 1):  # one call is the stream itself
            came.get(timeout=60)
        assert tenants.figure("kvbank_in_flight_bytes") == 0
        assert tenants.accepted("red", rate) == rate // 2
        tenants.hands.go_on(SECOND // 2)
        for _ in range(rate // 2 + 1):
            assert came.empty()
            tenants.hands.go_on(SECOND // rate)
            came.get(timeout=60)
        reading.result()


def test_a_stop_ends_the_wait_of_a_chunk(tenants: Tenants) -> None:
    acks = tenants.chunks(2 * RATE)
    for _ in range(RATE // 2 - 1):
        next(acks)
    with ThreadPoolExecutor(1) as thread:
        stopping = thread.submit(tenants.server.stop)
        with pytest.raises(grpc.RpcError) as caught:
            next(acks)
        stopping.result()
    assert detail(caught.value, error_details_pb2.ErrorInfo()).reason == "NOT_SERVING"
    assert caught.value.details() == "the service is shutting down"


# Quotas that change


def test_a_quota_that_changes_holds_at_once_where_it_was_changed(tenants: Tenants) -> None:
    assert tenants.accepted("red", 2 * RATE) == RATE
    tenants.bound("red", None)
    assert tenants.accepted("red", 2 * RATE) == 2 * RATE
    tenants.bound("red", 2)
    assert tenants.accepted("red", 2 * RATE) == 2
    tenants.bound("red", 4)  # gives no call by itself
    assert tenants.accepted("red", 2 * RATE) == 0
    tenants.hands.go_on(SECOND)
    assert tenants.accepted("red", 2 * RATE) == 4


@pytest.mark.parametrize(("believed", "expected"), [(1e6, RATE), (0.0, 3)], ids=["believed", "looked up"])
def test_a_quota_that_another_process_changes_is_as_fresh_as_the_key(
    serving: Callable[..., Any], believed: float, expected: int
) -> None:
    tenants = Tenants(serving, limits=Limits(key_believed_s=believed, held_back_s=0.0))
    assert tenants.asked("red") == ""
    tenants.server.banks.engine.access.set_tenant_quota("red", TenantQuota(calls=3))
    tenants.hands.go_on(SECOND)
    assert tenants.accepted("red", 2 * RATE) == expected


def test_the_owner_of_the_data_folder_has_no_rate(serving: Callable[..., Any], tmp_path: Any) -> None:
    caller = serving(listen=f"unix:{tmp_path}/s", clock=Hands().clock(), limits=AT_ONCE)
    with kvbank.connect(serving.server.address) as owner:  # type: ignore[attr-defined]
        owner.access.set_tenant_quota("default", kvbank.TenantQuota(calls=1))
        key = owner.access.create_key("read").secret
    assert [asked(caller.channel, []) for _ in range(10)] == 10 * [""]
    assert [asked(caller.channel, [("api-key", key)]) for _ in range(3)] == ["", "RATE_EXCEEDED", "RATE_EXCEEDED"]
