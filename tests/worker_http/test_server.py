"""The server around the routes: errors in one form, callers who leave or read slowly, keys, figures, and the end."""

import asyncio
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client import generate_latest
from starlette.types import Message

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.http.answers import Answer
from model_worker.http.bounds import Counted
from model_worker.http.events import streamed
from model_worker.http.metrics import Metrics
from model_worker.serve.engine import Turn
from model_worker.serve.served import Served
from tests.worker_http.conftest import MODEL, Running
from tests.worker_http.test_chat import ask, kept

ENDLESS = 4096
HELLO = [{"role": "user", "content": "hello"}]


def call(worker: Running, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=120)
    try:
        connection.request(method, path, body, {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, answer.headers, json.loads(text) if "json" in answer.headers["content-type"] else text
    finally:
        connection.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
        ("POST", "/v1/chat/completions", b'{"model": "tiny", "messages": "\\ud800"}', 400),
        ("POST", "/v1/chat/completions", b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', 404),
        ("POST", "/v1/completions", b'{"model": "tiny"}', 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b" " * (4 * 1024 * 1024 + 1), 413),
        ("GET", "/v1/chat/completions", None, 405),
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/none", None, 404),
        ("DELETE", "/v1/models/tiny", None, 405),
    ],
)
def test_every_error_has_one_form(worker: Running, method: str, path: str, body: bytes | None, status: int) -> None:
    found, _, document = call(worker, method, path, body)
    assert found == status
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["message"]


def test_a_body_without_a_length_is_bounded_too(worker: Running) -> None:
    with socket.create_connection(("127.0.0.1", worker.port), timeout=120) as sent:
        sent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        sent.sendall(5 * (b"100000\r\n" + b" " * 0x100000 + b"\r\n") + b"0\r\n\r\n")
        assert b" 413 " in sent.recv(100)


def test_who_leaves_ends_his_answer(worker: Running, client: openai.OpenAI) -> None:
    stream = ask(client, max_completion_tokens=ENDLESS, stream=True)
    next(iter(stream))
    assert worker.served.engine.running == 1
    stream.close()
    until(lambda: worker.served.engine.running == 0)


def test_who_leaves_without_a_stream_ends_his_answer_too(worker: Running) -> None:
    said = [{"role": "user", "content": "hello"}]
    body = {"model": MODEL, "messages": said, "max_completion_tokens": ENDLESS, "temperature": 0}
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", worker.port)) as sent:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\ncontent-length: "
        sent.sendall(head.encode() + str(len(data)).encode() + b"\r\n\r\n" + data)
        until(lambda: worker.served.engine.running == 1)
    until(lambda: worker.served.engine.running == 0)


def test_who_leaves_before_the_first_event_ends_his_answer_too() -> None:
    # The caller's socket takes nothing, and the caller leaves: nothing of the stream is ever made.
    served = Served(MODEL, "127.0.0.1:1")

    def endless(turn: Turn) -> Any:
        with turn.holding_model():
            while not turn.left:
                turn.step(lambda: None, {})

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def waiting(message: Message) -> None:
        await asyncio.Event().wait()

    async def events(answer: Answer) -> AsyncIterator[dict[str, Any]]:
        async for piece in answer.pieces():
            yield {"piece": piece}

    async def answered() -> None:
        answer = Answer(served.engine, Metrics(served), lambda take: served.engine.submit("", "", endless))
        await streamed(answer, events(answer))({"type": "http"}, gone, waiting)

    try:
        asyncio.run(answered())
        assert served.engine.wait_until_idle(30)
    finally:
        served.close()


def test_a_defect_is_counted_as_one() -> None:
    metrics = Metrics(Served(MODEL, "127.0.0.1:1"))

    async def broken(*asgi: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(Counted(broken, metrics)({"type": "http"}, broken, broken))
    assert b'kvbank_worker_requests_total{path="",status="500"} 1.0' in generate_latest(metrics.registry)


def test_a_reader_who_does_not_read_holds_up_nobody(worker: Running, client: openai.OpenAI) -> None:
    with worker.client() as slow:
        stream = ask(slow, max_completion_tokens=ENDLESS, stream=True)
        next(iter(stream))
        assert ask(client).choices[0].message.content
        stream.close()
    until(lambda: worker.served.engine.running == 0)


def test_a_full_queue_is_told_with_a_time(serving: Callable[..., Any]) -> None:
    with serving(bounds={"running": 1, "waiting": 0}) as running, running.loaded().client() as client:
        stream = ask(client, max_completion_tokens=ENDLESS, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        stream.close()


def test_a_worker_is_ready_once_its_model_is_there(serving: Callable[..., Any]) -> None:
    hold = threading.Event()
    with serving(hold=hold) as running:
        until(lambda: running.server.started)
        assert call(running, "GET", "/healthz")[0] == 200
        status, headers, document = call(running, "GET", "/readyz")
        assert (status, document["error"]["code"], headers["retry-after"]) == (503, "model_loading", "1")
        with running.client() as client, pytest.raises(openai.InternalServerError) as refused:
            ask(client)
        assert (refused.value.status_code, refused.value.code) == (503, "model_loading")
        assert refused.value.response.headers["retry-after"] == "1"
        hold.set()
        running.loaded()
        assert call(running, "GET", "/readyz")[0] == 200


def test_what_has_begun_is_answered_before_the_end(serving: Callable[..., Any]) -> None:
    """Send the first signal: it takes the worker out of service, and the answer that runs has all its tokens."""
    with serving() as running, running.loaded().client() as client:
        stream = ask(client, max_completion_tokens=60, stream=True)
        first = next(iter(stream))
        assert first.choices[0].delta.role == "assistant"
        running.server.handle_exit(signal.SIGTERM, None)
        until(lambda: not running.served.ready)
        for method, path, body in (
            ("GET", "/readyz", None),
            ("POST", "/v1/conversations", b"{}"),
            ("POST", "/v1/chat/completions", json.dumps({"model": MODEL, "messages": HELLO}).encode()),
        ):
            status, headers, document = call(running, method, path, body)
            assert (status, document["error"]["code"], headers["retry-after"]) == (503, "worker_stopping", "1")
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        running.wait()


def test_keys_are_those_of_the_service(serving: Callable[..., Any], tmp_path: Path) -> None:
    with LocalServer(tmp_path, listen="127.0.0.1:0", durability="os") as service:
        with kvbank.connect(service.address) as owner:
            operator = owner.access.create_key("operator").secret
        with kvbank.connect(service.address, api_key=operator) as client:
            for tenant in ("red", "blue"):
                client.access.create_tenant(tenant)
            keys = [client.access.create_key("write", tenant=tenant).secret for tenant in ("red", "blue")]
        with serving(target=service.address) as running:
            running.loaded()
            options = {"extra_headers": {"X-Kvbank-Session": "mine"}}
            with running.client(keys[0]) as red, running.client(keys[1]) as blue:
                assert [model.id for model in red.models.list()] == [MODEL]
                first = ask(red, HELLO, **options)
                answered = first.choices[0].message.content
                trace = f"/v1/kvbank/responses/{first.id}/trace"
                seen = [call(running, "GET", trace, authorization=f"Bearer {key}")[0] for key in keys]
                assert seen == [200, 404]
                history = [*HELLO, {"role": "assistant", "content": answered}, {"role": "user", "content": "go on"}]
                assert ask(blue, history, **options).usage.prompt_tokens_details.cached_tokens == 0
                assert ask(red, history, **options).usage.prompt_tokens_details.cached_tokens > 0
                long = ask(red, [{"role": "user", "content": "a long story " * 12}])
                assert long.usage.prompt_tokens_details.cache_write_tokens > 0
            for wrong in ("kvb_wrong", f"@{tmp_path}/secret"):
                with running.client(wrong) as client:
                    for asked in (ask, lambda c: c.models.list(), complete):
                        with pytest.raises(openai.AuthenticationError) as refused:
                            asked(client)
                        assert refused.value.code == "invalid_api_key"
            assert call(running, "GET", "/v1/models")[0] == 401


def complete(client: openai.OpenAI, prompt: Any = "once upon", **options: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **{"temperature": 0, "max_tokens": 12, **options})


def test_a_service_that_is_away_is_told(serving: Callable[..., Any], tmp_path: Path) -> None:
    with LocalServer(tmp_path, listen="127.0.0.1:0", durability="os") as service:
        address = service.address
    with serving(target=address) as running, running.loaded().client() as client:
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client)
        assert (refused.value.status_code, refused.value.code) == (503, "memory_unavailable")
        assert address not in str(refused.value)


def test_completions_go_on_with_a_text(worker: Running, client: openai.OpenAI) -> None:
    found = complete(client)
    assert (found.object, found.choices[0].finish_reason, found.usage.completion_tokens) == (
        "text_completion",
        "length",
        12,
    )
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == found.choices[0].text
    assert chunks[-1].usage == found.usage
    assert complete(client, ["once upon"]).choices[0].text == found.choices[0].text
    before = kept(worker)
    found = complete(client, list(b"a long story " * 12))
    assert found.usage.prompt_tokens == 12 * 13
    assert found.usage.prompt_tokens_details.cache_write_tokens > 0
    assert kept(worker) == before


def test_the_figures_name_paths_and_no_callers(worker: Running, client: openai.OpenAI) -> None:
    ask(client, extra_headers={"X-Kvbank-Session": "figures"})
    status, _, text = call(worker, "GET", "/metrics")
    assert status == 200
    assert b'kvbank_worker_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert b'kvbank_worker_tokens_total{kind="completion"}' in text
    assert b"kvbank_worker_ready 1.0" in text
    assert b"figures" not in text
