"""The messages of a conversation one by one: what was said in its turns, each by an id.

This file owns the ids: `msg_KEY_N` is the N-th message of the turn of a key, so that any worker finds the message by
its id alone. Empty messages, of turns in which only one side spoke, are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import kvbank

_PREFIX = "msg_"
# Turns that are read at a time, from the last one to the first.
_BLOCK = 50


@dataclass(frozen=True, slots=True)
class MessageItem:
    """One message of a turn. key: of its turn. place: in its turn. complete: it was not cut off."""

    key: str
    place: int
    role: str
    text: str
    complete: bool = True

    @property
    def id(self) -> str:
        """Return the id by which the message is found."""
        return item_id(self.key, self.place)


def item_id(key: str, place: int) -> str:
    """Return the id of a message. key: of its turn. place: in its turn."""
    return f"{_PREFIX}{key}_{place}"


def items_of(turn: kvbank.Turn) -> list[MessageItem]:
    """Return the messages of a turn."""
    cut = turn.status == "incomplete"
    return [
        MessageItem(turn.key, place, item.role, item.text, complete=not (cut and item.role == "assistant"))
        for place, item in enumerate(turn.items)
        if item.text or (cut and item.role == "assistant")
    ]


def turn_of(client: kvbank.Client, session_id: str, item: str) -> kvbank.Turn:
    """Return the turn of a session that has the message of an id. Raises kvbank.TurnNotFound where it has none."""
    key, _, place = item.removeprefix(_PREFIX).rpartition("_")
    if item.startswith(_PREFIX) and key and place.isdecimal():
        number = client.sessions.turn(key).number
        found = next(client.sessions.turns(session_id, number - 1), None)
        if found is not None and found.key == key and any(each.id == item for each in items_of(found)):
            return found
    raise kvbank.TurnNotFound("the conversation has no such item")


def listed(client: kvbank.Client, session_id: str, *, newest_first: bool, after: str = "") -> Iterator[MessageItem]:
    """Yield the messages of a session. after: the id of the one behind which they begin, in their order.

    Raises kvbank.SessionNotFound, and kvbank.TurnNotFound for an `after` that the session does not have.
    """
    last = turn_of(client, session_id, after) if after else None
    for turn in (_backwards if newest_first else _onwards)(client, session_id, last):
        items = items_of(turn)
        if newest_first:
            items.reverse()
        if last is not None and turn.number == last.number:
            items = items[[item.id for item in items].index(after) + 1 :]
        yield from items


def _onwards(client: kvbank.Client, session_id: str, first: kvbank.Turn | None) -> Iterator[kvbank.Turn]:
    """Yield turns, oldest first, from one of them on."""
    return client.sessions.turns(session_id, 0 if first is None else first.number - 1)


def _backwards(client: kvbank.Client, session_id: str, first: kvbank.Turn | None) -> Iterator[kvbank.Turn]:
    """Yield turns, newest first, from one of them on."""
    end = client.sessions.get(session_id).head if first is None else first.number
    while end:
        after = max(0, end - _BLOCK)
        block = client.sessions.turns(session_id, after)
        yield from reversed(list(takewhile(lambda turn: turn.number <= end, block)))  # noqa: B023
        end = after
