"""Whatever a server answers, the call works or ends in a ServiceError."""

import asyncio
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest

import kvbank
from kvbank.v1 import direct_pb2, service_pb2
from kvbank.wire import frames, local_socket
from tests.sdk.host import Host
from tests.sdk.relay import ACCESS, SERVICE, SESSIONS, Change, Relay, changes

Make = Callable[..., kvbank.NewChunk]
DIGESTS = {"reader_digest": "ab" * 32, "embedder_digest": "cd" * 32}
READER = {"reader_digest": "ab" * 32}
QUERY = np.eye(16, dtype=np.float32)[1]
KV, EMBEDDING = kvbank.KVSpec("ab" * 32, (1, 3), 2, 8), kvbank.EmbeddingSpec("cd" * 32, 16)
# A client of the server itself, by which a call finds something to change.
OWNER: list[kvbank.Client] = []
# A session with two turns.
TALK: list[kvbank.Session] = []
SAID = [kvbank.Turn([kvbank.Item("user", "ahoy")], [1, 2], usage={"a": 1}, metadata={"a": "b"}) for _ in range(2)]


def two_banks() -> tuple[kvbank.Bank, kvbank.Bank]:
    """Make two banks of vectors, for one to take the place of the other."""
    old, new = (OWNER[0].create_bank(uuid.uuid4().hex, kv=None, embedding=EMBEDDING) for _ in range(2))
    return old, new


def _tenant() -> str:
    """Return the name of a new tenant."""
    return OWNER[0].access.create_tenant(uuid.uuid4().hex).name


def _epoch() -> int:
    """Return the epoch of a lease that the session has now."""
    lease = OWNER[0].sessions.acquire(TALK[0].session_id, "test").lease
    assert lease is not None
    return lease.epoch


