"""The port of a worker: how many connections it takes, of one host and of all, and how long a request may take."""

import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from model_worker.http.metrics import Metrics
from model_worker.http.port import host_of
from model_worker.model import MemoryModel
from model_worker.serve.served import Bounds, Served
from tests.support.certificates import Authority
from tests.worker_http.conftest import MODEL, Running
from tests.worker_http.test_server import until

PATIENCE = 0.4
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
SLOW = {
    "a head that does not end": HEAD,
    "a body that does not come": HEAD + b"content-length: 100\r\n\r\n",
    "a body that does not end": HEAD + b"content-length: 100\r\n\r\n" + b" " * 99,
    "a piece that does not end": HEAD + b"transfer-encoding: chunked\r\n\r\n100\r\n   ",
}


@contextmanager
def running(*, tls: tuple[Path, Path] | None = None, own_only: bool = False, **bounds: Any) -> Iterator[Running]:
    """Have a worker whose model never comes."""
    ended = threading.Event()

    def load() -> MemoryModel:
        ended.wait()
        raise RuntimeError

    served = Served(MODEL, "127.0.0.1:1", bounds=Bounds(running=2, waiting=0, **bounds), own_only=own_only)
    worker = Running(served, load, tls=tls)
    try:
        until(lambda: worker.server.started)
        yield worker
    finally:
        worker.stop()
        ended.set()


@pytest.fixture(scope="module")
def hurried() -> Iterator[Running]:
    with running(patience=PATIENCE) as worker:
        yield worker


def opened(worker: Running, host: str = "127.0.0.1") -> socket.socket:
    """Return a connection from a host, any address of the loopback."""
    return socket.create_connection(("127.0.0.1", worker.port), timeout=60, source_address=(host, 0))


def rest(connection: socket.socket) -> bytes:
    """Return all that comes until the other side ends a connection."""
    found = b""
    while piece := connection.recv(65536):
        found += piece
    return found


