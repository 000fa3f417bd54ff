"""Chat completions, as the official client of OpenAI asks for them."""

from datetime import timedelta
from typing import Any

import openai
import pytest
from openai.types import CompletionUsage

from tests.worker_http.conftest import CHUNK, MODEL, Running

SAID = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the sea is wide"}]


def ask(client: openai.OpenAI, messages: list[Any] = SAID, **options: Any) -> Any:
    wanted = {"model": MODEL, "temperature": 0, "max_completion_tokens": 12, **options}
    return client.chat.completions.create(messages=messages, **wanted)


def test_an_answer(client: openai.OpenAI) -> None:
    found = ask(client)
    assert (found.object, found.model, len(found.choices)) == ("chat.completion", MODEL, 1)
    choice = found.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert found.usage.completion_tokens == 12
    assert found.usage.prompt_tokens > len("be brief") + len("the sea is wide")
    assert found.usage.total_tokens == found.usage.prompt_tokens + 12
    assert ask(client).choices[0].message.content == choice.message.content


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert isinstance(chunks[-1].usage, CompletionUsage)
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI) -> None:
    whole = ask(client, max_completion_tokens=24).choices[0].message.content
    stop = whole[len(whole) // 2]
    expected = whole[: whole.index(stop)]
    for stops in (stop, ["\u1234", stop]):
        found = ask(client, max_completion_tokens=24, stop=stops).choices[0]
        assert (found.message.content, found.finish_reason) == (expected, "stop")
    chunks = list(ask(client, max_completion_tokens=24, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_the_same_seed_draws_the_same_answer(client: openai.OpenAI) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "max_completion_tokens": 24}
    answers = [ask(client, seed=seed, **options).choices[0].message.content for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_temperature_of_almost_nothing_takes_the_likeliest_token(client: openai.OpenAI) -> None:
    def answered(temperature: float, session: str = "", **options: Any) -> str:
        named = {"X-Kvbank-Session": session} if session else {}
        found = ask(client, temperature=temperature, extra_headers=named, **options)
        return str(found.choices[0].message.content)

    assert answered(1e-300) == answered(1e-300, top_p=0.5) == answered(0)
    assert answered(1e-300, "almost", top_p=0.5) == answered(0, "none")


def test_content_in_parts_is_one_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "the sea "}, {"type": "text", "text": "is wide"}]
    whole = ask(client).choices[0].message.content
    said = [
        {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": parts},
    ]
    assert ask(client, said).choices[0].message.content == whole


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"no_such": 1}}, "no_such"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0]"),
        ({"messages": [*SAID, {"role": "assistant", "content": "yes"}]}, "messages[2]"),
        ({"messages": [*SAID, {"role": "system", "content": "no"}]}, "messages[2]"),
        ({"messages": [{"role": "assistant", "content": "yes"}]}, "messages[0]"),
        ({"extra_headers": {"X-Kvbank-Session": "a" * 201}}, "X-Kvbank-Session"),
    ],
)
def test_what_the_worker_does_not_do_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **options)
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == param or (param is None and refused.value.param.startswith("messages[0].content"))
    assert param is None or param in str(refused.value) or param.startswith("messages")


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    nothing: dict[str, Any] = {
        **{"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "frequency_penalty": 0.0, "user": "me"},
        **{"response_format": {"type": "text"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        **{"metadata": {"a": "b"}, "logit_bias": None, "reasoning_effort": None, "presence_penalty": 0},
    }
    assert ask(client, **nothing).choices[0].message.content == ask(client).choices[0].message.content


def test_another_model_is_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model="gpt-4")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "kvbank"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def kept(worker: Running) -> list[str]:
    """Return the sessions and chunks that the service has."""
    with worker.served.clients.client("none") as service:
        chunks = [f"{bank.name} {c.chunk_id}" for bank in service.list_banks() for c in service.list_chunks(bank.name)]
        return sorted([*chunks, *(session.session_id for session in service.sessions.list())])


def test_nothing_is_kept_of_a_request_without_a_session(worker: Running, client: openai.OpenAI) -> None:
    before = kept(worker)
    found = ask(client, [{"role": "user", "content": "a long story " * 12}], max_completion_tokens=8)
    assert found.usage.prompt_tokens_details.cache_write_tokens > 0
    assert kept(worker) == before
    with worker.served.clients.client("none") as service:
        banks = [bank for bank in service.list_banks() if bank.name.startswith("requests-")]
    assert [bank.expiry is not None and bank.expiry.ttl for bank in banks] == [timedelta(days=1)]


@pytest.mark.slow
def test_nothing_is_kept_of_a_request_of_more_chunks_than_one_call_deletes(
    worker: Running, client: openai.OpenAI
) -> None:
    before = kept(worker)
    found = ask(client, [{"role": "user", "content": "a long story " * 1300}], max_completion_tokens=2)
    assert found.usage.prompt_tokens_details.cache_write_tokens > 1000 * CHUNK
    assert kept(worker) == before
