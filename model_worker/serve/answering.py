"""What a request does in its thread: find its session, feed what the session has not seen, and let the model answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kvbank
from model_worker.serve.conversations import Conversation, Conversations
from model_worker.serve.engine import Turn
from model_worker.serve.history import History
from model_worker.window.generation import COLDEST

# Seconds for a first answer of the service, before the model waits for it.
START_S = 3.0


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is decoded.

    max_new_tokens: tokens of the longest answer. temperature: 0 takes the likeliest token. top_p: share of the
    likeliest tokens from which one is drawn. seed: of the random numbers; None: another one each time. stop: texts
    before which the answer ends.
    """

    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def draws(self) -> bool:
        """Tell whether tokens are drawn; else each one is the likeliest."""
        return self.temperature >= COLDEST

    def generation(self) -> dict[str, Any]:
        """Return the options of `generate` that are not of every request."""
        return {"top_p": self.top_p} if self.draws and self.top_p < 1 else {}


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked. history: ends with what is to be answered.

    key: of the turn that the answer becomes, and the id that the caller gets: by it any worker finds the turn.
    """

    key: str
    history: History
    decoding: Decoding


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request. prompt: what the model had before it when it answered.

    cached: those of them that were not fed in this request: they stood in the window, or were recalled. written: tokens
    that the request has written to the memory.
    """

    prompt: int
    completion: int
    cached: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The whole answer to a request. cut: it reached its longest length, or its caller left."""

    text: str
    cut: bool
    usage: Usage


def answer(
    conversations: Conversations,
    client: kvbank.Client,
    turn: Turn,
    *,
    name: str,
    question: Question,
    on_text: Callable[[str], None],
) -> Reply:
    """Answer a question in a session, and return the whole answer once it is durable.

    name: of the session. on_text: called with pieces of the answer as they come. Raises what sessions and the service
    raise, and Left.
    """
    history, decoding = question.history, question.decoding
    client.server_info(timeout=START_S)  # without the model, which others would wait for
    known = conversations.find(client, name, history)
    with (
        turn.holding_model(decoding.seed),
        conversations.opened(client, name, history, known, turn.progress) as conversation,
    ):
        told = [
            conversation.session.tell(exchange.said, exchange.answered, progress=turn.progress)
            for exchange in conversation.unknown
        ]
        said = conversation.session.say(
            history.said,
            key=question.key,
            on_text=on_text,
            stopped=turn.stopped,
            stop=decoding.stop,
            progress=turn.progress,
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            **decoding.generation(),
        )
        return Reply(said.text("assistant"), said.status != "completed", _usage(conversation, [*told, said]))


def _usage(conversation: Conversation, turns: list[kvbank.Turn]) -> Usage:
    """Return the tokens of a request. turns: those that it has appended, the answer last."""
    counts = [turn.usage for turn in turns]
    fed = sum(count["prompt_tokens"] + count["output_tokens"] for count in counts) + conversation.again
    completion = counts[-1]["output_tokens"]
    stood = min(counts[0]["cached_tokens"], conversation.tokens)
    cached = max(0, stood - conversation.again)
    return Usage(
        prompt=cached + fed - completion,
        completion=completion,
        cached=cached,
        written=conversation.session.memory.kept - conversation.kept,
    )
