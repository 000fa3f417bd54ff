"""The health is told to everybody, and so to callers who mean no good: they hold up neither it nor the end of the
service, and leave room for calls."""

import queue
import socket
import struct
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Limits
from tests.support.waiting import wait_until

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW_SIZE = 4
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + body


def block(**headers: str) -> bytes:
    """Make a block of headers, as literals that are not indexed; pseudo headers begin with a colon."""
    pseudo = {":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Watch", ":authority": "x"}
    found = pseudo | {"te": "trailers", "content-type": "application/grpc"} | headers
    texts = (bytes((len(text),)) + text.encode() for pair in found.items() for text in pair)
    return b"".join(b"\0" + name + value for name, value in zip(texts, texts, strict=False))


def watch_without_reading(address: str) -> socket.socket:
    """Watch the health of the whole service, and allow not one byte of an answer."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), 60)
    settings = frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
    asked = frame(HEADERS, END_HEADERS, 1, block()) + frame(DATA, END_STREAM, 1, bytes(5))
    connection.sendall(PREFACE + settings + asked)
    seen = b""
    while b"application/grpc" not in seen:  # the headers of the answer: it is watched
        seen += connection.recv(4096)
    return connection


def test_who_takes_no_answer_holds_up_neither_other_watchers_nor_the_end(tmp_path: Path) -> None:
    server = LocalServer(tmp_path / "data")
    with watch_without_reading(server.address), grpc.insecure_channel(server.address) as channel:
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watching).status == SERVING
        server.stop()
        assert next(watching).status == NOT_SERVING


def test_callers_of_the_health_who_ask_nothing_leave_room_and_are_ended(tmp_path: Path) -> None:
    nothing: queue.SimpleQueue[Any] = queue.SimpleQueue()
    limits = Limits(request_s=0.5)
    with LocalServer(tmp_path / "data", max_calls=8, limits=limits) as server, ExitStack() as opened:
        channel = opened.enter_context(grpc.insecure_channel(server.address))
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for name in ("Check", "Watch", "Check", "Watch", "Check", "Watch", "Check", "Watch", "Check"):
            call = channel.stream_stream(f"/grpc.health.v1.Health/{name}")(iter(nothing.get, None), timeout=60)
            call.add_done_callback(ended.put)
        with kvbank.connect(server.address) as client:
            assert client.server_info().store_id
        codes = [ended.get(timeout=60).code() for _ in range(9)]
        assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 7 + [grpc.StatusCode.INVALID_ARGUMENT] * 2
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == SERVING
        for _ in codes:
            nothing.put(None)


@pytest.mark.parametrize("method", ["Check", "Watch", "List"])
def test_a_request_of_the_health_that_cannot_be_read_is_refused_without_a_word_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Anybody may call, without a key, and so could fill the log."""
    with LocalServer(tmp_path / "data") as server, grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(f"/grpc.health.v1.Health/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            next(call(iter([b"\xff"]), timeout=60))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "cannot be read" in caught.value.details()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_callers_of_the_health_leave_room_for_calls(tmp_path: Path) -> None:
    with LocalServer(tmp_path / "data", max_calls=8) as server, ExitStack() as opened:
        health = health_pb2_grpc.HealthStub(opened.enter_context(grpc.insecure_channel(server.address)))
        watched: list[Any] = []
        for _ in range(2):
            watched.append(health.Watch(health_pb2.HealthCheckRequest(), timeout=60))
            assert next(watched[-1]).status == SERVING
        for ask in (health.Check, lambda request, timeout: next(health.Watch(request, timeout=timeout))):
            with pytest.raises(grpc.RpcError) as refused:
                ask(health_pb2.HealthCheckRequest(), timeout=60)
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with kvbank.connect(server.address) as client:
            assert client.server_info().store_id
        watched.pop().cancel()

        def answered() -> bool:
            with suppress(grpc.RpcError):
                return bool(health.Check(health_pb2.HealthCheckRequest(), timeout=60).status == SERVING)
            return False

        wait_until(answered)
