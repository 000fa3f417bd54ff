"""TLS of all ports, and the renewal of its certificate while the service runs."""

import http.client
import math
import os
import queue
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from grpc_health.v1 import health_pb2, health_pb2_grpc

import kvbank
from kvbank.v1 import access_pb2, access_pb2_grpc, service_pb2_grpc
from memory_service.api import http_port
from memory_service.api.embedded import LocalServer
from memory_service.api.tls.clients import valid_until
from memory_service.domain.errors import StartError
from memory_service.domain.limits import Limits
from tests.support import command
from tests.support.certificates import Authority, chain
from tests.support.clocks import Hands
from tests.support.waiting import wait_until

OFTEN = Limits(certificate_s=0.02)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "tls")


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., LocalServer]]:
    with ExitStack() as stack:
        yield lambda settings, **more: stack.enter_context(
            LocalServer(tmp_path / "data", metrics_listen="127.0.0.1:0", **settings, **more)
        )


@contextmanager
def health(server: LocalServer, authority: Authority, issued: trustme.LeafCert | None = None) -> Iterator[Any]:
    """Call the health of a server over a connection of its own, with a client's certificate where one is given."""
    own = {"private_key": issued.private_key_pem.bytes(), "certificate_chain": chain(issued)} if issued else {}
    with grpc.secure_channel(server.address, grpc.ssl_channel_credentials(authority.pem, **own)) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def asked(stub: Any, **options: Any) -> int:
    return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=60, **options).status)


def shown(address: str, authority: Authority) -> bytes:
    """Return the certificate that a port shows to a new connection."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cadata=authority.pem.decode())
    with (
        socket.create_connection((host, int(port)), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        found = connection.getpeercert(binary_form=True)
    assert found is not None
    return found


def received(connection: socket.socket) -> bytes:
    """Return what a port sends until it closes the connection."""
    found = b""
    with suppress(ConnectionResetError):
        while more := connection.recv(1000):
            found += more
    return found


def der(issued: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


def fetch(server: LocalServer, authority: Authority, path: str, issued: trustme.LeafCert | None = None) -> Any:
    """Return status and body of a path over HTTPS."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if issued is not None:
        issued.configure_cert(context)
    connection = http.client.HTTPSConnection(server.metrics_address, timeout=60, context=context)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def test_all_ports_speak_tls_and_nothing_else(serve: Any, authority: Authority) -> None:
    server = serve(authority.settings())
    with health(server, authority) as stub:
        assert asked(stub) == health_pb2.HealthCheckResponse.SERVING
    assert fetch(server, authority, "/readyz") == (200, "ready\n")
    assert "kvbank_insecure 0.0" in fetch(server, authority, "/metrics")[1]
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError):
        asked(health_pb2_grpc.HealthStub(channel))
    host, _, port = server.metrics_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert b"HTTP" not in received(plain)


