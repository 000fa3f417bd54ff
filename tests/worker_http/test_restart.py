"""Responses and conversations are there as they were, once the worker and its service have been started again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from memory_service.api.embedded import LocalServer
from tests.worker_http.test_responses import LAND, SEA, SHIPS, respond, told


@pytest.fixture
def started(serving: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Return what starts a service of the same folder and a worker, for the time of a block."""

    @contextmanager
    def both() -> Iterator[openai.OpenAI]:
        with (
            LocalServer(tmp_path, listen="127.0.0.1:0") as service,
            serving(target=service.address) as running,
            running.loaded().client() as client,
        ):
            yield client

    return both


def listed(client: openai.OpenAI, conversation: str) -> list[Any]:
    return list(client.conversations.items.list(conversation, order="asc"))


@pytest.mark.slow
def test_all_is_there_after_a_restart_and_goes_on(started: Callable[..., Any]) -> None:
    with started() as client:
        first = respond(client, instructions="be brief", metadata={"of": "me"})
        second = respond(client, SHIPS, previous_response_id=first.id)
        forgotten = respond(client, LAND, previous_response_id=first.id)
        conversation = client.conversations.create(items=[{"role": "user", "content": SEA}], metadata={"topic": "sea"})
        inside = respond(client, SHIPS, conversation=conversation.id)
        items = listed(client, conversation.id)
        assert client.responses.delete(forgotten.id) is None
    with started() as client:
        assert [client.responses.retrieve(each.id) for each in (first, second, inside)] == [first, second, inside]
        assert told(client, second) == [SHIPS]
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(forgotten.id)
        third = respond(client, LAND, previous_response_id=second.id)
        assert third.instructions == "be brief"
        assert third.usage.input_tokens_details.cached_tokens > len(SEA) + len(SHIPS)
        assert client.conversations.retrieve(conversation.id) == conversation
        assert listed(client, conversation.id) == items
        behind = respond(client, LAND, conversation=conversation.id)
        assert behind.usage.input_tokens_details.cached_tokens > 0
        assert [item.content[0].text for item in listed(client, conversation.id)[-2:]] == [LAND, behind.output_text]
        client.responses.delete(second.id)
        client.conversations.items.delete(items[0].id, conversation_id=conversation.id)
    with started() as client:
        for gone in (forgotten, second):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(gone.id)
        assert client.responses.retrieve(third.id) == third
        assert [item.id for item in listed(client, conversation.id)][: len(items) - 1] == [
            each.id for each in items[1:]
        ]
        assert client.conversations.delete(conversation.id).deleted
