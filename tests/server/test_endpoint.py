"""The HTTP door for health, readiness and metrics; a slow caller there costs the others nothing."""

import http.client
import select
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from memory_service.api import http_port
from memory_service.domain.limits import Limits
from memory_service.observe.troubles import Troubles
from memory_service.storage.background import Janitor
from tests.support.waiting import wait_until

Status = health_pb2.HealthCheckResponse


@pytest.fixture
def patience() -> float:
    """Seconds that a connection may take."""
    return 10.0


@pytest.fixture
def caller(serving: Callable[..., Any], patience: float) -> Any:
    limits = Limits(probe_s=0.02, http_patience_s=patience)
    caller = serving(metrics_listen="127.0.0.1:0", grace=60, limits=limits)
    caller.create()
    return caller


@pytest.fixture
def ask(caller: Any, serving: Any) -> Callable[..., tuple[int, bytes, Any]]:
    """Status, body and headers of a request."""
    address = serving.server.metrics_address

    def request(path: str, method: str = "GET") -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, body, answer.headers

    return request


def test_each_path_answers_for_itself(ask: Callable[..., Any]) -> None:
    assert ask("/healthz")[:2] == (200, b"alive\n")
    assert ask("/readyz")[:2] == (200, b"ready\n")
    assert ask("/readyz?verbose=1")[0] == 200
    status, body, headers = ask("/metrics")
    assert status == 200
    assert b"kvbank_ready 1.0" in body
    assert headers["Content-Type"].startswith("text/plain; version=")
    for path in ("/", "/metrics/", "/health", "/readyz/x", "/../metrics", "*", "//healthz"):
        assert ask(path)[0] == 404, path


def test_a_head_is_the_answer_without_its_body(ask: Callable[..., Any]) -> None:
    for path in ("/healthz", "/readyz", "/nothing"):
        got, head = ask(path), ask(path, "HEAD")
        assert (head[0], head[1]) == (got[0], b"")
        assert int(head[2]["Content-Length"]) == len(got[1])
    assert int(ask("/metrics", "HEAD")[2]["Content-Length"]) > 1000
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        status, _, headers = ask("/metrics", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("sent", [b"\r\n\r\n", b"nonsense\r\n\r\n", b"\xff\xfe\r\n\r\n", b"GET " + b"x" * 20_000])
def test_what_is_no_request_is_told_so(serving: Any, caller: Any, sent: bytes) -> None:
    host, _, port = serving.server.metrics_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(sent)
        assert connection.recv(1000).split()[1] in (b"400", b"404")


@pytest.mark.parametrize("patience", [0.5])
def test_callers_who_say_nothing_cost_no_thread_and_are_left(
    serving: Any, caller: Any, ask: Callable[..., Any]
) -> None:
    host, _, port = serving.server.metrics_address.rpartition(":")
    threads = threading.active_count()
    silent = [socket.create_connection((host, int(port)), timeout=60) for _ in range(2 * http_port.MOST_CONNECTIONS)]
    try:
        assert threading.active_count() <= threads + 2

        def answered() -> bool:
            try:
                return bool(ask("/metrics")[0] == 200)
            except OSError:
                return False

        wait_until(answered)
        for connection in silent:
            assert connection.recv(1) == b""
    finally:
        for connection in silent:
            connection.close()


def test_a_host_leaves_connections_to_others(serving: Any, caller: Any, ask: Callable[..., Any]) -> None:
    host, _, port = serving.server.metrics_address.rpartition(":")
    with ExitStack() as opened:

        def silent() -> socket.socket:
            from_there = socket.create_connection((host, int(port)), timeout=60, source_address=("127.0.0.2", 0))
            return opened.enter_context(from_there)

        held = [silent() for _ in range(http_port.MOST_OF_HOST)]
        more = [silent() for _ in range(http_port.MOST_CONNECTIONS)]
        assert {connection.recv(1) for connection in more} == {b""}
        assert ask("/healthz")[0] == 200
        held[0].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert held[0].recv(100).startswith(b"HTTP/1.1 200 ")
        held[1].close()
        wait_until(lambda: _is_let_in(silent()))


def _is_let_in(connection: socket.socket) -> bool:
    connection.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
    with suppress(ConnectionError):
        return connection.recv(100).startswith(b"HTTP/1.1 200 ")
    return False


@pytest.mark.parametrize("patience", [0.5])
@pytest.mark.parametrize("part", [b"G", b"x: y\r\n"], ids=["the line of the request", "headers"])
def test_a_request_that_comes_too_slowly_is_left(serving: Any, caller: Any, part: bytes) -> None:
    host, _, port = serving.server.metrics_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"" if part == b"G" else b"GET /healthz HTTP/1.1\r\n")

        def is_left() -> bool:
            connection.sendall(part)
            return bool(select.select([connection], [], [], 0)[0])

        with suppress(ConnectionError):
            wait_until(is_left)
            assert connection.recv(100) == b""


def test_a_storage_that_is_not_there_is_told_everywhere(caller: Any, ask: Callable[..., Any], data: Path) -> None:
    watching = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watching).status == Status.SERVING
    shutil.move(data / "payloads", data / "away")
    assert next(watching).status == Status.NOT_SERVING
    status, body, _ = ask("/readyz")
    assert status == 503
    assert body.startswith(b"not ready\nstorage: FileNotFoundError")
    assert ask("/healthz")[0] == 200, "a restart would not help"
    assert b"kvbank_ready 0.0" in ask("/metrics")[1]
    shutil.move(data / "away", data / "payloads")
    assert next(watching).status == Status.SERVING
    assert ask("/readyz")[:2] == (200, b"ready\n")
    watching.cancel()


def test_a_service_that_stops_is_not_ready(serving: Any, caller: Any, ask: Callable[..., Any], frames: Any) -> None:
    over, under_way = threading.Event(), b'kvbank_requests_running{method="WriteChunks"} 1.0'

    def half() -> Iterator[Any]:
        sent = iter(frames(*caller.chunk()))
        yield next(sent)
        over.wait()
        yield from sent

    writing = caller.stub.WriteChunks(half())
    wait_until(lambda: under_way in ask("/metrics")[1])
    stopping = threading.Thread(target=serving.server.stop)
    stopping.start()
    wait_until(lambda: ask("/readyz")[0] == 503)
    assert b"stopping" in ask("/readyz")[1]
    assert ask("/healthz")[0] == 200
    over.set()
    assert len(list(writing)) == 1
    stopping.join()


def test_what_fails_again_and_again_in_the_background_is_told_and_not_hurried() -> None:
    troubles, fails, ran = Troubles(), threading.Event(), []
    fails.set()

    def tidy() -> None:
        ran.append(1)
        if fails.is_set():
            raise OSError("no")

    janitor = Janitor("tidy", troubles)
    try:
        janitor.every(0.001, tidy)
        wait_until(lambda: len(ran) >= 5)
        assert {name: trouble.text for name, trouble in troubles.all().items()} == {"tidy tidy": "OSError: no"}
        assert troubles.ready(), "the rest goes on"
        fails.clear()
        wait_until(lambda: not troubles.all())
    finally:
        janitor.close()