def last_answer(connection: socket.socket) -> tuple[int, Any]:
    """Return status and error of the answer with which the other side ends a connection."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    document = json.loads(response.read())
    assert response.headers["connection"] == "close"
    assert connection.recv(1) == b""
    return response.status, document["error"]


def is_served(connection: socket.socket) -> bool:
    """Tell whether a connection gets an answer of the app."""
    connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    return b"HTTP/1.1 200" in connection.recv(1000)


def test_every_figure_stands_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/http.md").read_text()
    named = set(re.findall(r"`(kvbank_worker_\w+)`", page))
    figures = {each.name for each in Metrics(Served("m", Bounds())).registry.collect()}
    assert {name.removesuffix("_total") for name in named} == figures


def refused(worker: Running) -> dict[str, float]:
    """Return how many connections were ended by each bound, as /metrics tells it; nothing where this one is ended."""
    with opened(worker, "127.0.0.1") as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        found = re.findall(r'kvbank_worker_connections_refused_total{why="(\w+)"} (\S+)', rest(connection).decode())
    return {why: float(count) for why, count in found}


@pytest.mark.parametrize("begun", SLOW.values(), ids=SLOW)
def test_a_request_that_does_not_come_ends_its_connection(hurried: Running, begun: bytes) -> None:
    before = refused(hurried)["late"]
    with opened(hurried) as connection:
        connection.sendall(begun)
        status, error = last_answer(connection)
    assert refused(hurried)["late"] == before + 1
    assert (status, error["code"], error["type"]) == (408, "request_timeout", "invalid_request_error")
    assert "0.4 seconds" in error["message"]


def test_a_request_without_a_body_in_its_answer_wins_no_time(hurried: Running) -> None:
    for body, answer in (
        (b"content-length: 9\r\n\r\n", b" 408 "),
        (b"transfer-encoding: chunked\r\n\r\n?\r\n", b" 400 "),
    ):
        with opened(hurried) as connection:
            connection.sendall(b"HEAD /healthz HTTP/1.1\r\nhost: localhost\r\n" + body)
            found = rest(connection)
        assert answer in found
        assert found.endswith(b"\r\n\r\n")


def test_bytes_that_drip_win_no_time(hurried: Running) -> None:
    with opened(hurried) as connection:
        connection.settimeout(0.05)
        for letter in HEAD + b" " * 1000:
            connection.sendall(bytes([letter]))
            try:
                assert b" 408 " in connection.recv(1000)
                break
            except TimeoutError:
                continue
        else:
            pytest.fail("the connection is still open")


def test_a_request_behind_another_has_a_time_too(hurried: Running) -> None:
    with opened(hurried) as connection:
        assert is_served(connection)
        connection.sendall(b"GET /he")
        assert b" 408 " in rest(connection)


def test_who_says_nothing_is_told_nothing(hurried: Running) -> None:
    with opened(hurried) as connection:
        assert rest(connection) == b""


def test_a_body_that_nobody_waits_for_has_a_time_too() -> None:
    """Call a worker without keys by a false name: it answers before it reads the body."""
    with running(own_only=True, patience=PATIENCE) as worker, opened(worker) as connection:
        connection.sendall(HEAD.replace(b"localhost", b"elsewhere") + b"content-length: 100\r\n\r\n ")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, response.read()[:1]) == (421, b"{")
        connection.sendall(b" ")
        assert rest(connection) == b""


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no bound on what nobody takes")
def test_answers_that_nobody_takes_end_their_connection(hurried: Running) -> None:
    connections = hurried.server.server_state.connections
    with opened(hurried) as connection:
        assert is_served(connection)
        assert len(connections) == 1
        connection.settimeout(0.2)
        with suppress(TimeoutError, ConnectionError):
            while True:
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n")
        until(lambda: not connections)


def test_what_is_no_http_is_told_in_the_form_of_all_errors(hurried: Running) -> None:
    with opened(hurried) as connection:
        connection.sendall(b"this is no HTTP\r\n\r\n")
        status, error = last_answer(connection)
    assert (status, error["code"], error["message"]) == (400, "invalid_request", "the request is no HTTP")


def test_a_host_has_so_many_connections_and_leaves_room_for_others() -> None:
    with running() as worker, ExitStack() as stack:
        most = worker.served.bounds.connections
        assert most == 2 + 32
        idle = [stack.enter_context(opened(worker)) for _ in range(most)]
        with opened(worker) as over:
            status, error = last_answer(over)
        assert (status, error["code"]) == (503, "too_many_connections")
        others = [stack.enter_context(opened(worker, "127.0.0.2")) for _ in range(most)]
        assert is_served(others[-1])
        with opened(worker, "127.0.0.3") as over:  # of all hosts there are twice as many as of one
            assert last_answer(over)[0] == 503
        idle.pop().close()

        def again() -> bool:
            with opened(worker, "127.0.0.3") as other:
                return is_served(other)

        found: dict[str, float] = {}

        def told() -> bool:
            found.update(refused(worker))
            return bool(found)

        until(again)
        until(told)  # a connection that asks may be one too many itself
        assert found["host"] >= 1
        assert found["all"] >= 1
        assert found["late"] == 0


def test_a_handshake_has_a_time_and_is_one_of_the_connections(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = (Path(each) for each in authority.put(authority.issue("localhost")))
    context = ssl.create_default_context(cafile=authority.file)
    with running(tls=(certificate, key), patience=PATIENCE) as worker:
        with opened(worker) as silent:
            assert rest(silent) == b""
        with opened(worker) as plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
            assert is_served(connection)
            connection.sendall(HEAD)
            assert b" 408 " in rest(connection)
    with running(tls=(certificate, key)) as worker, ExitStack() as stack:
        for _ in range(worker.served.bounds.connections):
            stack.enter_context(opened(worker))
        with opened(worker) as over:
            assert rest(over) == b""


def test_a_flood_of_idle_connections_leaves_others_their_answers() -> None:
    with running() as worker, opened(worker, "127.0.0.2") as other, ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(opened(worker))
        begun = time.monotonic()
        assert is_served(other)
        assert time.monotonic() - begun < 30


def test_an_address_of_ipv6_counts_by_its_network() -> None:
    assert host_of("2001:db8::1") == host_of("2001:db8::2") != host_of("2001:db8:0:1::1")
    assert host_of("::ffff:192.0.2.1") == host_of("192.0.2.1")
    assert host_of("fe80::1%eth0") == host_of("fe80::2")
