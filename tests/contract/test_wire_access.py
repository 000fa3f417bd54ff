"""Who may call what: the wire is walked by reflection, and every method, key and role is tried."""

import http
import http.client
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

import kvbank
from kvbank.v1 import access_pb2, access_pb2_grpc
from kvbank.v1 import service_pb2 as pb
from memory_service.domain.access import ApiKey
from memory_service.domain.limits import Limits
from tests.support.clocks import SECOND, Hands
from tests.support.waiting import wait_until

Metadata = Sequence[tuple[str, str]]
# What each role may call, written once more by hand.
READING = {
    *("GetServerInfo", "GetStats", "WhoAmI", "GetBank", "ListBanks", "Retrieve", "RetrieveFiles", "FetchChunks"),
    *("FetchFiles", "GetChunk", "ListChunks", "ExplainEviction", "ListEvictions", "ServerReflectionInfo"),
    *("GetSession", "ListSessions", "ListTurns", "GetTurn", "ReadWindow"),
}
WRITING = READING | {
    *("CreateBank", "WriteChunks", "UpdateChunk", "PinChunks", "DeleteChunks"),
    *("CreateSession", "UpdateSession", "ForkSession", "RewindSession", "AcquireLease", "RenewLease", "ReleaseLease"),
    *("AppendTurns", "KeepWindow", "Forget"),
}
KEYS = {"CreateKey", "ListKeys", "RevokeKey", "RotateKey"}
MAY = {
    "read": READING,
    "write": WRITING,
    "admin": WRITING | KEYS | {"UpdateBank", "DeleteBank", "ReplaceBank"},
    # Of what can be forgotten, an operator may tenants alone; see `test_what_each_role_may_forget`.
    "operator": {"GetServerInfo", "GetStats", "WhoAmI", "ServerReflectionInfo", "Compact", "Forget"}
    | KEYS
    | {"CreateTenant", "ListTenants", "SetTenantQuota", "DeleteTenant"},
}
# The health, which is for everyone.
OPEN = {"Check", "Watch", "List"}
WHO = "/kvbank.v1.AccessService/WhoAmI"
QUICK = Limits(wrong_key_s=0.0)


def bearer(key: str) -> Metadata:
    return [("authorization", f"Bearer {key}")]


