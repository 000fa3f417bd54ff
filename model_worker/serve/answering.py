"""What a request does in its thread: find its session, feed what the session has not seen, and let the model answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import kvbank
from model_worker.serve.conversations import Conversation, Conversations
from model_worker.serve.engine import Turn
from model_worker.serve.history import Exchange, History
from model_worker.serve.places import AtEnd, Place
from model_worker.serve.usage import Usage
from model_worker.window.generation import COLDEST

# Seconds for a first answer of the service, before the model waits for it.
START_S = 3.0
# The metadata of a turn that say what its request asked for.
NOTES = "response"


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

    key: of the turn that the answer becomes, and the id that the caller gets: by it any worker finds the turn. own: so
    many of the last exchanges of the history are said by this request. notes: what is kept with the turn besides, as
    JSON; None for nothing. check: called before the turn is appended; raises where it is wanted no more.
    """

    key: str
    history: History
    decoding: Decoding
    own: int = 0
    notes: Mapping[str, Any] | None = None
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Reply:
    """The whole answer to a request. cut: it reached its longest length, or its caller left; left: its caller left.

    system: the system prompt of its conversation.
    """

    text: str
    cut: bool
    usage: Usage
    left: bool = False
    system: str = ""


def answer(
    conversations: Conversations,
    client: kvbank.Client,
    turn: Turn,
    *,
    place: Place,
    question: Question,
    on_text: Callable[[str], None],
) -> Reply:
    """Answer a question in a session, and return the whole answer once it is durable.

    on_text: called with "" when the session is there, then with pieces of the answer as they come. Raises what sessions
    and the service raise, and Left.
    """
    client.server_info(timeout=START_S)  # without the model, which others would wait for
    found = place.find(client, question.history)
    with (
        conversations.opened(client, place, question.history, found) as conversation,
        turn.holding_model(question.decoding.seed),
    ):
        conversation.fit(turn)
        on_text("")
        _tell(conversation, question, turn)
        return _say(conversation, question, turn, on_text)


def add(
    conversations: Conversations, client: kvbank.Client, turn: Turn, *, session_id: str, exchanges: Sequence[Exchange]
) -> list[kvbank.Turn]:
    """Add exchanges that took place elsewhere to a session, and return their turns. Raises what `answer` raises.

    Where this raises, none of them is in the session, unless the session was lost meanwhile.
    """
    place, nothing = AtEnd(session_id), History("", (), "")
    found = place.find(client, nothing)
    with conversations.opened(client, place, nothing, found) as conversation, turn.holding_model():
        conversation.fit(turn)
        session, before = conversation.session, conversation.session.info.head
        epoch = session.record.lease.epoch
        try:
            return [session.tell(each.said, each.answered, progress=turn.progress) for each in exchanges]
        except BaseException:
            if session.record.lease.epoch == epoch:  # else turns of another worker may be among them
                with suppress(kvbank.KVBankError):
                    session.record.rewind(before)
            raise


def _tell(conversation: Conversation, question: Question, turn: Turn) -> None:
    """Tell a session what it has not seen. What the request says itself has keys that `own_key` makes."""
    unknown = conversation.unknown
    for number, exchange in enumerate(unknown, question.own - len(unknown)):
        key = own_key(question.key, number) if number >= 0 else ""
        told = conversation.session.tell(exchange.said, exchange.answered, key=key, progress=turn.progress)
        conversation.before = conversation.before.and_told(told)


def own_key(key: str, number: int) -> str:
    """Return the key of the turn of an exchange that a request says before its question. key: of the answer's turn."""
    return f"{key}-{number}"


def _say(conversation: Conversation, question: Question, turn: Turn, on_text: Callable[[str], None]) -> Reply:
    """Let the model answer, and return the whole answer."""
    session, decoding, said = conversation.session, question.decoding, question.history
    session.window.step = turn.step
    left = False

    def noted() -> dict[str, str]:
        """Return the metadata of the turn, whose answer is there."""
        nonlocal left
        with turn.lending_model():
            question.check()
        left = turn.left
        before = replace(conversation.before, written=session.memory.kept - conversation.kept)
        conversation.before = before
        if question.notes is None:
            return {}
        return {NOTES: json.dumps({**question.notes, "before": asdict(before), "left": left}, ensure_ascii=False)}

    made = session.say(
        said.said,
        key=question.key,
        items=None if question.notes is None else [kvbank.Item("user", text) for text in said.last],
        on_text=on_text,
        stopped=lambda: turn.left or session.record.lease.lost,
        stop=decoding.stop,
        progress=turn.progress,
        metadata=noted,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        **decoding.generation(),
    )
    usage, system = conversation.before.usage(made), session.info.settings.get("system", "")
    return Reply(made.text("assistant"), made.status != "completed", usage, left, system)
