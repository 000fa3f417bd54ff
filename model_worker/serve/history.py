"""What a client says of a conversation: a system prompt, what was said and answered, and what is said now (pure).

Clients send the whole conversation with each request. This file owns when a session is that conversation: where its
system prompt and its turns are, word for word, the beginning of what the client says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, groupby

from model_worker.errors import InputError
from model_worker.user_text import readable

# What ends one message where several of one role follow each other.
_BETWEEN = "\n\n"


class HistoryError(InputError):
    """Messages that are no conversation; `where` is the first one that is wrong, such as "messages[2]"."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(text)
        self.where = where


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. role: system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was said, and what was answered; one of them may be empty."""

    said: str
    answered: str


@dataclass(frozen=True, slots=True)
class History:
    """A conversation up to the answer that is wanted. said: what is said now, by the messages `last`."""

    system: str
    exchanges: tuple[Exchange, ...]
    said: str
    last: tuple[str, ...] = ()

    @classmethod
    def of(cls, messages: Sequence[Message], field: str = "messages") -> "History":
        """Return the conversation that messages are. Several of one role in a row are one message in paragraphs.

        field: of the request that has the messages. Raises HistoryError where there is nothing to answer.
        """
        system, rest = parted(messages, field)
        if not rest or rest[-1].role != "user":
            raise HistoryError(f"{field}[{max(0, len(messages) - 1)}]", "the last message is the user's")
        runs = [(role, [message.text for message in run]) for role, run in groupby(rest, lambda message: message.role)]
        last = runs.pop()[1]
        exchanges = exchanges_of([Message(role, joined(*texts)) for role, texts in runs])
        return cls(system, tuple(exchanges), joined(*last), tuple(last))

    def begins_with(self, system: str) -> bool:
        """Tell whether the system prompt of a session is this conversation's."""
        return _clean(system) == self.system

    def known(self, exchanges: Sequence[Exchange | None]) -> int:
        """Return how many of a session's exchanges are the beginning of this conversation.

        None is one that was forgotten: whatever the client still says there, the model is not told again.
        """
        count = 0
        for ours, theirs in zip(self.exchanges, exchanges, strict=False):
            if theirs is not None and (_clean(theirs.said), _clean(theirs.answered)) != (ours.said, ours.answered):
                break
            count += 1
        return count


def parted(messages: Sequence[Message], field: str) -> tuple[str, list[Message]]:
    """Return the system prompt that messages begin with, and the others. field: of the request that has the messages.

    Raises HistoryError for a system message behind others, and for what a user has not said.
    """
    clean = [Message(message.role, _clean(message.text)) for message in messages]
    rest = list(dropwhile(lambda message: message.role == "system", clean))
    begin = len(clean) - len(rest)
    for index, message in enumerate(rest, begin):
        if message.role == "system":
            raise HistoryError(f"{field}[{index}]", "a system message stands before all others")
        if message.role == "user" and not message.text:
            raise HistoryError(f"{field}[{index}]", "the message is empty")
    return joined(*(message.text for message in clean[:begin])), rest


def exchanges_of(messages: Sequence[Message]) -> list[Exchange]:
    """Return messages of users and assistants in pairs; one that has no other has an empty one."""
    found: list[Exchange] = []
    asked: str | None = None
    for message in messages:
        if message.role == "assistant":
            found.append(Exchange(asked or "", message.text))
            asked = None
            continue
        if asked is not None:
            found.append(Exchange(asked, ""))
        asked = message.text
    return found if asked is None else [*found, Exchange(asked, "")]


def _clean(text: str) -> str:
    """Return a text as a session keeps it."""
    return readable(text).strip()


def joined(*texts: str) -> str:
    """Return messages of one role as one text, in paragraphs."""
    return _BETWEEN.join(text for text in texts if text)
