"""Which session a request goes on with: by its name, and by what was said."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

import kvbank
from memory_service.api.embedded import LocalServer
from memory_service.domain.limits import Pauses
from model_worker.serve.answering import Decoding, Question
from model_worker.serve.history import History, Message
from model_worker.serve.places import Found, Named
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


@dataclass(frozen=True)
class Overtaken(Named):
    """The place of a name whose session gets another turn, from another worker, once it is found the first time."""

    found: list[str] = field(default_factory=list)

    def find(self, client: kvbank.Client, history: History, *, fork: bool = False) -> Found:
        found = super().find(client, history, fork=fork)
        if not self.found and found.session is not None:
            self.found.append(found.session.session_id)
            lease = client.sessions.acquire(self.found[0], "another worker").lease
            assert lease is not None
            client.sessions.rewind(self.found[0], 0, epoch=lease.epoch)
            other = kvbank.Turn([kvbank.Item("user", "no"), kvbank.Item("assistant", "yes")], [5, 6, 7])
            client.sessions.append(self.found[0], [other], epoch=lease.epoch, follows=0)
            client.sessions.release(self.found[0], lease.epoch)
        return found


def test_a_session_that_goes_another_way_meanwhile_is_not_taken(worker: Running, client: openai.OpenAI) -> None:
    messages, _ = talk(client, WORDS[:2], extra_headers={"X-Kvbank-Session": "meanwhile"})
    history = History.of([Message(**each) for each in _texts([*messages[:2], user("the sky is wide")])])
    place, question = Overtaken("meanwhile"), Question("overtaken", history, Decoding(8, 0.0))
    assert worker.served.answer("none", place, question, lambda _: None).result.result(60).text
    with worker.served.clients.client("none") as service:
        assert [turn.text("user") for turn in service.sessions.turns(place.found[0])] == ["no"]
        answered = service.sessions.turn("overtaken")
        turns = [turn.text("user") for turn in service.sessions.turns(answered.session_id)]
        assert turns == [WORDS[0], "the sky is wide"]


def _texts(messages: list[Any]) -> list[dict[str, str]]:
    return [{"role": each["role"], "text": each["content"]} for each in messages]


def test_a_service_that_is_slow_for_one_session_stops_no_other(serving: Callable[..., Any], tmp_path: Path) -> None:
    """Let the service stand still while it hands over the window of one session, and let another one answer."""
    armed, inside, go_on = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        if armed.is_set():
            armed.clear()
            inside.set()
            assert go_on.wait(120)

    slow, quick = ({"extra_headers": {"X-Kvbank-Session": name}} for name in ("slow", "quick"))
    with (
        LocalServer(tmp_path, listen="127.0.0.1:0", pauses=Pauses(at={"window opened": wait})) as service,
        serving(target=service.address) as running,
        running.loaded().client(timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        messages, _ = talk(client, WORDS[:1], **slow)
        try:
            armed.set()
            waiting = pool.submit(ask, client, [*messages, user(WORDS[1])], **slow)
            assert inside.wait(60)
            assert ask(client, [user(WORDS[0])], **quick).choices[0].message.content
            assert not waiting.done()
        finally:
            go_on.set()
        assert waiting.result(60).usage.prompt_tokens_details.cached_tokens > 0
