"""Responses that are kept: turns with notes of what their requests asked for, which any worker finds by their keys."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import kvbank
from model_worker.serve.answering import NOTES, own_key
from model_worker.serve.items import MessageItem, items_of
from model_worker.serve.usage import Before, Usage


@dataclass(frozen=True, slots=True)
class Stored:
    """A response that has ended. notes: of its request. system: the system prompt that it was made with."""

    turn: kvbank.Turn
    notes: Mapping[str, Any]
    system: str

    @property
    def usage(self) -> Usage:
        """Return the tokens of its request."""
        return Before(**self.notes["before"]).usage(self.turn)

    @property
    def own(self) -> int:
        """Return how many exchanges its request said before its question; each is a turn before this one."""
        return int(self.notes["own"])

    @property
    def status(self) -> str:
        """Return how it ended: completed, incomplete, or cancelled by its caller."""
        return "cancelled" if self.notes["left"] else self.turn.status


def stored(client: kvbank.Client, key: str) -> Stored:
    """Return the response of a key. Raises kvbank.TurnNotFound where there is none, and for any other turn."""
    turn = client.sessions.turn(key)
    session = client.sessions.get(turn.session_id)
    try:
        found = Stored(turn, json.loads(turn.metadata[NOTES]), session.settings.get("system", ""))
        found.usage, found.own, found.status  # noqa: B018 -- of notes that no worker has written there is none
    except (KeyError, TypeError, ValueError):
        raise kvbank.TurnNotFound("the turn is no response") from None
    return found


def forget(client: kvbank.Client, response: Stored) -> None:
    """Forget a response with what its request said, for good and in all branches."""
    for key in (*(own_key(response.turn.key, number) for number in range(response.own)), response.turn.key):
        with suppress(kvbank.TurnNotFound):  # the session knew it already, or it is forgotten
            client.sessions.forget_turn(key)


def input_items(client: kvbank.Client, response: Stored) -> Iterator[MessageItem]:
    """Yield what the request of a response said, the last first."""
    yield from (item for item in reversed(items_of(response.turn)) if item.role != "assistant")
    if response.own:
        line = list(client.sessions.turns_to(response.turn.key))[:-1]
        before = (turn for turn in reversed(line) if turn.status != "part")
        for turn in islice(before, response.own):
            yield from reversed(items_of(turn))
