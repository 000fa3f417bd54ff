"""Clients over TLS, and with metadata of their own."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from tests.support import command
from tests.support.certificates import Authority, chain


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "_CA", "_CLIENT_CERT", "_CLIENT_KEY", "_SERVER_NAME"):
        monkeypatch.delenv(f"KVBANK_TLS{name}", raising=False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with LocalServer(tmp_path_factory.mktemp("tls-data"), **authority.settings()) as server:
        yield server


@pytest.fixture(scope="module")
def strict(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with LocalServer(tmp_path_factory.mktemp("strict"), **authority.settings(clients=True)) as server:
        yield server


def test_a_chunk_goes_there_and_back_over_tls(server: LocalServer, authority: Authority) -> None:
    kv = kvbank.KVSpec("reader", layers=[0], kv_heads=2, head_dim=64, dtype="fp32")
    keys = np.random.default_rng(1).normal(size=(2, 2048, 64)).astype(np.float32)
    new = kvbank.NewChunk([1, 0, 0, 0], {"k.0": keys, "v.0": keys, "pos.0": np.arange(2048, dtype=np.int32)})
    digests = {"reader_digest": "reader", "embedder_digest": "embedder"}
    with kvbank.connect(server.address, root_certificates=authority.file) as client:
        client.create_bank("b", kv=kv, embedding=kvbank.EmbeddingSpec("embedder", 4))
        client.write("b", new, **digests)
        [chunk] = client.retrieve("b", [1, 0, 0, 0], **digests).chunks.values()
        assert chunk.tensors is not None
        assert np.array_equal(chunk.tensors["k.0"], keys)


def test_authorities_are_a_file_or_bytes_or_a_variable(
    server: LocalServer, authority: Authority, ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for roots in (authority.file, str(authority.file), authority.pem):
        assert ask(server.address, root_certificates=roots)
        assert ask(server.address, tls=True, root_certificates=roots)
    monkeypatch.setenv("KVBANK_TLS_CA", str(authority.file))
    assert ask(server.address)
    pinged = command.run(command.application(), "ping", server.address)
    assert pinged.exit_code == 0, pinged.output
    # A folder and a unix socket have no TLS, whatever the variables say.
    assert ask(str(tmp_path / "folder"))
    with LocalServer(tmp_path / "data", f"unix:{tmp_path}/s") as local:
        assert ask(local.address)


def test_one_who_wants_no_tls_speaks_none(
    address: str, authority: Authority, ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBANK_TLS_CA", str(authority.file))
    assert ask(address, tls=False)
    monkeypatch.setenv("KVBANK_TLS", "0")
    assert ask(address)
    monkeypatch.setenv("KVBANK_TLS", "maybe")
    with pytest.raises(kvbank.InvalidArgument, match="KVBANK_TLS: expected 1 or 0"):
        ask(address)


def test_clients_show_a_certificate(
    strict: LocalServer, authority: Authority, other: Authority, ask: Callable[..., str], monkeypatch: Any
) -> None:
    issued = authority.issue("worker@example.org")
    file, key = authority.put(issued, "client")
    roots = authority.file
    assert ask(strict.address, root_certificates=roots, client_certificate=file, client_key=key)
    pem = {"client_certificate": chain(issued), "client_key": issued.private_key_pem.bytes()}
    assert ask(strict.address, root_certificates=roots, **pem)
    with pytest.raises(kvbank.Unavailable, match="does it want a client's certificate"):
        ask(strict.address, root_certificates=roots, first_contact=0.2)
    strange = other.issue("worker@example.org")
    pem = {"client_certificate": chain(strange), "client_key": strange.private_key_pem.bytes()}
    with pytest.raises(kvbank.Unavailable, match="does it want a client's certificate"):
        ask(strict.address, root_certificates=roots, first_contact=0.2, **pem)
    pem = {"client_certificate": chain(issued), "client_key": strange.private_key_pem.bytes()}
    with pytest.raises(kvbank.Untrusted, match="client's certificate, or it is not that of the key"):
        ask(strict.address, root_certificates=roots, **pem)
    for variable, value in (("CA", str(roots)), ("CLIENT_CERT", file), ("CLIENT_KEY", key)):
        monkeypatch.setenv(f"KVBANK_TLS_{variable}", value)
    assert ask(strict.address)


def test_what_does_not_fit_is_told_at_once(
    server: LocalServer, address: str, authority: Authority, other: Authority, ask: Callable[..., str], tmp_path: Path
) -> None:
    """Calls that have an hour end at once, because waiting would help none of them."""
    patient = {"timeout": 3600, "first_contact": 3600}
    with pytest.raises(kvbank.Untrusted, match="of no authority that the client trusts") as caught:
        ask(server.address, root_certificates=other.file, **patient)
    assert (caught.value.code, caught.value.retryable) == ("UNAVAILABLE", False)
    with pytest.raises(kvbank.Untrusted, match="of no authority that the client trusts"):
        ask(server.address, tls=True, **patient)
    with pytest.raises(kvbank.Untrusted, match="it speaks no TLS, which the client was told to speak"):
        ask(address, root_certificates=authority.file, **patient)
    with LocalServer(tmp_path / "data", **authority.settings("memory.internal")) as named:
        with pytest.raises(kvbank.Untrusted, match="of another name than the address"):
            ask(named.address, root_certificates=authority.file, **patient)
        assert ask(named.address, root_certificates=authority.file, server_name="memory.internal")


def test_a_client_without_tls_is_told_what_may_be_wrong(server: LocalServer, ask: Callable[..., str]) -> None:
    with pytest.raises(kvbank.Unavailable, match=r"does it speak TLS \(tls=True, or KVBANK_TLS=1\)"):
        ask(server.address, first_contact=0.2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"root_certificates": "/nothing/here"}, "root_certificates: cannot read '/nothing/here': No such file"),
        ({"root_certificates": b"x"}, "root_certificates: there is nothing in PEM"),
        ({"root_certificates": b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}, "or a damaged one"),
        ({"root_certificates": 5}, "root_certificates: expected the name of a file in PEM, or its bytes"),
        ({"client_key": b"-----BEGIN PRIVATE KEY-----"}, "client_certificate: a client's certificate and its key"),
        ({"client_certificate": b"-----BEGIN CERTIFICATE-----"}, "client_key: a client's certificate and its key"),
        (
            {"client_certificate": b"-----BEGIN C", "client_key": b"-----BEGIN ENCRYPTED PRIVATE KEY-----"},
            "client_key: expected a key without a password",
        ),
        ({"tls": 1}, "tls: expected True or False"),
        ({"tls": False, "server_name": "x"}, "server_name: it is of TLS, which tls=False switches off"),
        ({"server_name": "a b"}, "server_name: expected the name of a server"),
        ({"metadata": {"Upper": "x"}}, "metadata: expected names of a-z"),
        ({"metadata": {"grpc-timeout": "x"}}, "metadata: expected names of a-z"),
        ({"metadata": {"x-request-id": "x"}}, "metadata: expected names of a-z"),
        ({"metadata": {"a": "ü"}}, "metadata: the value of a has other characters"),
        ({"metadata": {"a": "x\ny: z"}}, "metadata: the value of a has other characters"),
        ({"metadata": {"a-bin": "text"}}, "metadata: expected bytes for a-bin"),
        ({"metadata": ["a"]}, "metadata: expected pairs of a name and a value"),
        ({"metadata": {"authorization": "x"}, "api_key": "k"}, "metadata: a key goes with every call already"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(kvbank.InvalidArgument) as caught:
        kvbank.connect("127.0.0.1:1", **options)
    assert text in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


def test_a_unix_socket_has_no_tls(tmp_path: Path) -> None:
    with pytest.raises(kvbank.InvalidArgument, match="a unix socket has no TLS"):
        kvbank.connect(f"unix:{tmp_path}/s", tls=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'root_certificate'"):
        kvbank.connect("127.0.0.1:1", root_certificate="x")  # type: ignore[call-arg]


def test_metadata_go_with_every_call(address: str, ask: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    with Listening() as relay:
        with pytest.raises(kvbank.Unavailable):
            ask(relay.address, metadata={"x-tenant-route": "blue-7", "x-blob-bin": b"\x00\xff"}, first_contact=0.3)
        assert b"x-tenant-route" in relay.received
        assert b"blue-7" in relay.received
    assert ask(address, metadata=[("x-tenant-route", "blue-7"), ("x-blob-bin", b"\x00\xff")])


class Listening:
    """A port that takes what the first connection sends, and answers what HTTP/2 needs before a call."""

    def __init__(self) -> None:
        self.received = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with ExitStack() as stack:
            connection = stack.enter_context(self._listener.accept()[0])
            connection.sendall(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")  # settings, empty
            while b"GetServerInfo" not in self.received and (more := connection.recv(65536)):
                self.received += more

    def __enter__(self) -> "Listening":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listener.close()


def test_each_of_several_addresses_has_its_own_name(authority: Authority, tmp_path: Path) -> None:
    with LocalServer(tmp_path / "data", **authority.settings("127.0.0.1")) as server:
        port = server.address.rpartition(":")[2]
        # The certificate is of 127.0.0.1 and of no localhost, where nothing listens.
        with kvbank.connect(f"localhost:1,127.0.0.1:{port}", root_certificates=authority.file) as client:
            assert client.server_info().store_id


def test_a_proxy_that_is_named_for_grpc_is_used(
    server: LocalServer, authority: Authority, ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"root_certificates": authority.file, "server_name": "127.0.0.1"}
    # An address that is not of the loopback by its form, and leads to this machine all the same.
    port = server.address.rpartition(":")[2]
    other = f"0.0.0.0:{port}"
    with Proxy(server.address) as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        assert ask(other, **options)
        assert proxy.asked == []
        monkeypatch.setenv("grpc_proxy", f"http://{proxy.address}")
        assert ask(other, **options)
        assert proxy.asked == [f"CONNECT {other} HTTP/1.1"]
        # Of several addresses only those of other machines are called through it.
        assert ask(f"localhost:{port},{other}", **options)
        assert len(proxy.asked) == 1
        assert ask(f"localhost:1,{other}", **options)
        assert proxy.asked[1:] == [f"CONNECT {other} HTTP/1.1"]


def test_no_proxy_is_between_processes_of_one_machine(
    tmp_path: Path, ask: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name a proxy in all ways that gRPC knows: it would see the key, which goes over the loopback as plain text."""
    with (
        Proxy("127.0.0.1:1") as proxy,
        LocalServer(tmp_path / "a") as loopback,
        LocalServer(tmp_path / "b", f"unix:{tmp_path}/s") as local,
    ):
        for name in ("grpc_proxy", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", proxy.address)
        monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8,::1/128")
        port = loopback.address.rpartition(":")[2]
        by_hand = (("grpc.enable_http_proxy", 1), ("grpc.http_proxy", f"http://{proxy.address}"))
        for target in (loopback.address, f"localhost:{port}", f"ipv4:127.0.0.1:{port}", local.address):
            for options in ((), by_hand):
                assert ask(target, api_key="kvb_of_nobody", options=options) if target != local.address else ask(target)
        assert proxy.asked == []


class Proxy:
    """A proxy of HTTP, which connects its callers to an address, wherever they want to go."""

    def __init__(self, address: str) -> None:
        self._there = address
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                caller = self._listener.accept()[0]
                head = b""
                while b"\r\n\r\n" not in head:
                    head += caller.recv(1000)
                self.asked.append(head.decode().splitlines()[0])
                host, _, port = self._there.rpartition(":")
                there = socket.create_connection((host, int(port)))
                caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                self._sockets += [caller, there]
                for source, sink in ((caller, there), (there, caller)):
                    threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in self._sockets:
            each.close()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
