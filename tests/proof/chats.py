"""Conversations over HTTP with workers that take turns, and an oracle by content: what each client was answered must be
in the service, once, in its order, and with nothing of anybody else."""

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import openai

import kvbank

WORDS = "the sea is wide and ships come go who sails them over blue water by night".split()
MODEL = "tiny"
# Seconds after which a message that no worker answers is lost: longer than a lease, which a dead worker may have left.
PATIENCE = 90.0
# The most seconds before a message is said again.
_PAUSE = 1.0


class Talker:
    """A client that sends its whole history each time, to one worker after the other.

    heard: what was said and answered. asked: how often what happened: "answers", "tokens" of them, "retries", and
    statuses such as "409". waits: the seconds until each answer.
    """

    def __init__(self, name: str, urls: Sequence[str], seed: int, first: int = 0) -> None:
        """Talk in the conversation of a name. first: the worker that is asked first."""
        self.name, self.heard, self.asked = name, list[tuple[str, str]](), Counter[str]()
        self.waits = list[float]()
        self._choose = random.Random(seed)
        self.move(urls, first)

    def move(self, urls: Sequence[str], first: int = 0) -> None:
        """Ask these workers from now on."""
        options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE}
        made = [openai.OpenAI(base_url=f"{url}/v1", **options) for url in urls]
        self._turns: Iterator[openai.OpenAI] = cycle([*made[first:], *made[:first]])

    def say(self, tokens: int = 12) -> Any:
        """Say something new until it is answered, and return the usage. Errors: AssertionError where no worker answers
        in time; openai.APIStatusError for an answer that says more than to ask again."""
        text = f"{self.name} {len(self.heard)}: {' '.join(self._choose.choices(WORDS, k=8))}"
        roles = ("user", "assistant")
        messages: list[Any] = [
            {"role": role, "content": said} for pair in self.heard for role, said in zip(roles, pair, strict=True)
        ]
        messages.append({"role": "user", "content": text})
        begun = time.monotonic()
        while (found := self._ask(next(self._turns), messages, tokens)) is None:
            self.asked["retries"] += 1
            assert time.monotonic() - begun < PATIENCE, f"{text!r} was not answered: {dict(self.asked)}"
        self.waits.append(time.monotonic() - begun)
        self.heard.append((text, found.choices[0].message.content))
        self.asked["answers"] += 1
        self.asked["tokens"] += found.usage.completion_tokens
        return found.usage

    def _ask(self, client: openai.OpenAI, messages: list[Any], tokens: int) -> Any:
        """Ask a worker for an answer; None where the message is to be said again."""
        wanted = {"model": MODEL, "temperature": 0, "max_completion_tokens": tokens}
        try:
            headers = {"X-Kvbank-Session": self.name}
            return client.chat.completions.create(messages=messages, extra_headers=headers, **wanted)
        except openai.APIConnectionError:
            self.asked["gone"] += 1
            time.sleep(0.02)
        except openai.APIStatusError as error:
            if error.status_code not in (409, 429, 503):
                raise
            self.asked[str(error.status_code)] += 1
            time.sleep(min(float(error.response.headers.get("retry-after", _PAUSE)), _PAUSE))
        return None


def wrong(client: kvbank.Client, talkers: Sequence[Talker]) -> list[str]:
    """Return what in the service is not as the talkers have heard it, a sentence each."""
    return [f"{talker.name}: {text}" for talker in talkers for text in _wrong(client, talker)]


def _wrong(client: kvbank.Client, talker: Talker) -> Iterator[str]:
    whole = 0
    for session in _sessions(client, talker.name):
        turns = list(client.sessions.turns(session.session_id, token_ids=True))
        pairs = [(turn.text("user"), turn.text("assistant")) for turn in turns if turn.status != "part"]
        whole += pairs == talker.heard
        if [turn.number for turn in turns] != list(range(1, len(turns) + 1)):
            yield f"its turns are {[turn.number for turn in turns]}"
        if alien := [text for pair in pairs for text in pair[:1] if not text.startswith(f"{talker.name} ")]:
            yield f"it has turns of others: {alien}"
        if len({said for said, _ in pairs}) < len(pairs):
            yield f"it has a turn twice: {pairs}"
        if half := [said for said, answer in pairs if not answer]:
            yield f"turns of it have no answer: {half}"
        # An answer that was lost on its way may be there besides; what was said again went another way.
        same = next(
            (at for at, (one, other) in enumerate(zip(pairs, talker.heard, strict=False)) if one != other), None
        )
        common = min(len(pairs), len(talker.heard)) if same is None else same
        if len(pairs) > common + 1:
            yield f"behind turn {common} it has {pairs[common:]}, which nobody was answered"
        yield from _wrong_chunks(client, session, turns)
    if talker.heard and whole != 1:
        yield f"{whole} sessions have all that was said"


def _sessions(client: kvbank.Client, name: str) -> list[kvbank.Session]:
    found = {session.session_id: session for session in client.sessions.list({"conversation": name})}
    return list(found.values())


def _wrong_chunks(client: kvbank.Client, session: kvbank.Session, turns: Sequence[kvbank.Turn]) -> Iterator[str]:
    """Compare the chunks of a session with its tokens."""
    said = [token for turn in turns for token in turn.token_ids]
    places = Counter[int]()
    try:
        chunks = list(client.list_chunks(session.bank, filter=session.filter))
    except kvbank.BankNotFound:  # nothing has left the window yet
        return
    for chunk in chunks:
        end = chunk.start + len(chunk.token_ids)
        places.update(range(chunk.start, end))
        if list(chunk.token_ids) != said[chunk.start : end]:
            yield f"chunk {chunk.chunk_id} has other tokens than the turns"
    if twice := [at for at, times in places.items() if times > 1]:
        yield f"tokens are in the bank twice: {sorted(twice)[:9]}"
