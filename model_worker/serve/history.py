"""What a client says of a conversation: a system prompt, what was said and answered, and what is said now (pure).

Clients send the whole conversation with each request. This file owns when a session is that conversation: where its
system prompt and its turns are, word for word, the beginning of what the client says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model_worker.errors import InputError
from model_worker.user_text import readable

# What ends one message where several of one role follow each other.
_BETWEEN = "\n\n"


class HistoryError(InputError):
    """Messages that are no conversation; `index` is the number of the first one that is wrong."""

    def __init__(self, index: int, text: str) -> None:
        super().__init__(text)
        self.index = index


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. role: system, user or assistant."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was said, and what was answered."""

    said: str
    answered: str


@dataclass(frozen=True, slots=True)
class History:
    """A conversation up to the answer that is wanted. said: what is said now."""

    system: str
    exchanges: tuple[Exchange, ...]
    said: str

    @classmethod
    def of(cls, messages: Sequence[Message]) -> "History":
        """Return the conversation that messages are. Several of one role in a row are one message in paragraphs.

        Raises HistoryError where there is nothing to answer, or an answer without a question.
        """
        system, rest = [], list(enumerate(messages))
        while rest and rest[0][1].role == "system":
            system.append(_clean(rest.pop(0)[1].text))
        found: list[tuple[str, str]] = []
        for index, message in rest:
            text = _clean(message.text)
            if message.role == "system":
                raise HistoryError(index, "a system message stands before all others")
            if message.role == "assistant" and not found:
                raise HistoryError(index, "the first message behind those of the system is the user's")
            if message.role == "user" and not text:
                raise HistoryError(index, "the message is empty")
            if found and found[-1][0] == message.role:
                text = _joined(found.pop()[1], text)
            found.append((message.role, text))
        if not found or found[-1][0] != "user":
            raise HistoryError(max(0, len(messages) - 1), "the last message is the user's")
        pairs = zip(found[:-1:2], found[1::2], strict=True)
        exchanges = tuple(Exchange(said, answered) for (_, said), (_, answered) in pairs)
        return cls(_joined(*system), exchanges, found[-1][1])

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


def _clean(text: str) -> str:
    """Return a text as a session keeps it."""
    return readable(text).strip()


def _joined(*texts: str) -> str:
    return _BETWEEN.join(text for text in texts if text)