# How each method comes to be called, by a client of either kind; `new` is a chunk, `at` the id of one that is stored.
CALLS: Mapping[str, Callable[[Any, kvbank.NewChunk, int], Any]] = {
    "GetServerInfo": lambda client, new, at: client.server_info(),
    "CreateBank": lambda client, new, at: client.create_bank("b", kv=KV, embedding=EMBEDDING, exist_ok=True),
    "GetBank": lambda client, new, at: client.get_bank("b"),
    "ListBanks": lambda client, new, at: client.list_banks(),
    "UpdateBank": lambda client, new, at: client.update_bank("b", metadata={"a": "b"}),
    "ReplaceBank": lambda client, new, at: client.replace_bank(*two_banks()),
    "DeleteBank": lambda client, new, at: client.delete_bank("none", missing_ok=True),
    "WriteChunks": lambda client, new, at: client.write("b", new, timeout=0.2, **DIGESTS),
    "Retrieve": lambda client, new, at: client.retrieve("b", QUERY, top_k=2, **DIGESTS),
    "FetchChunks": lambda client, new, at: client.fetch("b", [at], **READER),
    "RetrieveFiles": lambda client, new, at: client.retrieve("b", QUERY, top_k=2, **DIGESTS),
    "FetchFiles": lambda client, new, at: client.fetch("b", [at], **READER),
    "GetChunk": lambda client, new, at: client.get_chunk("b", at, with_embedding=True),
    "ListChunks": lambda client, new, at: client.list_chunks("b", with_embedding=True),
    "UpdateChunk": lambda client, new, at: client.update_chunk("b", at, {"a": "b"}),
    "DeleteChunks": lambda client, new, at: client.delete_chunks("b", [999]),
    "PinChunks": lambda client, new, at: client.pin_chunks("b", [at]),
    "ExplainEviction": lambda client, new, at: client.explain_eviction("b", 10**9),
    "ListEvictions": lambda client, new, at: client.list_evictions("b"),
    "GetStats": lambda client, new, at: client.stats(),
    "Compact": lambda client, new, at: client.compact(),
    "WhoAmI": lambda client, new, at: client.access.whoami(),
    "CreateKey": lambda client, new, at: client.access.create_key("read", banks=["team-*"], ttl=timedelta(days=1)),
    "ListKeys": lambda client, new, at: client.access.list_keys(),
    "RevokeKey": lambda client, new, at: client.access.revoke_key(OWNER[0].access.create_key("read").key.key_id),
    "RotateKey": lambda client, new, at: client.access.rotate_key(OWNER[0].access.create_key("read").key.key_id),
    "CreateTenant": lambda client, new, at: client.access.create_tenant(uuid.uuid4().hex),
    "ListTenants": lambda client, new, at: client.access.list_tenants(),
    "SetTenantQuota": lambda client, new, at: client.access.set_tenant_quota("default", None),
    "CreateSession": lambda client, new, at: client.sessions.create(metadata={"a": "b"}),
    "GetSession": lambda client, new, at: client.sessions.get(name="talk"),
    "ListSessions": lambda client, new, at: client.sessions.list(),
    "UpdateSession": lambda client, new, at: client.sessions.update(TALK[0].session_id, reads=["b"]),
    "ForkSession": lambda client, new, at: client.sessions.fork(TALK[0].session_id, turn=1),
    "RewindSession": lambda client, new, at: client.sessions.rewind(TALK[0].session_id, 2, epoch=_epoch()),
    "AcquireLease": lambda client, new, at: client.sessions.acquire(TALK[0].session_id, "test"),
    "RenewLease": lambda client, new, at: client.sessions.renew(TALK[0].session_id, _epoch()),
    "ReleaseLease": lambda client, new, at: client.sessions.release(TALK[0].session_id, _epoch()),
    "AppendTurns": lambda client, new, at: client.sessions.append(TALK[0].session_id, SAID, epoch=_epoch(), follows=0),
    "ListTurns": lambda client, new, at: client.sessions.turns(TALK[0].session_id, token_ids=True),
    "GetTurn": lambda client, new, at: client.sessions.turn(SAID[0].key, token_ids=True),
    "KeepWindow": lambda client, new, at: client.sessions.keep_window(
        TALK[0].session_id, b"window", epoch=_epoch(), turn=2, stamp="s"
    ),
    "ReadWindow": lambda client, new, at: client.sessions.read_window(TALK[0].session_id),
    "Forget": lambda client, new, at: client.sessions.forget(OWNER[0].sessions.create().session_id),
    "DeleteTenant": lambda client, new, at: client.access.delete_tenant(_tenant()),
}
# Answered where server and client share a machine, and over a unix socket alone.
FILES = ("RetrieveFiles", "FetchFiles")
METHODS = [*SERVICE.methods, *ACCESS.methods, *SESSIONS.methods]
_EVERY = [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(31, id="some")]
_PAGES_AT_MOST = 100
# A google.rpc.Status whose detail says that it is an ErrorInfo, and is none.
_BAD_DETAILS = b"\x08\x05\x1a\x30\x0a\x28type.googleapis.com/google.rpc.ErrorInfo\x12\x04\xff\xff\xff\xff"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Give one server for all tests, with nothing that answers on the socket of direct calls."""
    host = Host(tmp_path_factory.mktemp("host") / "data", KV, EMBEDDING, DIGESTS)
    host.client.update_bank("b", capacity=kvbank.Capacity(chunks=10**5), quota=kvbank.Quota(chunks=10**6))
    (host.data / "direct.sock").rename(host.data / "real.sock")
    OWNER[:] = [host.client]
    TALK[:] = [host.client.sessions.create(name="talk", settings={"a": "b"}, metadata={"a": "b"})]
    sessions, epoch = host.client.sessions, _epoch()
    sessions.append(TALK[0].session_id, SAID, epoch=epoch, follows=0)
    sessions.keep_window(TALK[0].session_id, b"window", epoch=epoch, turn=2, stamp="s")
    yield host
    host.close()


@pytest.fixture
def stored(host: Host, make_chunk: Make) -> int:
    """Write a chunk with all that an answer can have, and return its id."""
    options: dict[str, Any] = {"metadata": {"a": "b", "n": 1}, "producer": kvbank.Producer("none", measured_loss=0.5)}
    (chunk_id,) = host.write(make_chunk(1, expiry=kvbank.Expiry(timedelta(days=1)), text="some text", **options))
    host.retrieve(QUERY)
    return chunk_id


@pytest.fixture
def relay(host: Host) -> Iterator[Relay]:
    with closing(Relay(host.address)) as relay:
        yield relay


def some(method: Any, every: int) -> Iterator[tuple[str, Change]]:
    for at, case in enumerate(changes(method)):
        if (at + method.index) % every == 0:
            yield case


def tried(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except kvbank.InvalidArgument as error:
        if error.metadata.get("field") not in ("page_token", "after"):  # the real server's, to a token that was changed
            raise AssertionError(f"{what}: the caller is blamed: {error}") from error
    except kvbank.ServiceError:
        return
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def used(chunks: Any) -> None:
    """Return some pages of a list, of which a server may say that there are more for ever."""
    if isinstance(chunks, Iterator):
        for _ in zip(range(_PAGES_AT_MOST), chunks, strict=False):
            pass


@pytest.mark.parametrize("every", _EVERY)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_answer_of_every_method(relay: Relay, stored: int, make_chunk: Make, method: Any, every: int) -> None:
    for name, change in some(method, every):
        relay.calls.clear()
        relay.change(method.name, change)
        with kvbank.connect(relay.unix if method.name in FILES else relay.address, timeout=5) as client:
            tried(lambda: used(CALLS[method.name](client, make_chunk(2), stored)), f"{method.name}: {name}")
        # A write whose acknowledgement is missing waits for its deadline, which is short: on a busy machine too short.
        assert method.name in relay.calls or method.name == "WriteChunks", f"{name}: {relay.calls}"


@pytest.mark.parametrize("every", _EVERY)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_answer_of_every_coroutine(relay: Relay, stored: int, make_chunk: Make, method: Any, every: int) -> None:
    async def call() -> None:
        address = relay.unix if method.name in FILES else relay.address
        async with kvbank.connect_async(address, timeout=5) as client:
            answer = CALLS[method.name](client, make_chunk(2), stored)
            if not hasattr(answer, "__aiter__"):
                await answer
                return
            pages = 0
            async for _ in answer:
                pages += 1
                if pages == _PAGES_AT_MOST:
                    break

    for name, change in some(method, every):
        relay.change(method.name, change)
        tried(lambda: asyncio.run(call()), f"{method.name}: {name}")


@pytest.mark.parametrize("every", _EVERY)
def test_a_server_that_says_odd_things_of_itself(relay: Relay, stored: int, make_chunk: Make, every: int) -> None:
    """Change what it says of its limits and its folder, which decides how chunks are written and read."""
    for name, change in some(SERVICE.methods_by_name["GetServerInfo"], every):
        relay.change("GetServerInfo", change)
        with kvbank.connect(relay.unix, timeout=5) as client:
            tried(lambda: client.fetch("b", [stored], **READER), f"fetch: {name}")
            tried(lambda: client.write("b", make_chunk(2), timeout=5, **DIGESTS), f"write: {name}")


class DirectRelay:
    """Stands at the socket for direct calls, and changes the bytes of what the real one answers."""

    def __init__(self, host: Host) -> None:
        self._real, self._path = str(host.data / "real.sock"), host.data / "direct.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self.change: Callable[[bytes], bytes] = lambda answer: answer
        self.calls = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._path.unlink()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, socket.socket(socket.AF_UNIX) as real, suppress(OSError):
                    request = local_socket.receive(connection)
                    real.connect(self._real)
                    local_socket.send(real, request or b"")
                    self.calls += 1
                    connection.sendall(self.change(local_socket.receive(real) or b""))


def failing(error: bytes, _: bytes) -> bytes:
    return whole(direct_pb2.DirectResponse(error=error).SerializeToString())


def whole(message: bytes) -> bytes:
    return len(message).to_bytes(4, "little") + message


@pytest.mark.parametrize("every", _EVERY)
@pytest.mark.parametrize("name", FILES)
def test_every_answer_over_the_plain_socket(host: Host, stored: int, name: str, every: int) -> None:
    field, other = ("retrieve", "fetch") if name == "RetrieveFiles" else ("fetch", "retrieve")
    with closing(DirectRelay(host)) as relay:

        def wrapped(change: Change) -> Callable[[bytes], bytes]:
            def changed(answer: bytes) -> bytes:
                response = direct_pb2.DirectResponse.FromString(answer)
                inner = next(iter(change([getattr(response, field).SerializeToString()])), b"")
                head = frames.prefix(direct_pb2.DirectResponse.DESCRIPTOR.fields_by_name[field].number, len(inner))
                return whole(head + inner)

            return changed

        cases = [(case, wrapped(change)) for case, change in some(SERVICE.methods_by_name[name], every)]
        cases += [
            ("nothing", lambda _: b""),
            ("a cut length", lambda _: b"\x07"),
            ("a cut message", lambda answer: whole(answer)[:-5]),
            ("a huge length", lambda answer: b"\xff\xff\xff\xff" + answer),
            ("two messages", lambda answer: whole(answer) * 2),
            ("no answer", lambda _: whole(b"")),
            ("no message", lambda _: whole(b"\xff\xff")),
            *((f"the error {error!r}", partial(failing, error)) for error in (b"\xff", b"\x08\x63", b"", _BAD_DETAILS)),
            (
                "another answer",
                lambda _: whole(direct_pb2.DirectResponse(error=b"", **{other: {}}).SerializeToString()),
            ),
        ]
        for case, change in cases:
            relay.change = change
            with kvbank.connect(host.address, timeout=5) as client:
                tried(lambda: CALLS[name](client, None, stored), f"{name}: {case}")  # type: ignore[arg-type]
        assert relay.calls >= len(cases)


@contextmanager
def answering(method: str, answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[str]:
    """Give the address of a server that has one method."""
    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {method: grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("details", [b"\xff\xff", _BAD_DETAILS, b"\x08\x63", b""])
def test_an_error_whose_details_are_none(details: bytes) -> None:
    """Send an error as a proxy may send it."""

    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata([("grpc-status-details-bin", details)])
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")
        return b""

    with answering("GetBank", refuse) as address, kvbank.connect(address) as client, pytest.raises(kvbank.NotFound):
        client.get_bank("b")


def test_a_deadline_holds_for_an_answer_that_comes_byte_by_byte(host: Host, stored: int) -> None:
    """Over the plain socket, whose own time limit is one for each piece."""
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(host.data / "direct.sock"))
        listener.listen()
        listener.settimeout(20)

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                local_socket.receive(connection)
                connection.sendall(b"\0\0\1\0")
                while not stop.wait(0.05):
                    connection.sendall(b"\0")

        thread = threading.Thread(target=drip)
        thread.start()
        with kvbank.connect(host.address) as client, pytest.raises(kvbank.DeadlineExceeded):
            client.fetch("b", [stored], timeout=0.5, **READER)
        stop.set()
        thread.join()
        (host.data / "direct.sock").unlink()


@pytest.mark.slow
def test_pages_without_end_have_one() -> None:
    """Statistics are kept until the last page; a server that always has another one must not fill the memory."""

    def more(request: bytes, _: grpc.ServicerContext) -> bytes:
        at = int(service_pb2.GetStatsRequest.FromString(request).page_token or 0)
        return service_pb2.GetStatsResponse(next_page_token=str(at + 1)).SerializeToString()

    with answering("GetStats", more) as address:
        with kvbank.connect(address) as client, pytest.raises(kvbank.Internal, match="pages") as caught:
            client.stats()
        assert caught.value.reason == "ODD_ANSWER"