def test_a_unix_socket_stays_without_tls(tmp_path: Path, authority: Authority) -> None:
    with (
        LocalServer(tmp_path / "data", f"unix:{tmp_path}/s", **authority.settings()) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert asked(health_pb2_grpc.HealthStub(channel)) == health_pb2.HealthCheckResponse.SERVING


def test_clients_need_a_certificate_of_the_authority(serve: Any, authority: Authority, tmp_path: Path) -> None:
    """Over HTTP they need one for the figures alone: what asks for the health seldom has one."""
    server = serve(authority.settings(clients=True))
    other = Authority(tmp_path / "other")
    with health(server, authority, authority.issue("worker@example.org")) as stub:
        assert asked(stub) == health_pb2.HealthCheckResponse.SERVING
    for issued in (None, other.issue("worker@example.org")):
        with health(server, authority, issued) as stub, pytest.raises(grpc.RpcError):
            asked(stub)
    assert fetch(server, authority, "/readyz") == (200, "ready\n")
    assert fetch(server, authority, "/metrics")[0] == 403
    assert fetch(server, authority, "/metrics", authority.issue("prometheus"))[0] == 200
    with pytest.raises(OSError, match=r"alert|EOF|reset|closed"):
        fetch(server, authority, "/healthz", other.issue("prometheus"))


def test_a_renewed_certificate_is_served_to_callers_who_do_not_pause(serve: Any, authority: Authority) -> None:
    server = serve(authority.settings())
    over, failed, calls = threading.Event(), [], [0] * 32

    def call(number: int) -> None:
        try:
            while not over.is_set():
                with health(server, authority) as stub:
                    for _ in range(5):
                        asked(stub)
                        calls[number] += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            issued = authority.issue("localhost", "127.0.0.1")
            authority.put(issued)
            before = list(calls)
            assert shown(server.address, authority) == shown(server.metrics_address, authority) == der(issued)
            wait_until(lambda: failed or all(now > then for now, then in zip(calls, before, strict=True)))  # noqa: B023
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failed == []


def test_authorities_of_clients_are_renewed_too(serve: Any, authority: Authority, tmp_path: Path) -> None:
    server = serve(authority.settings(clients=True))
    old, other = authority.issue("worker"), Authority(tmp_path / "other")
    authority.file.write_bytes(other.pem)
    with health(server, authority, other.issue("worker")) as stub:
        assert asked(stub) == health_pb2.HealthCheckResponse.SERVING
    with health(server, authority, old) as stub, pytest.raises(grpc.RpcError):
        asked(stub)
    assert fetch(server, authority, "/metrics", other.issue("prometheus"))[0] == 200
    with pytest.raises(OSError, match=r"alert|EOF|reset|closed"):
        fetch(server, authority, "/metrics", old)


def encrypted(issued: trustme.LeafCert) -> bytes:
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    kind, words = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    return key.private_bytes(serialization.Encoding.PEM, kind, words)


def of_kind(key: Any) -> bytes:
    kind, words = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return bytes(key.private_bytes(serialization.Encoding.PEM, kind, words))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


UNFIT: dict[str, tuple[str, Callable[[Authority, Path, Path], object]]] = {
    "no certificate": ("cannot read .*server.pem: No such file", lambda _, pem, key: pem.unlink()),
    "no key": ("cannot read .*server.key: No such file", lambda _, pem, key: key.unlink()),
    "half a certificate": ("server.pem has no certificate in PEM, or a damaged one", lambda _, pem, key: half(pem)),
    "half a key": ("server.key has no private key in PEM, or a damaged one", lambda _, pem, key: half(key)),
    "nothing": ("server.pem has no certificate in PEM", lambda _, pem, key: pem.write_bytes(b"")),
    "another key": (
        "server.key is not the key of .*server.pem",
        lambda authority, pem, key: key.write_bytes(authority.issue("localhost").private_key_pem.bytes()),
    ),
    "an encrypted key": (
        "server.key is encrypted; the service takes a key without a password",
        lambda authority, pem, key: key.write_bytes(encrypted(authority.issue("localhost"))),
    ),
    "a kind that gRPC cannot": (
        "server.key is neither RSA of 2048 bits or more, nor P-256 or P-384",
        lambda _, pem, key: key.write_bytes(of_kind(ed25519.Ed25519PrivateKey.generate())),
    ),
    "a curve that gRPC cannot": (
        "server.key is neither",
        lambda _, pem, key: key.write_bytes(of_kind(ec.generate_private_key(ec.SECP521R1()))),
    ),
    "an expired one": (
        r"server.pem has expired, on \d{4}-\d\d-\d\d",
        lambda authority, pem, key: authority.put(authority.issue("localhost", days=-1)),
    ),
    "one of the future": (
        "server.pem is not valid before 2",
        lambda authority, pem, key: authority.put(authority.issue("localhost", days=9, from_days=2)),
    ),
}


@pytest.mark.parametrize("harm", UNFIT)
def test_files_that_cannot_be_served_end_the_start_in_one_line(serve: Any, authority: Authority, harm: str) -> None:
    settings = authority.settings()
    said, do = UNFIT[harm]
    do(authority, Path(settings["tls_cert"]), Path(settings["tls_key"]))
    with pytest.raises(StartError, match=f"^no TLS: .*{said}") as caught:
        serve(settings)
    assert "\n" not in str(caught.value)
    assert "PRIVATE" not in str(caught.value)


@pytest.mark.parametrize("harm", UNFIT)
def test_files_that_cannot_be_served_leave_the_old_ones_in_service(
    serve: Any, authority: Authority, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = authority.settings()
    server = serve(settings, limits=OFTEN)
    pem, key = Path(settings["tls_cert"]), Path(settings["tls_key"])
    before = shown(server.address, authority)
    good = pem.read_bytes(), key.read_bytes()
    said, do = UNFIT[harm]
    do(authority, pem, key)
    wait_until(lambda: "tls: " in fetch(server, authority, "/readyz")[1])
    for _ in range(3):
        assert shown(server.address, authority) == shown(server.metrics_address, authority) == before
    status, body = fetch(server, authority, "/readyz")
    assert (status, body.count("the certificate before is served on")) == (200, 1)
    assert re.search(said, body)
    assert sum("the certificate before is served on" in record.message for record in caplog.records) == 1
    pem.write_bytes(good[0])
    key.write_bytes(good[1])
    wait_until(lambda: fetch(server, authority, "/readyz") == (200, "ready\n"))
    issued = authority.issue("localhost", "127.0.0.1")
    authority.put(issued)
    assert shown(server.address, authority) == der(issued)


def test_the_end_of_a_certificate_is_told_before_it_comes(
    serve: Any, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(authority.settings(days=40), limits=OFTEN)
    assert fetch(server, authority, "/readyz")[1] == "ready\n"

    def left() -> float:
        lines = fetch(server, authority, "/metrics")[1].splitlines()
        [line] = [line for line in lines if line.startswith("kvbank_tls_expiry_seconds")]
        return float(line.split()[1]) / 86400

    assert 39 < left() < 40
    for days, said in ((25, "expires in 24 days"), (6, "expires in 5 days"), (0.5, "expires in less than a day")):
        authority.put(authority.issue("localhost", "127.0.0.1", days=days))
        wait_until(lambda: said in fetch(server, authority, "/readyz")[1])  # noqa: B023
        assert fetch(server, authority, "/readyz")[0] == 200
        assert days - 0.1 < left() < days
        assert sum(said in record.message for record in caplog.records) == 1
    authority.put(authority.issue("localhost", "127.0.0.1", days=300))
    wait_until(lambda: fetch(server, authority, "/readyz")[1] == "ready\n")


@pytest.mark.parametrize("where", [{"listen": "0.0.0.0:0"}, {"listen": "[::]:0"}, {"metrics_listen": "0.0.0.0:0"}])
def test_what_others_can_reach_needs_tls_and_callers_who_are_told_apart(
    tmp_path: Path, authority: Authority, where: dict[str, str]
) -> None:
    data, tls = tmp_path / "data", authority.settings(clients=True)
    with pytest.raises(StartError, match=r"can be reached by others.*--tls-cert, --tls-key.*--insecure"):
        LocalServer(data, **where)
    with pytest.raises(StartError, match=r"there is no key yet.*kvbank key create .*--memory .*/data.*--tls-client"):
        LocalServer(data, **where, **tls)
    with LocalServer(data, **where, **tls, tls_client=["worker=default:write"]):
        pass
    with kvbank.connect(data) as client:
        client.access.create_key(role="read")
    with LocalServer(data, **where, **tls):
        pass


def test_insecure_is_said_at_each_start_and_in_the_figures(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    for tls, said in (({}, ("without TLS", "without a key")), (authority.settings(), ("without a key",))):
        with LocalServer(tmp_path / "data", "0.0.0.0:0", insecure=True, **tls) as server:
            roots = authority.pem if tls else None
            local = server.address.replace("0.0.0.0", "127.0.0.1")
            with kvbank.connect(local, root_certificates=roots) as client:
                figures = {sample.name: sample.value for sample in client.stats().samples}
                assert figures["kvbank_insecure"] == 1
                shown = command.run(command.application(), "stats", "--memory", local).stdout if not tls else "insecure"
                assert "insecure" in shown
        found = [record for record in caplog.records if record.message.startswith("--insecure: others can reach")]
        caplog.clear()
        assert [record.levelname for record in found] == ["WARNING"] * len(said)
        assert all(words in record.message for words, record in zip(said, found, strict=True))


def test_a_certificate_says_who_calls(serve: Any, authority: Authority) -> None:
    clients = [
        "reader.example.org=default:read",
        "10.0.0.9=default:write",
        "watch@x.org=default:operator",
    ]
    server = serve(authority.settings(clients=True), tls_client=clients)

    def who(*names: str, **options: Any) -> kvbank.Identity:
        certificate = authority.issue(*names)
        own = {"client_certificate": chain(certificate), "client_key": certificate.private_key_pem.bytes()}
        with kvbank.connect(server.address, root_certificates=authority.pem, **own, **options) as client:
            return client.access.whoami()

    reader = who("reader.example.org")
    assert (reader.tenant, reader.roles) == ("default", ("read",))
    assert who("10.0.0.9").roles == ("write",)
    assert who("other.example.org", "reader.example.org").roles == ("read",)
    for names in (["other.example.org"], ["x.reader.example.org"]):
        with pytest.raises(kvbank.Unauthenticated):
            who(*names)
    operator = authority.issue("watch@x.org")
    own = {"client_certificate": chain(operator), "client_key": operator.private_key_pem.bytes()}
    with kvbank.connect(server.address, root_certificates=authority.pem, **own) as client:
        key = client.access.create_key(role="operator").secret
        with pytest.raises(kvbank.PermissionDenied):
            list(client.list_banks())
    # A key counts before the certificate.
    assert who("reader.example.org", api_key=key).roles == ("operator",)
    with pytest.raises(kvbank.Unauthenticated):
        who("reader.example.org", api_key="kvb_wrong")


def test_the_tenant_of_a_certificate_must_be_there_and_has_its_quota(serve: Any, authority: Authority) -> None:
    clients = ["worker=blue:write", "operator=default:operator"]
    server = serve(authority.settings(clients=True), tls_client=clients, clock=Hands().clock())
    with ExitStack() as stack:
        worker, operator = (
            stack.enter_context(
                kvbank.connect(
                    server.address,
                    root_certificates=authority.pem,
                    client_certificate=chain(issued),
                    client_key=issued.private_key_pem.bytes(),
                )
            )
            for issued in map(authority.issue, ("worker", "operator"))
        )
        with pytest.raises(kvbank.Unauthenticated):
            worker.access.whoami()
        operator.access.create_tenant("blue", quota=kvbank.TenantQuota(calls=1))
        assert worker.access.whoami().tenant == "blue"
        with pytest.raises(kvbank.RateExceeded):
            worker.access.whoami(timeout=0.1)
        operator.access.delete_tenant("blue")
        with pytest.raises(kvbank.Unauthenticated):
            worker.access.whoami()


@pytest.mark.parametrize("keyed", [False, True], ids=["by its name", "with a key"])
def test_a_connection_counts_no_longer_than_the_authority_of_its_certificate(
    serve: Any, authority: Authority, tmp_path: Path, keyed: bool
) -> None:
    """Take the authority of a client away while its call is under way, over a connection that stays open."""
    limits = Limits(certificate_s=0.02, call_ends_s=0.02, wrong_key_s=0.0)
    clients = ["operator=default:operator", *([] if keyed else ["worker=default:write"])]
    server = serve(authority.settings(clients=True), tls_client=clients, limits=limits)
    operator, worker = (credentials_of(authority, authority.issue(name)) for name in ("operator", "worker"))
    with grpc.secure_channel(server.address, operator) as channel:
        asked = access_pb2.CreateKeyRequest(role=access_pb2.ROLE_WRITE)
        key = access_pb2_grpc.AccessServiceStub(channel).CreateKey(asked, timeout=60).secret
    metadata = [("api-key", key)] if keyed else []
    with grpc.secure_channel(server.address, worker, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.MemoryServiceStub(channel)
        sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stream = stub.WriteChunks(iter(sent.get, None), metadata=metadata, timeout=60)
        who = access_pb2_grpc.AccessServiceStub(channel).WhoAmI
        # An authority more takes nothing away.
        authority.file.write_bytes(Authority(tmp_path / "other").pem + authority.pem)
        assert shown(server.address, authority)
        assert who(access_pb2.WhoAmIRequest(), metadata=metadata, timeout=60).tenant == "default"
        assert stream.is_active()
        authority.file.write_bytes(Authority(tmp_path / "another").pem)
        for call in (lambda: next(stream), lambda: who(access_pb2.WhoAmIRequest(), metadata=metadata, timeout=60)):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        sent.put(None)


def credentials_of(authority: Authority, issued: trustme.LeafCert) -> Any:
    return grpc.ssl_channel_credentials(authority.pem, issued.private_key_pem.bytes(), chain(issued))


def test_a_clients_certificate_ends_with_the_first_that_it_rests_on(tmp_path: Path) -> None:
    now, ours, others = time.time(), trustme.CA(), trustme.CA()
    between = ours.create_child_ca()
    leaf = between.issue_cert("worker", not_after=datetime.fromtimestamp(now + 100, UTC))
    certificate, signer = (pem.bytes() for pem in leaf.cert_chain_pems)
    both = others.cert_pem.bytes() + ours.cert_pem.bytes()
    for authorities in (ours.cert_pem.bytes(), both):
        for way in (certificate + signer, certificate + others.cert_pem.bytes() + signer):
            assert now + 98 < valid_until(way, authorities) < now + 101
    for why, (way, authorities) in {
        "of another authority": (certificate + signer, others.cert_pem.bytes()),
        "without the one between": (certificate, both),
        "the one between alone says nothing of it": (certificate + others.cert_pem.bytes(), both),
        "no authorities": (certificate + signer, b""),
        "nothing": (b"", both),
        "no certificate": (b"-----BEGIN CERTIFICATE-----", both),
    }.items():
        assert valid_until(way, authorities) == -math.inf, why


@pytest.mark.parametrize(
    ("clients", "text"),
    [
        (["x"], "'x' is not SAN=TENANT:ROLE with a role of read, write, admin, operator"),
        (["x=default"], "'x=default' is not"),
        (["x=default:owner"], "is not SAN=TENANT:ROLE"),
        (["=default:read"], "is not SAN=TENANT:ROLE"),
        (["x=:read"], "is not SAN=TENANT:ROLE"),
        (["x=default:read", "x=default:write"], "'x' is named twice"),
    ],
)
def test_clients_that_cannot_be_read(tmp_path: Path, authority: Authority, clients: list[str], text: str) -> None:
    with pytest.raises(StartError, match=f"^--tls-client: .*{text}"):
        LocalServer(tmp_path / "data", **authority.settings(clients=True), tls_client=clients)
    with pytest.raises(StartError, match="--tls-client needs --tls-client-ca"):
        LocalServer(tmp_path / "data", **authority.settings(), tls_client=clients)


def test_a_key_that_others_can_read_is_named(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    settings = authority.settings()
    for mode, lines in ((0o600, 0), (0o640, 0), (0o644, 1)):
        Path(settings["tls_key"]).chmod(mode)
        LocalServer(tmp_path / "data", **settings).stop()
        assert sum("can be read by other users" in record.message for record in caplog.records) == lines


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key"])
def test_files_that_need_another(tmp_path: Path, authority: Authority, missing: str) -> None:
    settings = authority.settings(clients=True)
    del settings[missing]
    with pytest.raises(StartError, match="a certificate has a key: give both"):
        LocalServer(tmp_path / "data", **settings)
    with pytest.raises(StartError, match="--tls-client-ca needs"):
        LocalServer(tmp_path / "data", tls_client_ca=str(authority.file))


def test_handshakes_that_never_end_are_left_and_few(serve: Any, authority: Authority) -> None:
    server = serve(authority.settings(), limits=Limits(http_patience_s=0.5))
    host, _, port = server.metrics_address.rpartition(":")
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            for _ in range(2 * http_port.MOST_CONNECTIONS)
        ]
        for number, connection in enumerate(connections):
            connection.sendall(b"\x16\x03\x01"[: number % 4])
        for connection in connections:
            received(connection)

    def alive() -> bool:
        with suppress(OSError, http.client.HTTPException):  # this caller has little time too
            return bool(fetch(server, authority, "/healthz") == (200, "alive\n"))
        return False

    wait_until(alive)


def hello(name: str) -> bytes:
    """Return how a client of HTTP/2 begins to ask for a server of this name."""
    context, sent = ssl.create_default_context(), ssl.MemoryBIO()
    context.set_alpn_protocols(["h2"])
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name).do_handshake()
    return sent.read()


def test_handshakes_that_fail_are_no_lines_in_the_log(tmp_path: Path, authority: Authority) -> None:
    """Callers without a key make as many as they like, and would choose by what the log grows."""
    files = authority.settings()
    options = ["--tls-cert", files["tls_cert"], "--tls-key", files["tls_key"], "--metrics-listen", "127.0.0.1:0"]
    command = [sys.executable, "-m", "memory_service", "--data", tmp_path / "d", "--listen", "127.0.0.1:0", *options]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        host, _, port = process.stdout.readline().rpartition(" on ")[2].strip().rpartition(":")
        hellos = (hello("other.example"), hello("other.example/a-line").replace(b"/", b"\n"))
        for sent in (b"GET / HTTP/1.1\r\n\r\n" * 10, b"\x16\x03\x01\x00\x05hello", bytes(500), b"", *hellos):
            with socket.create_connection((host, int(port)), timeout=60) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                received(connection)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1] == ""
