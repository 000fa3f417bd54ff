"""Responses, as the official client of OpenAI asks for them, at one worker and at two behind a round-robin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseCreateParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.http.response_requests import ResponseRequest
from tests.worker_http.conftest import MODEL, Running
from tests.worker_http.test_chat import kept

SEA, SHIPS, LAND = "the sea is wide", "ships come and go", "no, the land is wide"


def respond(client: openai.OpenAI, said: Any = SEA, **options: Any) -> Any:
    return client.responses.create(
        **{"model": MODEL, "temperature": 0, "max_output_tokens": 8, "input": said, **options}
    )


def told(client: openai.OpenAI, response: Any) -> list[str]:
    """Return what the request of a response said, the first first."""
    return [item.content[0].text for item in client.responses.input_items.list(response.id, order="asc")]


def test_a_response_is_found_again_as_it_was(api: openai.OpenAI) -> None:
    options = {"instructions": "be brief", "metadata": {"of": "me"}, "top_p": 0.5, "truncation": "auto"}
    made = respond(api, [{"role": "user", "content": SEA}, {"role": "user", "content": SHIPS}], **options)
    assert isinstance(made, Response)
    assert (made.object, made.model, made.status) == ("response", MODEL, "incomplete")
    assert made.output_text
    assert made.incomplete_details.reason == "max_output_tokens"
    assert (made.instructions, made.metadata, made.top_p) == ("be brief", {"of": "me"}, 0.5)
    assert made.usage.output_tokens == 8
    assert made.usage.total_tokens == made.usage.input_tokens + 8
    assert made.usage.input_tokens > len("be brief") + len(SEA) + len(SHIPS)
    for _ in range(2):
        assert api.responses.retrieve(made.id) == made
        assert told(api, made) == [SEA, SHIPS]


def test_responses_are_a_conversation(api: openai.OpenAI) -> None:
    first = respond(api, instructions="be brief")
    second = respond(api, SHIPS, previous_response_id=first.id)
    third = respond(api, LAND, previous_response_id=second.id, instructions="be brief")
    assert third.instructions == second.instructions == "be brief"
    assert (third.previous_response_id, second.previous_response_id) == (second.id, first.id)
    for found, text in ((second, SHIPS), (third, LAND)):
        details = found.usage.input_tokens_details
        assert details.cached_tokens > 0
        assert len(text) < found.usage.input_tokens - details.cached_tokens < len(text) + 48
    assert sum(each.usage.input_tokens_details.cache_write_tokens for each in (first, second, third)) > 0
    whole = respond(
        api,
        [
            *({"role": "user", "content": SEA}, {"role": "assistant", "content": first.output_text}),
            *({"role": "user", "content": SHIPS}, second.output[0].to_dict()),
            {"role": "user", "content": LAND},
        ],
        instructions="be brief",
    )
    assert whole.usage.input_tokens_details.cached_tokens == 0
    assert told(api, whole) == [SEA, first.output_text, SHIPS, second.output_text, LAND]


def test_an_earlier_response_is_branched_from(api: openai.OpenAI) -> None:
    first = respond(api)
    second, other = (respond(api, text, previous_response_id=first.id) for text in (SHIPS, LAND))
    again = respond(api, LAND, previous_response_id=first.id)
    assert again.output_text == other.output_text
    for each in (second, other):
        more = respond(api, "go on", previous_response_id=each.id)
        assert more.usage.input_tokens_details.cached_tokens > 0
        assert told(api, more) == ["go on"]


def test_other_instructions_are_another_beginning(api: openai.OpenAI) -> None:
    first = respond(api, instructions="be brief")
    other = respond(api, SHIPS, previous_response_id=first.id, instructions="be long")
    assert (first.instructions, other.instructions) == ("be brief", "be long")
    assert other.usage.input_tokens_details.cached_tokens == 0
    assert other.usage.input_tokens > len(SEA) + len(first.output_text) + len(SHIPS)
    assert respond(api, "go on", previous_response_id=other.id).usage.input_tokens_details.cached_tokens > 0
    assert told(api, other) == [SHIPS]


def test_nothing_is_kept_without_store(api: openai.OpenAI, workers: list[Running]) -> None:
    first = respond(api, instructions="be brief")
    before = kept(workers[0])
    alone = respond(api, store=False)
    behind = respond(api, SHIPS, previous_response_id=first.id, store=False)
    assert behind.instructions == "be brief"
    assert behind.usage.input_tokens > len(SEA) + len(first.output_text) + len(SHIPS)
    assert kept(workers[0]) == before
    for found in (alone, behind):
        with pytest.raises(openai.NotFoundError):
            api.responses.retrieve(found.id)
        with pytest.raises(openai.NotFoundError):
            respond(api, "go on", previous_response_id=found.id)


@pytest.mark.slow
def test_what_is_behind_a_rewound_turn_needs_no_session_more(serving: Callable[..., Any], tmp_path: Path) -> None:
    with (
        LocalServer(tmp_path, listen="127.0.0.1:0", max_sessions=1) as service,
        serving(target=service.address) as running,
        running.loaded().client() as client,
        kvbank.connect(service.address) as owner,
    ):
        said = [{"role": "user", "content": SEA}, {"role": "assistant", "content": "yes"}]
        first = respond(client, [*said, {"role": "user", "content": SHIPS}])
        [session] = owner.sessions.list()
        lease = owner.sessions.acquire(session.session_id, "another").lease
        assert lease is not None
        owner.sessions.rewind(session.session_id, 0, epoch=lease.epoch)
        behind = respond(client, LAND, previous_response_id=first.id, store=False)
        assert behind.usage.input_tokens > len(SEA) + len(SHIPS) + len(first.output_text) + len(LAND)
        assert told(client, first) == [SEA, "yes", SHIPS]


ORDER = [
    *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    *("response.output_text.delta", "response.output_text.done", "response.content_part.done"),
    *("response.output_item.done", "response.incomplete"),
]


def test_a_stream_has_its_events_in_order(api: openai.OpenAI) -> None:
    whole = respond(api)
    events = list(respond(api, stream=True))
    kinds = [event.type for event in events]
    assert [kind for n, kind in enumerate(kinds) if n == 0 or kind != kinds[n - 1]] == ORDER
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1].response
    assert last == api.responses.retrieve(last.id)
    assert {event.item_id for event in deltas} == {last.output[0].id}
    assert events[0].response.id == last.id
    assert events[0].response.status == "in_progress"


def test_the_client_reads_a_stream_with_its_own_helper(api: openai.OpenAI) -> None:
    with api.responses.stream(model=MODEL, input=SEA, temperature=0, max_output_tokens=8) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"text": {"format": {"type": "json_object"}}}, "text"),
    ({"reasoning": {"effort": "high"}}, "reasoning"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"max_tool_calls": 3}, "max_tool_calls"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"extra_body": {"no_such": 1}}, "no_such"),
    ({"input": []}, "input"),
    ({"input": " "}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "o"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": SEA}, {"role": "assistant", "content": "yes"}]}, "input[1]"),
    ({"input": [{"role": "user", "content": SEA}, {"role": "system", "content": "no"}]}, "input[1]"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"truncation": "some"}, "truncation"),
    ({"metadata": {"a": "b" * 513}}, "metadata.a"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"background": True, "store": False}, "background"),
    ({"background": True, "stream": True}, "background"),
]


@pytest.mark.parametrize(("options", "param"), REFUSED)
def test_what_the_worker_does_not_do_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, **options)
    assert (refused.value.type, refused.value.param) == ("invalid_request_error", param)


def test_every_field_of_the_client_is_taken_or_refused_by_name(client: openai.OpenAI) -> None:
    """Send each field that the client's types have, with a value that asks for something of it."""
    taken = set(ResponseRequest.model_fields)
    named = set(ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert taken <= named
    for field in sorted(named - taken - {"parallel_tool_calls"}):
        with pytest.raises(openai.BadRequestError) as refused:
            respond(client, extra_body={field: ["something"]})
        assert refused.value.param == field
    assert ResponseCreateParams


def test_what_asks_for_nothing_is_taken(api: openai.OpenAI) -> None:
    nothing: dict[str, Any] = {
        **{"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "include": [], "user": "me"},
        **{"text": {"format": {"type": "text"}}, "reasoning": None, "service_tier": "auto", "top_logprobs": 0},
        **{"safety_identifier": "x", "stream_options": None, "previous_response_id": None, "prompt": None},
    }
    assert respond(api, **nothing).output_text == respond(api).output_text


@pytest.mark.parametrize("response", ["resp_none", "chatcmpl-1", "conv_1", "resp_" + "0" * 32])
def test_what_is_not_there_is_not_found(client: openai.OpenAI, response: str) -> None:
    responses = client.responses
    for call in (responses.retrieve, responses.delete, responses.cancel, responses.input_items.list):
        with pytest.raises(openai.NotFoundError) as missing:
            call(response)
        assert missing.value.code == "not_found"
    with pytest.raises(openai.NotFoundError):
        respond(client, previous_response_id=response)


def test_a_session_that_a_header_names_is_gone_on_with(api: openai.OpenAI) -> None:
    options = {"extra_headers": {"X-Kvbank-Session": "of responses"}}
    first = respond(api, **options)
    history = [{"role": "user", "content": SEA}, first.output[0].to_dict(), {"role": "user", "content": SHIPS}]
    second = respond(api, history, **options)
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert told(api, second) == [SEA, first.output_text, SHIPS]


def test_a_deleted_response_is_forgotten_in_all_branches(api: openai.OpenAI) -> None:
    history = [{"role": "user", "content": SEA}, {"role": "assistant", "content": "yes"}]
    first = respond(api, [*history, {"role": "user", "content": SHIPS}])
    second, other = (respond(api, LAND, previous_response_id=first.id) for _ in range(2))
    api.responses.delete(first.id)
    for call in (api.responses.retrieve, api.responses.delete, api.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    with pytest.raises(openai.NotFoundError):
        respond(api, previous_response_id=first.id)
    for each in (second, other):
        assert told(api, each) == [LAND]
        more = respond(api, "go on", previous_response_id=each.id)
        assert more.usage.input_tokens < len(LAND) + len("go on") + 2 * len(each.output_text) + 120
