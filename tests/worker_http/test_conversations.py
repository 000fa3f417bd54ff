"""Conversations and their items, as the official client of OpenAI asks for them."""

import gc
import json
import socket
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.conversations import Message

import kvbank
from model_worker.serve.history import Exchange
from tests.worker_http.conftest import Running
from tests.worker_http.test_chat import ask
from tests.worker_http.test_responses import LAND, SEA, SHIPS, respond
from tests.worker_http.test_server import until

SYSTEM = {"role": "developer", "content": "be brief"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def texts(items: Any) -> list[str]:
    return [item.content[0].text for item in items]


def test_a_conversation_is_described_and_deleted(api: openai.OpenAI) -> None:
    made = api.conversations.create(metadata={"of": "me"})
    assert made.object == "conversation"
    assert api.conversations.retrieve(made.id) == made
    assert api.conversations.update(made.id, metadata={"other": "one"}).metadata == {"other": "one"}
    assert api.conversations.update(made.id, metadata=None).metadata == {}
    assert api.conversations.delete(made.id).deleted
    assert api.conversations.delete(made.id).deleted  # a second time is no error
    for call in (api.conversations.retrieve, api.conversations.items.list):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_metadata_that_the_worker_reads_is_not_the_callers(api: openai.OpenAI) -> None:
    made = api.conversations.create(metadata={"of": "me"})
    for call in (api.conversations.create, lambda **given: api.conversations.update(made.id, **given)):
        with pytest.raises(openai.BadRequestError) as refused:
            call(metadata={"background": "resp_1"})
        assert refused.value.param == "metadata"
    assert api.conversations.retrieve(made.id).metadata == {"of": "me"}


def test_responses_go_on_in_a_conversation(api: openai.OpenAI) -> None:
    conversation = api.conversations.create()
    first = respond(api, conversation=conversation.id, instructions="be brief")
    second = respond(api, SHIPS, conversation={"id": conversation.id})
    assert second.conversation.id == conversation.id
    assert second.instructions == "be brief"
    assert second.usage.input_tokens_details.cached_tokens > 0
    items = api.conversations.items.list(conversation.id, order="asc")
    assert texts(items) == [SEA, first.output_text, SHIPS, second.output_text]
    assert [item.id for item in items][3] == second.output[0].id
    with pytest.raises(openai.BadRequestError) as refused:
        respond(api, LAND, conversation=conversation.id, instructions="be long")
    assert refused.value.param == "instructions"
    branch = respond(api, LAND, previous_response_id=first.id)
    assert branch.conversation is None
    assert len(list(api.conversations.items.list(conversation.id))) == 4


def test_items_are_listed_in_pages(api: openai.OpenAI) -> None:
    given = [SYSTEM, user(SEA), assistant("yes"), user(SHIPS), user(LAND), assistant("no")]
    conversation = api.conversations.create(items=given)
    said = [SEA, "yes", SHIPS, LAND, "no"]
    items = api.conversations.items
    for order, expected in (("asc", said), ("desc", said[::-1])):
        assert texts(items.list(conversation.id, order=order, limit=2)) == expected
        page = items.list(conversation.id, order=order, limit=2)
        assert (page.has_more, page.last_id) == (True, page.data[-1].id)
        assert texts(items.list(conversation.id, order=order, after=page.last_id)) == expected[2:]
    assert texts(items.list(conversation.id)) == said[::-1]
    [first, *_] = items.list(conversation.id, order="asc")
    assert isinstance(first, Message)
    assert (first.role, first.content[0].type, first.status) == ("user", "input_text", "completed")
    assert items.retrieve(first.id, conversation_id=conversation.id) == first
    assert respond(api, "go on", conversation=conversation.id).instructions == "be brief"


def test_items_are_added(api: openai.OpenAI) -> None:
    conversation = api.conversations.create()
    greeting = api.conversations.items.create(conversation.id, items=[assistant("good day")])
    assert texts(greeting.data) == ["good day"]
    added = api.conversations.items.create(conversation.id, items=[user(SEA), assistant("yes"), user(SHIPS)])
    assert texts(added.data) == [SEA, "yes", SHIPS]
    found = respond(api, LAND, conversation=conversation.id)
    assert found.usage.input_tokens_details.cached_tokens > 0
    said = ["good day", SEA, "yes", SHIPS, LAND, found.output_text]
    assert texts(api.conversations.items.list(conversation.id, order="asc")) == said


def test_who_leaves_while_items_are_added_adds_none(
    worker: Running, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    conversation = client.conversations.create(items=[user(SEA)])
    body = json.dumps({"items": [user("and then came a ship from afar " * 8)] * 100}).encode()
    head = (
        f"POST /v1/conversations/{conversation.id}/items HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    )
    with worker.served.clients.client("none") as service:

        def turns() -> int:
            return service.sessions.get(conversation.id.removeprefix("conv_")).head

        with socket.create_connection(("127.0.0.1", worker.port)) as sent:
            sent.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
            until(lambda: turns() > 2)
        until(lambda: worker.served.engine.running == 0)
        assert turns() == 1
    assert texts(client.conversations.items.list(conversation.id)) == [SEA]
    assert respond(client, SHIPS, conversation=conversation.id).output_text
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_turns_of_another_worker_stay_where_adding_fails(worker: Running, client: openai.OpenAI) -> None:
    session_id = client.conversations.create(items=[user(SEA)]).id.removeprefix("conv_")
    with worker.served.clients.client("none") as service:

        def meanwhile() -> Iterator[Exchange]:
            yield Exchange(SHIPS, "yes")
            service.sessions.forget(session_id, first=1)  # which ends the lease
            taken = service.sessions.acquire(session_id, "another")
            assert taken.lease is not None
            turn = kvbank.Turn([kvbank.Item("user", LAND)], [5], prompt_tokens=1, key=uuid.uuid4().hex)
            service.sessions.append(session_id, [turn], epoch=taken.lease.epoch, follows=taken.head)
            service.sessions.release(session_id, taken.lease.epoch)
            yield Exchange(SEA, "yes")
            raise RuntimeError("it fails")

        job = worker.served.add("none", session_id, meanwhile())  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="it fails"):
            job.result.result(60)
        assert LAND in [turn.text("user") for turn in service.sessions.turns(session_id)]


def test_an_item_goes_with_its_turn(api: openai.OpenAI) -> None:
    conversation = api.conversations.create(items=[user(SEA), assistant("yes"), user(SHIPS)])
    first = next(iter(api.conversations.items.list(conversation.id, order="asc")))
    assert api.conversations.items.delete(first.id, conversation_id=conversation.id).id == conversation.id
    assert texts(api.conversations.items.list(conversation.id)) == [SHIPS]


def test_a_session_of_the_chat_endpoint_is_a_conversation(api: openai.OpenAI, workers: list[Running]) -> None:
    name = f"chat at {len(workers)}"
    answered = ask(api, [user(SEA)], extra_headers={"X-Kvbank-Session": name}).choices[0].message.content
    with workers[0].served.clients.client("none") as service:
        conversation = f"conv_{service.sessions.get(name=name).session_id}"
    assert texts(api.conversations.items.list(conversation, order="asc")) == [SEA, answered]
    respond(api, SHIPS, conversation=conversation)
    assert len(list(api.conversations.items.list(conversation))) == 4


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"items": [{"role": "tool", "content": "x"}]}, "items[0].role"),
        ("", {"items": [user(" ")]}, "items[0]"),
        ("", {"items": [user(SEA), SYSTEM]}, "items[1]"),
        ("", {"items": [user("a")] * 101}, "items"),
        ("", {"metadata": {"a": 1}}, "metadata.a"),
        ("", {"name": "x"}, "name"),
        ("/ID", {}, "metadata"),
        ("/ID/items", {}, "items"),
        ("/ID/items", {"items": []}, "items"),
        ("/ID/items", {"items": [SYSTEM]}, "items[0]"),
    ],
)
def test_wrong_input_is_refused_by_its_name(client: openai.OpenAI, path: str, body: Any, param: str) -> None:
    conversation = client.conversations.create().id if "ID" in path else ""
    with pytest.raises(openai.BadRequestError) as refused:
        client.post(f"/conversations{path.replace('ID', conversation)}", body=body, cast_to=object)
    assert refused.value.param == param


def test_wrong_lists_are_refused(client: openai.OpenAI) -> None:
    conversation, other = (client.conversations.create(items=[user(SEA)]).id for _ in range(2))
    items = client.conversations.items
    for options, param in (({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"order": "up"}, "order")):
        with pytest.raises(openai.BadRequestError) as refused:
            items.list(conversation, **options)
        assert refused.value.param == param
    [foreign] = items.list(other)
    for item in (foreign.id, "msg_x", "msg_x_0", "item"):
        with pytest.raises(openai.NotFoundError):
            items.retrieve(item, conversation_id=conversation)
        with pytest.raises(openai.NotFoundError):
            items.list(conversation, after=item)
        with pytest.raises(openai.NotFoundError):
            items.delete(item, conversation_id=conversation)
    for missing in ("conv_" + "0" * 32, "conv_1", "x"):
        with pytest.raises(openai.NotFoundError):
            client.conversations.retrieve(missing)
        with pytest.raises(openai.NotFoundError):
            respond(client, conversation=missing)
