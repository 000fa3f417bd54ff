"""Responses in the background: under way, cancelled and failed, asked for at any worker."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

import kvbank
from model_worker.session.lease import Lease
from tests.worker_http.conftest import Running
from tests.worker_http.test_responses import SHIPS, respond, told
from tests.worker_http.test_server import ENDLESS, until

LONG = {"background": True, "max_output_tokens": ENDLESS}


@pytest.fixture
def service(address: str) -> Iterator[kvbank.Client]:
    with kvbank.connect(address) as client:
        yield client


def status(client: openai.OpenAI, response: Any) -> str:
    return str(client.responses.retrieve(response.id).status)


@contextmanager
def under_way(client: openai.OpenAI, **options: Any) -> Iterator[Any]:
    """Begin a response that does not end by itself, and cancel it behind the block."""
    response = respond(client, **LONG, **options)
    try:
        until(lambda: status(client, response) == "in_progress")
        yield response
    finally:
        client.responses.cancel(response.id)


def test_a_response_is_made_without_its_caller(api: openai.OpenAI) -> None:
    first = respond(api, instructions="be brief")
    made = respond(api, SHIPS, background=True, previous_response_id=first.id, metadata={"of": "me"})
    assert made.status in ("queued", "in_progress")
    until(lambda: status(api, made) == "incomplete")
    found = api.responses.retrieve(made.id)
    assert (found.background, found.instructions, found.metadata) == (True, "be brief", {"of": "me"})
    assert found.output_text
    assert told(api, found) == [SHIPS]
    assert api.responses.cancel(made.id) == found
    assert respond(api, "go on", previous_response_id=made.id).usage.input_tokens_details.cached_tokens > 0


def test_a_response_is_cancelled_at_any_worker(
    api: openai.OpenAI, workers: list[Running], service: kvbank.Client
) -> None:
    """Cancel a response that waits, and one that runs, at each of the workers."""
    with under_way(api, metadata={"of": "me"}) as running:
        assert [api.responses.retrieve(running.id).metadata for _ in workers] == [{"of": "me"}] * len(workers)
        assert [api.responses.cancel(running.id).status for _ in workers] == ["cancelled"] * len(workers)
    until(lambda: not any(each.served.engine.running for each in workers))
    assert [status(api, running) for _ in workers] == ["cancelled"] * len(workers)
    [session] = service.sessions.list({"background": running.id})
    assert (session.head, session.lease) == (0, None)
    plain = respond(api)
    with pytest.raises(openai.BadRequestError):
        api.responses.cancel(plain.id)


def test_a_response_that_waits_is_cancelled(workers: list[Running]) -> None:
    busy, other = workers[0], workers[-1]
    with busy.client() as client, other.client() as cancelling:
        streams = [iter(respond(client, stream=True, max_output_tokens=ENDLESS)) for _ in range(6)]
        events = [next(stream) for stream in streams]  # as many as one caller may have
        assert {event.type for event in events} == {"response.created"}
        waiting = respond(client, **LONG)
        assert status(client, waiting) == waiting.status == "queued"
        assert cancelling.responses.cancel(waiting.id).status == "cancelled"
        assert status(client, waiting) == "cancelled"
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
    until(lambda: not busy.served.engine.running and not busy.served.engine.waiting)
    with other.client() as client:
        assert status(client, waiting) == "cancelled"


def test_a_conversation_in_which_a_response_is_made_is_busy(api: openai.OpenAI) -> None:
    conversation = api.conversations.create(metadata={"of": "me"})
    with under_way(api, conversation=conversation.id) as running:
        assert running.conversation.id == conversation.id
        assert api.conversations.retrieve(conversation.id).metadata == {"of": "me"}
        with pytest.raises(openai.ConflictError) as refused:
            respond(api, SHIPS, conversation=conversation.id, background=True)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "session_conflict"
    until(lambda: status(api, running) == "cancelled")
    assert respond(api, SHIPS, conversation=conversation.id).output_text


def test_a_conversation_with_all_metadata_that_it_may_have_gets_a_response(api: openai.OpenAI) -> None:
    metadata = {f"name {number}": "é" * 512 for number in range(16)}
    conversation = api.conversations.create(metadata=metadata)
    made = respond(api, background=True, conversation=conversation.id, metadata=metadata)
    until(lambda: status(api, made) == "incomplete")
    assert api.conversations.retrieve(conversation.id).metadata == metadata
    assert api.responses.retrieve(made.id).metadata == metadata


def test_a_response_whose_worker_has_died_has_failed(api: openai.OpenAI, service: kvbank.Client) -> None:
    session = service.sessions.create()
    lease = Lease(service, session.session_id)
    lease.take()
    response = "resp_" + "d" * 32
    marks = {"background": response, "background_state": f"in_progress {lease.holder}"}
    service.sessions.update(session.session_id, metadata=marks)
    assert api.responses.retrieve(response).status == "in_progress"
    lease.release()
    found = api.responses.retrieve(response)
    assert (found.status, found.error.code) == ("failed", "server_error")
    assert api.responses.cancel(response).status == "failed"
    api.responses.delete(response)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(response)