class Wire:
    """A server with keys, and the methods that it tells of by reflection."""

    def __init__(self, address: str, channel: grpc.Channel) -> None:
        self.address, self.channel = address, channel
        with kvbank.connect(address) as owner:
            self.operator = owner.access.create_key("operator").secret
        with self.client(self.operator) as client:
            client.access.create_tenant("red")
            client.access.create_tenant("blue")
            self.keys = {
                role: client.access.create_key(role, tenant="red").secret for role in MAY if role != "operator"
            }
        self.keys["operator"] = self.operator

    @contextmanager
    def client(self, key: str | None, **options: Any) -> Iterator[kvbank.Client]:
        with kvbank.connect(self.address, api_key=key, **options) as client:
            yield client

    def methods(self) -> dict[str, Any]:
        """Return the descriptors of all methods of all services, by path."""
        stub = reflection_pb2_grpc.ServerReflectionStub(self.channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = stub.ServerReflectionInfo(asked, metadata=bearer(self.operator))
        found = [
            descriptor_pool.Default().FindServiceByName(each.name) for each in answer.list_services_response.service
        ]
        return {f"/{service.full_name}/{method.name}": method for service in found for method in service.methods}

    def outcome(self, path: str, method: Any, metadata: Metadata, request: bytes = b"") -> tuple[str, str, str]:
        """Make a call of a method; return the code of its end, its reason and its text."""
        kinds = {
            (False, False): self.channel.unary_unary,
            (False, True): self.channel.unary_stream,
            (True, True): self.channel.stream_stream,
        }
        call = kinds[method.client_streaming, method.server_streaming](path)
        asked = iter([]) if method.client_streaming else request
        try:
            answer = call(asked, metadata=metadata, timeout=60)
            if method.server_streaming:
                for _ in answer:
                    answer.cancel()
                    break
        except grpc.RpcError as error:
            return error.code().name, reason_of(error), error.details()
        return "OK", "", ""


def reason_of(error: grpc.RpcError) -> str:
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    return info.reason if status is not None and status.details[0].Unpack(info) else ""


@pytest.fixture
def wire(serving: Callable[..., Any]) -> Wire:
    caller = serving(reflection=True, limits=QUICK)
    return Wire(serving.server.address, caller.channel)  # type: ignore[attr-defined]


def wrong(keys: dict[str, str]) -> dict[str, Metadata]:
    """Return metadata that are refused, by what is wrong with them."""
    read, admin = keys["read"], keys["admin"]
    return {
        "no key": [],
        "of no form": bearer("secret"),
        "an empty one": bearer(""),
        "no scheme": [("authorization", read)],
        "another scheme": [("authorization", f"Basic {read}")],
        "unknown": bearer("kvb_00000000_" + "0" * 32),
        "another's secret": bearer(read[:13] + admin[13:]),
        "a letter more": bearer(f"{read}a"),
        "a letter less": bearer(read[:-1]),
        "in capitals": bearer(read.upper()),
        "as two words": bearer(f"{read} {read}"),
        "too long": bearer("k" * 6000),
        "twice": [*bearer(read), *bearer(read)],
        "two headers": [*bearer(read), ("api-key", read)],
        "two keys": [("api-key", read), ("api-key", admin)],
        "a pattern": bearer("kvb_%_*"),
    }


def test_no_method_but_health_answers_without_a_key(wire: Wire) -> None:
    methods = wire.methods()
    assert {method.containing_service.full_name for method in methods.values()} == {
        "kvbank.v1.MemoryService",
        "kvbank.v1.AccessService",
        "kvbank.v1.SessionService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    for path, method in methods.items():
        code, reason, _ = wire.outcome(path, method, [])
        if method.name in OPEN:
            assert code in ("OK", "UNIMPLEMENTED"), path
        else:
            assert (code, reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED"), path


def test_whatever_is_wrong_with_a_key_is_told_in_the_same_words(wire: Wire) -> None:
    told = {what: wire.outcome(WHO, who(wire), metadata) for what, metadata in wrong(wire.keys).items()}
    expected = ("UNAUTHENTICATED", "UNAUTHENTICATED", "the call needs a key that is valid here")
    assert told == dict.fromkeys(told, expected)
    for metadata in (bearer(wire.keys["read"]), [("authorization", f"bEARER  {wire.keys['read']}")]):
        assert wire.outcome(WHO, who(wire), metadata)[0] == "OK"
    assert wire.outcome(WHO, who(wire), [("api-key", wire.keys["read"])])[0] == "OK"


def who(wire: Wire) -> Any:
    return wire.methods()[WHO]


@pytest.mark.parametrize("role", MAY)
def test_a_role_calls_the_methods_of_its_table_and_no_other(wire: Wire, role: str) -> None:
    called = set()
    for path, method in wire.methods().items():
        code, reason, text = wire.outcome(path, method, bearer(wire.keys[role]))
        if (code, reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED"):
            assert method.name in text
        else:
            assert code != "UNAUTHENTICATED", path
            called.add(method.name)
    assert called - OPEN == MAY[role]


def test_a_method_that_there_is_not_tells_nothing(wire: Wire) -> None:
    for path in ("/kvbank.v1.MemoryService/Nothing", "/kvbank.v1.Other/GetBank"):
        code, _, text = wire.outcome(path, who(wire), [])
        assert (code, text) == ("UNIMPLEMENTED", "Method not found!")


# When a key is needed


def test_the_loopback_needs_a_key_as_soon_as_there_is_one(serving: Callable[..., Any]) -> None:
    serving(limits=QUICK)
    server = serving.server  # type: ignore[attr-defined]
    with kvbank.connect(server.address) as owner, kvbank.connect(server.address, api_key="of-another-service") as other:
        assert owner.access.whoami() == kvbank.Identity("default", ("admin", "operator"), ("*",), "")
        assert other.access.whoami().key_id == ""
        made = owner.access.create_key("admin")
        with pytest.raises(kvbank.Unauthenticated) as caught:
            owner.server_info()
        assert not caught.value.retryable
        with pytest.raises(kvbank.Unauthenticated):
            other.server_info()
    with kvbank.connect(server.address, api_key=made.secret) as admin:
        assert admin.access.whoami() == kvbank.Identity("default", ("admin",), ("*",), made.key.key_id)
        admin.access.revoke_key(made.key.key_id)
    serving(limits=QUICK)  # a store whose keys are all revoked does not open again
    with kvbank.connect(serving.server.address) as late, pytest.raises(kvbank.Unauthenticated):  # type: ignore[attr-defined]
        late.server_info()


def test_a_unix_socket_is_the_owners_who_may_act_by_a_key(serving: Callable[..., Any], tmp_path: Any) -> None:
    serving(listen=f"unix:{tmp_path}/s", limits=QUICK)
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner:
        made = owner.access.create_key("read")
        assert owner.access.whoami().key_id == ""
        assert len(list(owner.access.list_keys())) == 1
    with kvbank.connect(address, api_key=made.secret) as reader:
        assert reader.access.whoami().roles == ("read",)
        with pytest.raises(kvbank.PermissionDenied):
            reader.compact()
    with kvbank.connect(address, api_key=made.secret[:-1] + "!") as stranger, pytest.raises(kvbank.Unauthenticated):
        stranger.server_info()


def test_a_caller_with_a_key_shares_no_files(serving: Callable[..., Any], tmp_path: Any) -> None:
    caller = serving(listen=f"unix:{tmp_path}/s", same_host=True, limits=QUICK)
    caller.create()
    at = caller.add()
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner:
        key = owner.access.create_key("write").secret
    info = caller.stub.GetServerInfo(pb.GetServerInfoRequest(challenge=b"c" * 32), metadata=bearer(key))
    assert not info.HasField("same_host")
    own = caller.stub.GetServerInfo(pb.GetServerInfoRequest(challenge=b"c" * 32))
    # An engine whose objects are elsewhere shares files with nobody.
    assert own.HasField("same_host") is (serving.server.banks.engine.objects.staging is not None)  # type: ignore[attr-defined]
    for call, request in (
        (caller.stub.RetrieveFiles, pb.RetrieveFilesRequest()),
        (caller.stub.FetchFiles, pb.FetchFilesRequest()),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, metadata=bearer(key))
        assert reason_of(caught.value) == "NOT_SAME_HOST"
    with kvbank.connect(address, api_key=key) as client:
        found = client.fetch("b", [at], reader_digest="reader-a")
        assert found[0].tensors


# Keys that end


@contextmanager
def at_the_clock(serving: Callable[..., Any], hands: Hands, **limits: Any) -> Iterator[tuple[str, kvbank.Client]]:
    """Serve by a clock that a test moves; give the address and a client of an operator."""
    serving(clock=hands.clock(), limits=Limits(wrong_key_s=0.0, **limits))
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner:
        key = owner.access.create_key("operator").secret
    with kvbank.connect(address, api_key=key) as operator:
        yield address, operator


def refused(address: str, key: str | None) -> bool:
    with kvbank.connect(address, api_key=key) as client:
        try:
            client.server_info()
        except kvbank.Unauthenticated:
            return True
    return False


def test_a_key_that_is_believed_expires_to_the_moment(serving: Callable[..., Any]) -> None:
    hands = Hands()
    with at_the_clock(serving, hands, key_believed_s=1e6) as (address, operator):
        made = operator.access.create_key("read", ttl=timedelta(seconds=10))
        assert made.key.expire_time == made.key.create_time + timedelta(seconds=10)
        assert not refused(address, made.secret)
        hands.go_on(10 * SECOND - 1)
        assert not refused(address, made.secret)
        hands.go_on(1)
        assert refused(address, made.secret)


def test_a_revoked_key_is_refused_at_once_where_it_was_revoked(serving: Callable[..., Any]) -> None:
    with at_the_clock(serving, Hands(), key_believed_s=1e6) as (address, operator):
        made, other = operator.access.create_key("read"), operator.access.create_key("read")
        assert not refused(address, made.secret)
        revoked = operator.access.revoke_key(made.key.key_id)
        assert revoked.revoke_time is not None
        assert refused(address, made.secret)
        assert not refused(address, other.secret)
        again = operator.access.revoke_key(made.key.key_id)
        assert replace(again, last_use_time=revoked.last_use_time) == revoked  # its use is noted some time


@pytest.mark.parametrize(("believed", "expected"), [(1e6, False), (0.0, True)], ids=["believed", "looked up"])
def test_a_key_that_another_process_revokes_is_believed_for_as_long_as_it_says(
    serving: Callable[..., Any], believed: float, expected: bool
) -> None:
    hands = Hands()
    with at_the_clock(serving, hands, key_believed_s=believed) as (address, operator):
        made = operator.access.create_key("read")
        assert not refused(address, made.secret)
        engine = serving.server.banks.engine  # type: ignore[attr-defined]
        engine.access.revoke_key(made.key.key_id, hands.wall - SECOND)
        assert refused(address, made.secret) is expected


def test_a_first_key_that_another_process_makes_is_asked_for(serving: Callable[..., Any]) -> None:
    caller = serving(limits=Limits(call_ends_s=0.02))
    caller.create()
    key = ApiKey("k1", "default", "read", b"\x01" * 32, created=5)
    assert serving.server.banks.engine.access.add_key(key)  # type: ignore[attr-defined]
    wait_until(lambda: refused(serving.server.address, None))  # type: ignore[attr-defined]


def test_a_rotated_key_is_taken_until_its_users_have_changed_over(serving: Callable[..., Any]) -> None:
    hands = Hands()
    with at_the_clock(serving, hands, key_believed_s=1e6) as (address, operator):
        old = operator.access.create_key("write", banks=["team-*"], ttl=timedelta(seconds=100))
        hands.go_on(40 * SECOND)
        new = operator.access.rotate_key(old.key.key_id, overlap=timedelta(seconds=10))
        assert new.replaced is not None
        assert new.replaced.key_id == old.key.key_id
        assert (new.key.role, new.key.banks, new.key.tenant) == ("write", ("team-*",), "default")
        assert new.key.expire_time == new.key.create_time + timedelta(seconds=100)
        assert not refused(address, new.secret)
        assert not refused(address, old.secret)
        hands.go_on(10 * SECOND)
        assert refused(address, old.secret)
        assert not refused(address, new.secret)
        with pytest.raises(kvbank.InvalidArgument, match="was revoked or has expired"):
            operator.access.rotate_key(old.key.key_id)
        operator.access.rotate_key(new.key.key_id)
        assert refused(address, new.secret)


def test_of_rotations_at_once_one_makes_a_key(wire: Wire) -> None:
    with wire.client(wire.keys["admin"]) as admin:
        old = admin.access.create_key("read").key

        def rotated(_: int) -> bool:
            with suppress(kvbank.InvalidArgument):
                return bool(admin.access.rotate_key(old.key_id, overlap=timedelta(days=1)).secret)
            return False

        with ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(rotated, range(4))) == 1


def test_a_stream_whose_key_is_revoked_ends(serving: Callable[..., Any], frames: Callable[..., Any]) -> None:
    caller = serving(limits=Limits(key_looked_at_s=0.02))
    caller.create()
    with kvbank.connect(serving.server.address) as owner:  # type: ignore[attr-defined]
        operator, writer = owner.access.create_key("operator"), None
    with kvbank.connect(serving.server.address, api_key=operator.secret) as client:  # type: ignore[attr-defined]
        writer = client.access.create_key("write")
        asked: queue.Queue[Any] = queue.Queue()
        stream = caller.stub.WriteChunks(iter(asked.get, None), metadata=bearer(writer.secret))
        for frame in frames(*caller.chunk()):
            asked.put(frame)
        assert next(stream).chunk_id
        client.access.revoke_key(writer.key.key_id)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        asked.put(None)
        assert (caught.value.code(), reason_of(caught.value)) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


def test_the_last_use_of_a_key_is_noted_once_a_minute(serving: Callable[..., Any]) -> None:
    hands = Hands()
    with at_the_clock(serving, hands, key_believed_s=0.0) as (address, operator):
        made = operator.access.create_key("read")

        def used() -> Any:
            (found,) = [key for key in operator.access.list_keys() if key.key_id == made.key.key_id]
            return found.last_use_time

        assert used() is None
        assert not refused(address, made.secret)
        wait_until(lambda: used() is not None)
        first = used()
        hands.go_on(59 * SECOND)
        assert not refused(address, made.secret)
        assert used() == first
        hands.go_on(SECOND)
        assert not refused(address, made.secret)
        wait_until(lambda: used() == first + timedelta(seconds=60))


# What a caller sees


def test_the_banks_of_another_tenant_are_not_there(wire: Wire) -> None:
    spec = kvbank.EmbeddingSpec("e", 4)
    with wire.client(wire.operator) as operator:
        blue_key = operator.access.create_key("admin", tenant="blue").secret
    with wire.client(wire.keys["admin"]) as red, wire.client(blue_key) as blue:
        red.create_bank("theirs", kv=None, embedding=spec)
        for call in (blue.get_bank, blue.delete_bank, lambda name: list(blue.list_chunks(name))):
            told = []
            for name in ("theirs", "nobodys"):
                with pytest.raises(kvbank.BankNotFound) as caught:
                    call(name)
                told.append(str(caught.value).replace(name, "X"))
            assert told[0] == told[1]
        assert list(blue.list_banks()) == []
        assert blue.create_bank("theirs", kv=None, embedding=spec).usage.chunks == 0
        assert [bank.name for bank in red.list_banks()] == ["theirs"]


def naming(kind: Descriptor, name: str) -> Iterator[Message]:
    """Yield messages of a kind that each name a bank in one field of those that can."""
    for field in kind.fields:
        message = GetMessageClass(kind)()
        if field.name in ("bank", "name", "banks") and field.message_type is None:
            target = getattr(message, field.name)
            target.append(name) if field.is_repeated else setattr(message, field.name, name)
            yield message
        elif field.message_type is not None and not field.is_repeated:
            for inner in naming(field.message_type, name) if field.message_type.file.package == "kvbank.v1" else ():
                getattr(message, field.name).CopyFrom(inner)
                yield message


def test_a_key_for_some_banks_names_no_other_by_any_method(wire: Wire, frames: Callable[..., Any]) -> None:
    with wire.client(wire.operator) as operator:
        key = operator.access.create_key("admin", tenant="red", banks=["team-*", "own"]).secret
    tried = set()
    for path, method in wire.methods().items():
        if method.containing_service.name != "MemoryService" or method.client_streaming:
            continue
        for name, expected in (("other", True), ("team-x", False), ("own", False), ("own ", True), ("TEAM-x", True)):
            for message in naming(method.input_type, name):
                code, reason, text = wire.outcome(path, method, bearer(key), message.SerializeToString())
                denied = (code, reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
                assert denied is expected, f"{path}: {message} {code} {text}"
                tried.add(method.name)
    for names in (("own", "other"), ("other", "own")):
        method = "/kvbank.v1.MemoryService/ReplaceBank"
        message = pb.ReplaceBankRequest(name=names[0], by=names[1]).SerializeToString()
        _, reason, text = wire.outcome(method, wire.methods()[method], bearer(key), message)
        assert (reason, "'other'" in text) == ("PERMISSION_DENIED", True)
    # Sessions say which banks they have in other fields, and have tests of their own.
    of_banks = {method.name for method in pb.DESCRIPTOR.services_by_name["MemoryService"].methods}
    assert tried == (MAY["admin"] & of_banks) - {"GetServerInfo", "ListBanks", "WriteChunks"}
    stub = wire.channel.stream_stream(
        "/kvbank.v1.MemoryService/WriteChunks",
        request_serializer=pb.WriteChunksRequest.SerializeToString,
    )
    headers = (
        pb.WriteChunksRequest(header=pb.ChunkHeader(bank="other")),
        pb.WriteChunksRequest(headers=pb.ChunkHeaders(headers=[pb.ChunkHeader(bank="other")])),
    )
    for header in headers:
        with pytest.raises(grpc.RpcError) as caught:
            list(stub(iter([header]), metadata=bearer(key)))
        assert reason_of(caught.value) == "PERMISSION_DENIED"


def test_a_key_for_some_banks_is_shown_no_other(wire: Wire) -> None:
    spec = kvbank.EmbeddingSpec("e", 4)
    with wire.client(wire.keys["admin"]) as admin:
        for name in ("a", "own-1", "own-2", "z"):
            admin.create_bank(name, kv=None, embedding=spec)
        key = admin.access.create_key("read", banks=["own-*"]).secret
    with wire.client(key) as client:
        assert [bank.name for bank in client.list_banks()] == ["own-1", "own-2"]
        assert [found.bank.name for found in client.stats().banks] == ["own-1", "own-2"]
        with pytest.raises(kvbank.PermissionDenied) as caught:
            client.retrieve(["own-1", "a"], np.eye(4)[0], embedder_digest="e", payload=False)
        assert caught.value.metadata == {"bank": "a"}


# Who manages which key


def test_an_admin_manages_the_keys_of_its_tenant_alone(wire: Wire) -> None:
    with wire.client(wire.operator) as operator, wire.client(wire.keys["admin"]) as admin:
        in_red = operator.access.create_key("operator", tenant="red").key.key_id
        in_blue = operator.access.create_key("read", tenant="blue").key.key_id
        own = admin.access.create_key("read")
        assert own.key.tenant == "red"
        for forbidden in (
            lambda: admin.access.create_key("operator"),
            lambda: admin.access.create_key("read", tenant="blue"),
            lambda: admin.access.create_key("read", tenant="nobody"),
            lambda: list(admin.access.list_keys("blue")),
        ):
            with pytest.raises(kvbank.PermissionDenied):
                forbidden()
        told = set()
        for key_id in (in_red, in_blue, "nothing!"):
            for call in (admin.access.revoke_key, admin.access.rotate_key):
                with pytest.raises(kvbank.ApiKeyNotFound) as caught:
                    call(key_id)
                assert caught.value.reason == "API_KEY_NOT_FOUND"
                told.add(str(caught.value).replace(key_id, "X"))
        assert len(told) == 1
        seen = {key.key_id for key in admin.access.list_keys()}
        assert {own.key.key_id} < seen
        assert not seen & {in_red, in_blue}
        assert {in_red, in_blue} | seen <= {key.key_id for key in operator.access.list_keys()}
        assert [key.key_id for key in operator.access.list_keys("blue")] == [in_blue]


def test_an_admin_of_some_banks_makes_no_keys(wire: Wire) -> None:
    with wire.client(wire.keys["admin"]) as admin:
        some = admin.access.create_key("admin", banks=["team-*"])
        with wire.client(some.secret) as client:
            for call in (
                lambda: client.access.create_key("read", banks=["team-*"]),
                lambda: list(client.access.list_keys()),
            ):
                # Its role has the right; what it lacks is said.
                with pytest.raises(kvbank.PermissionDenied, match="an admin of some banks alone manages none"):
                    call()
            with pytest.raises(kvbank.ApiKeyNotFound):
                client.access.revoke_key(some.key.key_id)


def test_keys_come_in_pages_oldest_first(wire: Wire) -> None:
    with wire.client(wire.operator) as operator:
        patterns = [f"{number:03}" + "x" * 197 for number in range(100)]
        made = [operator.access.create_key("read", tenant="blue", banks=patterns).key for _ in range(120)]
        assert list(operator.access.list_keys("blue")) == made


def test_a_page_of_keys_begins_behind_the_one_before(wire: Wire) -> None:
    """Ask for pages of two, in which the keys of operators are left out."""
    with wire.client(wire.operator) as operator, wire.client(wire.keys["admin"]) as admin:
        for number in range(5):
            operator.access.create_key("operator" if number == 2 else "read", tenant="red")
        shown = [key.key_id for key in admin.access.list_keys()]
        stub, asked = access_pb2_grpc.AccessServiceStub(wire.channel), access_pb2.ListKeysRequest(page_size=2)
        found: list[str] = []
        while True:
            page = stub.ListKeys(asked, metadata=bearer(wire.keys["admin"]))
            found += [key.key_id for key in page.keys]
            assert len(page.keys) <= 2
            if not page.next_page_token:
                break
            asked.page_token = page.next_page_token
        assert found == shown
        assert len(found) == 3 + 4
    asked = access_pb2.ListKeysRequest(page_token=f"{2**63 - 1}.key")
    assert not stub.ListKeys(asked, metadata=bearer(wire.operator)).keys
    for token in ("x", "x.y", "9" * 30 + ".x", "-1.x", f"{2**63}.x", "\u0663.x"):
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListKeys(access_pb2.ListKeysRequest(page_token=token), metadata=bearer(wire.operator))
        assert reason_of(caught.value) == "INVALID_FIELD"


def test_a_tenant_has_so_many_keys_and_may_replace_them(serving: Callable[..., Any]) -> None:
    hands = Hands()
    with at_the_clock(serving, hands, tenant_keys=3) as (_, operator):
        create = operator.access.create_key
        for name in ("red", "blue"):
            operator.access.create_tenant(name)
        first, second = create("read", tenant="red"), create("read", tenant="red", ttl=timedelta(seconds=10))
        third = create("admin", tenant="red")
        for more in (
            lambda: create("read", tenant="red"),
            lambda: operator.access.rotate_key(first.key.key_id, overlap=timedelta(seconds=5)),
        ):
            with pytest.raises(kvbank.QuotaExceeded) as caught:
                more()
            assert (caught.value.subject, caught.value.metadata["unit"], caught.value.metadata["limit"]) == (
                *("tenant:red", "keys"),
                "3",
            )
        assert create("read", tenant="blue").secret
        replaced = operator.access.rotate_key(first.key.key_id).key
        operator.access.revoke_key(third.key.key_id)
        overlapping = operator.access.rotate_key(replaced.key_id, overlap=timedelta(seconds=5))
        with pytest.raises(kvbank.QuotaExceeded):
            create("read", tenant="red")
        hands.go_on(5 * SECOND)
        assert create("read", tenant="red").secret
        hands.go_on(5 * SECOND)
        assert create("read", tenant="red").secret
        shown = {key.key_id for key in operator.access.list_keys("red")}
        assert {made.key.key_id for made in (first, second, third, overlapping)} < shown


def test_what_is_no_key_is_not_made(wire: Wire) -> None:
    with wire.client(wire.operator) as operator:
        create = operator.access.create_key
        for call, field in (
            (lambda: create("owner"), "role"),  # type: ignore[arg-type]
            (lambda: create("read", banks=[]), "banks"),
            (lambda: create("read", banks=[""]), "banks"),
            (lambda: create("read", banks=["x" * 201]), "banks"),
            (lambda: create("read", banks=["x"] * 101), "banks"),
            (lambda: create("read", ttl=timedelta(0)), "ttl"),
            (lambda: create("read", ttl=timedelta(days=400_000)), "ttl"),
            (lambda: operator.access.rotate_key("x", overlap=timedelta(days=400_000)), "overlap"),
            (lambda: operator.access.create_tenant(" red"), "name"),
            (lambda: operator.access.delete_tenant("default"), "name"),
        ):
            with pytest.raises(kvbank.InvalidArgument) as caught:
                call()
            assert caught.value.metadata["field"] == field
        with pytest.raises(kvbank.TenantNotFound):
            create("read", tenant="nobody")


def test_an_operator_manages_tenants(wire: Wire) -> None:
    quota = kvbank.TenantQuota(banks=1, bytes=2**40)
    with wire.client(wire.operator) as operator:
        made = operator.access.create_tenant("green", quota=quota)
        assert (made.quota, made.usage) == (quota, kvbank.TenantUsage(0, 0, 0, 0))
        with pytest.raises(kvbank.AlreadyExists) as caught:
            operator.access.create_tenant("green")
        assert caught.value.reason == "TENANT_EXISTS"
        assert operator.access.set_tenant_quota("green", None).quota == kvbank.TenantQuota()
        key = operator.access.create_key("admin", tenant="green").secret
        with wire.client(key) as admin:
            admin.create_bank("b", kv=None, embedding=kvbank.EmbeddingSpec("e", 4))
            with pytest.raises(kvbank.FailedPrecondition) as refused_:
                operator.access.delete_tenant("green")
            assert refused_.value.reason == "TENANT_NOT_EMPTY"
            assert [tenant.name for tenant in operator.access.list_tenants()] == ["blue", "default", "green", "red"]
            assert operator.access.delete_tenant("green", force=True) == 1
            with pytest.raises(kvbank.Unauthenticated):
                admin.server_info()
        with pytest.raises(kvbank.TenantNotFound):
            operator.access.delete_tenant("green")


# Trying keys


# Turns of one host, and its calls that wait for one.
TURNS, WAITING = 3, 192


def guesses(
    address: str, count: int, opened: ExitStack, channel: grpc.Channel | None = None
) -> "tuple[list[Any], queue.Queue[Any], grpc.Channel]":
    """Make calls with a key that there is not, over one connection; return them, where each is put at its end, and the
    connection. channel: the connection; None for a new one."""
    # One connection has at most 256 calls under way.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = channel or opened.enter_context(grpc.insecure_channel(address, options))
    ask = channel.unary_unary("/kvbank.v1.MemoryService/GetServerInfo")
    answered: queue.Queue[Any] = queue.Queue()
    made = [ask.future(b"", metadata=bearer("kvb_00000000_" + "0" * 32)) for _ in range(count)]
    for call in made:
        opened.callback(call.cancel)
        call.add_done_callback(answered.put)
    return made, answered, channel


def test_who_tries_keys_waits_and_lets_others_pass(serving: Callable[..., Any]) -> None:
    """Guess with a pause that does not end: only what there is no room to wait for is answered."""
    serving(limits=Limits(wrong_key_s=1e6), insecure=True, metrics_listen="0.0.0.0:0")
    server = serving.server  # type: ignore[attr-defined]
    with kvbank.connect(server.address) as owner:
        key = owner.access.create_key("operator").secret
    with kvbank.connect(server.address, api_key=key) as client, ExitStack() as opened:
        unseen = client.access.create_key("operator").secret
        _, answered, _ = guesses(server.address, 250, opened)
        found = [answered.get() for _ in range(250 - WAITING - TURNS)]
        assert {(call.code(), reason_of(call)) for call in found} == {(grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")}
        assert client.server_info().store_id
        assert answered.empty()
        # Another host, whose key was not seen before.
        port = int(server.metrics_address.rpartition(":")[2])
        other = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=("127.0.0.2", 0))
        other.request("GET", "/metrics", headers={"api-key": unseen})
        assert other.getresponse().status == http.HTTPStatus.OK
        other.close()


def test_who_goes_before_the_answer_has_no_turn_sooner(serving: Callable[..., Any]) -> None:
    serving(limits=Limits(wrong_key_s=1e6))
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner, ExitStack() as opened:
        owner.access.create_key("operator")
        made, answered, channel = guesses(address, WAITING + TURNS + 1, opened)
        assert reason_of(answered.get()) == "NOT_SERVING"
        # All of them leave: those that wait give their places up, those whose keys are looked up keep their turns.
        for call in made:
            call.cancel()
        for _ in range(WAITING + TURNS):
            assert answered.get().cancelled()
        _, refused, _ = guesses(address, WAITING + 1, opened, channel)
        assert reason_of(refused.get(timeout=60)) == "NOT_SERVING"


def test_a_secret_is_in_no_file_and_no_log(
    serving: Callable[..., Any], data: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    serving(audit_log=str(tmp_path / "audit"), limits=QUICK)
    address = serving.server.address  # type: ignore[attr-defined]
    with kvbank.connect(address) as owner:
        made = owner.access.create_key("operator")
    with kvbank.connect(address, api_key=made.secret) as client:
        client.stats()
        with suppress(kvbank.ServiceError):
            client.get_bank("nothing")
    assert refused(address, made.secret[:-1])
    serving.stop()  # type: ignore[attr-defined]
    secret = made.secret[-32:-1]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
    assert secret not in caplog.text
    assert made.key.key_id in (tmp_path / "audit").read_text()


def test_of_a_caller_that_is_refused_no_message_is_read(wire: Wire) -> None:
    """Send no message at all, which a call with one answer else waits for."""
    for path, method in wire.methods().items():
        if method.name in OPEN:
            continue
        nothing: queue.Queue[Any] = queue.Queue()
        asked, options = iter(nothing.get, None), {"metadata": bearer("kvb_unknown"), "timeout": 60}
        ask = wire.channel.stream_stream(path) if method.server_streaming else wire.channel.stream_unary(path).future
        call = ask(asked, **options)
        with pytest.raises(grpc.RpcError) as caught:
            next(call) if method.server_streaming else call.result()
        nothing.put(None)
        assert reason_of(caught.value) == "UNAUTHENTICATED", path


def test_the_first_call_with_a_key_is_as_the_others(serving: Callable[..., Any]) -> None:
    """Believe no key, so that every call comes as the first one does."""
    caller = serving(limits=Limits(key_believed_s=0.0, wrong_key_s=0.0))
    caller.create()
    with kvbank.connect(serving.server.address) as owner:  # type: ignore[attr-defined]
        key = owner.access.create_key("admin").secret
    with kvbank.connect(serving.server.address, api_key=key) as client:  # type: ignore[attr-defined]
        new = kvbank.NewChunk(np.eye(4)[0], text="a text", tensors=tensors_of())
        at = client.write("b", new, reader_digest="reader-a", embedder_digest="embedder-a").chunk_id
        found = client.retrieve("b", np.eye(4)[0], reader_digest="reader-a", embedder_digest="embedder-a")
        assert found.chunks[at].tensors is not None
        assert client.get_chunk("b", at).text == "a text"
        assert client.delete_chunks("b", [at]) == 1
        with pytest.raises(kvbank.BankNotFound):
            client.get_bank("nothing")
    with pytest.raises(grpc.RpcError) as caught:
        caller.channel.stream_unary("/kvbank.v1.MemoryService/GetBank")(iter([]), metadata=bearer(key))
    assert reason_of(caught.value) == "INVALID_FIELD"


def tensors_of() -> dict[str, np.ndarray]:
    keys = np.ones((2, 3, 8), ml_dtypes.bfloat16)
    names = [f"{kind}.{layer}" for layer in (1, 3) for kind in ("k", "v")]
    return dict.fromkeys(names, keys) | {f"pos.{layer}": np.arange(3, dtype=np.int32) for layer in (1, 3)}
