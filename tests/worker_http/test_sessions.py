"""Which session a request goes on with: by its name, and by what was said."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

import kvbank
from model_worker.serve.engine import Turn
from tests.worker_http.conftest import MODEL, Running
from tests.worker_http.test_chat import ask

WORDS = ["the sea is wide", "ships come and go", "what did I say of the sea?"]
LONG = "once upon a time there was a sailor who had seen all seas"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def talk(client: openai.OpenAI, words: list[str], **options: Any) -> tuple[list[Any], list[Any]]:
    """Say one thing after the other, with the whole history each time; return the messages and the answers."""
    messages, found = [], []
    for text in words:
        messages.append(user(text))
        found.append(ask(client, messages, **options))
        messages.append({"role": "assistant", "content": found[-1].choices[0].message.content})
    return messages, found


def test_what_a_session_has_seen_is_not_fed_again(client: openai.OpenAI) -> None:
    _, alone = talk(client, WORDS)
    _, found = talk(client, WORDS, extra_headers={"X-Kvbank-Session": "seen"})
    usages = [each.usage for each in found]
    assert usages[0].prompt_tokens_details.cached_tokens == 0
    for before, after, text in zip(usages, usages[1:], WORDS[1:], strict=False):
        assert after.prompt_tokens_details.cached_tokens > 0
        fed = after.prompt_tokens - after.prompt_tokens_details.cached_tokens
        assert len(text) < fed < len(text) + before.completion_tokens + 24
    assert sum(usage.prompt_tokens_details.cache_write_tokens for usage in usages) > 0
    assert [each.usage.prompt_tokens_details.cached_tokens for each in alone] == [0, 0, 0]


def test_a_session_that_was_heard_elsewhere_is_told_the_rest(client: openai.OpenAI) -> None:
    """Two turns took place in one session; another one gets them as history, and knows them from then on."""
    messages, _ = talk(client, WORDS[:2])
    options = {"extra_headers": {"X-Kvbank-Session": "told"}}
    first = ask(client, [*messages, user(WORDS[2])], **options)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    answered = {"role": "assistant", "content": first.choices[0].message.content}
    second = ask(client, [*messages, user(WORDS[2]), answered, user("and then?")], **options)
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert second.usage.prompt_tokens - second.usage.prompt_tokens_details.cached_tokens < 60


def test_the_id_of_an_answer_is_the_key_of_its_turn(worker: Running, client: openai.OpenAI) -> None:
    found = ask(client, [user(WORDS[0])], extra_headers={"X-Kvbank-Session": "key"})
    streamed = list(ask(client, [user(WORDS[1])], extra_headers={"X-Kvbank-Session": "other key"}, stream=True))
    with worker.served.clients.client("none") as service:
        turn = service.sessions.turn(found.id)
        assert (turn.text("user"), turn.text("assistant")) == (WORDS[0], found.choices[0].message.content)
        assert service.sessions.turn(streamed[0].id).text("user") == WORDS[1]


def test_a_changed_beginning_is_another_branch_and_both_go_on(client: openai.OpenAI) -> None:
    options = {"extra_headers": {"X-Kvbank-Session": "branches"}}
    messages, _ = talk(client, WORDS, **options)
    other = ask(client, [*messages[:2], user("no, the land is wide")], **options)
    assert other.usage.prompt_tokens_details.cached_tokens < other.usage.prompt_tokens
    for history, answer in (([*messages[:2], user("no, the land is wide")], other), (messages[:-1], None)):
        text = messages[-1]["content"] if answer is None else answer.choices[0].message.content
        more = ask(client, [*history, {"role": "assistant", "content": text}, user("go on")], **options)
        fed = more.usage.prompt_tokens - more.usage.prompt_tokens_details.cached_tokens
        assert fed < 60 + len("go on")


def test_the_names_of_sessions_count_in_their_order(client: openai.OpenAI) -> None:
    """Ask in ways that all name the session "two"; the last one wants nothing kept."""
    named: list[dict[str, Any]] = [
        {"extra_headers": {"X-Kvbank-Session": "two", "session-id": "one"}},
        {"extra_headers": {"X-Claude-Code-Session-Id": "one", "session-id": "two"}},
        {"extra_headers": {"x-session-affinity": "two"}, "prompt_cache_key": "three"},
        {"prompt_cache_key": "two", "metadata": {"session_id": "three"}},
        {"metadata": {"session_id": "two"}},
        {"metadata": {"session_id": "two"}, "store": False},
    ]
    messages, cached = list[dict[str, str]](), []
    for options in named:
        messages.append(user("go on"))
        found = ask(client, messages, max_completion_tokens=1, **options)
        messages.append({"role": "assistant", "content": found.choices[0].message.content})
        cached.append(found.usage.prompt_tokens_details.cached_tokens > 0)
    assert cached == [False, True, True, True, True, False]


def test_a_prompt_longer_than_the_window_is_remembered(client: openai.OpenAI) -> None:
    options = {"extra_headers": {"X-Kvbank-Session": "long"}}
    found = ask(client, [user(" and ".join([LONG] * 4))], **options)
    assert found.usage.prompt_tokens_details.cache_write_tokens > 100
    assert found.model == MODEL


def test_a_session_that_goes_another_way_meanwhile_is_not_taken(worker: Running, client: openai.OpenAI) -> None:
    # While the request waits for the model, its session gets another turn in the place of the one that it knew.
    options = {"extra_headers": {"X-Kvbank-Session": "meanwhile"}}
    messages, _ = talk(client, WORDS[:2], **options)
    has, free = threading.Event(), threading.Event()

    def holding(turn: Turn) -> None:
        with turn.holding_model():
            has.set()
            free.wait(60)

    with worker.served.clients.client("none") as service, ThreadPoolExecutor(1) as pool:
        holder = worker.served.engine.submit("another", "another", holding)
        try:
            assert has.wait(60)
            answered = pool.submit(ask, client, [*messages[:2], user("the sky is wide")], **options)
            fork = _fork_of(service, "meanwhile")
            lease = service.sessions.acquire(fork, "another worker").lease
            assert lease is not None
            service.sessions.rewind(fork, 0, epoch=lease.epoch)
            other = kvbank.Turn([kvbank.Item("user", "no"), kvbank.Item("assistant", "yes")], [5, 6, 7])
            service.sessions.append(fork, [other], epoch=lease.epoch, follows=0)
            service.sessions.release(fork, lease.epoch)
        finally:
            free.set()
        holder.result.result(60)
        assert answered.result(60).choices[0].message.content
        assert [turn.text("user") for turn in service.sessions.turns(fork)] == ["no"]


def _fork_of(service: kvbank.Client, name: str) -> str:
    """Wait for the fork of the session of a name, and return its id."""
    deadline = time.monotonic() + 60
    while True:
        found = [session for session in service.sessions.list({"conversation": name}) if not session.name]
        if found:
            return found[0].session_id
        assert time.monotonic() < deadline
        time.sleep(0.01)
