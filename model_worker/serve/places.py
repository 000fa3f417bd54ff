"""Where a request goes on: in the session of a name, behind a turn, or at the end of a session.

This file owns which session a request takes. Of the sessions of a name that is the one with which the request has most
turns in common. Where the request goes another way than that session did, or comes behind a turn that is not the last
one, it gets a fork, which has the turns up to there; the other session stays as it is.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import kvbank
from model_worker.serve.history import Exchange, History, HistoryError, joined

# The metadata by which forks are found that have no name of their own, since a name is of one session.
CONVERSATION = "conversation"
# Of so many sessions of a name, those that were used last, what was said is compared.
_MOST_BRANCHES = 32


@dataclass(frozen=True, slots=True)
class Found:
    """The session of a request. session: None for one that is to be begun.

    unknown: exchanges that the session has not seen, and is told first. system: its system prompt; None for the one
    that it has.
    """

    session: kvbank.Session | None
    unknown: tuple[Exchange, ...]
    system: str | None = None


class Place(Protocol):
    """Where a request goes on.

    name: by which its session is found. holder: of the lease that its session is under already, or None. forks: whether
    a session that another request has is left for a fork of it.
    """

    @property
    def name(self) -> str: ...

    @property
    def holder(self) -> str | None: ...

    @property
    def forks(self) -> bool: ...

    @property
    def line(self) -> Hashable:
        """Return what requests have in common that are answered one after the other."""

    def find(self, client: kvbank.Client, history: History, *, fork: bool = False) -> Found:
        """Return the session of a request. fork: a new fork, where the place `forks`."""

    def fits(self, turns: Sequence[kvbank.Turn], found: Found, history: History) -> bool:
        """Tell whether a session that was found, and has these turns now that it is held, is still the right one."""

    def whole(self, client: kvbank.Client, history: History) -> History:
        """Return all of the conversation, for a request that is answered without a session."""


@dataclass(frozen=True, slots=True)
class Named:
    """The session of a name with which a request, which says the whole conversation, has most turns in common.

    name: "" for a new session, which has none.
    """

    name: str = ""
    holder: None = None
    forks: bool = False

    @property
    def line(self) -> Hashable:
        """Return the name, or what no other request has."""
        return self.name or object()

    def find(self, client: kvbank.Client, history: History, *, fork: bool = False) -> Found:
        """Return the session of a request; see `Place.find`."""
        if not self.name:
            return Found(None, history.exchanges, history.system)
        compared = (_compared(client, session, history) for session in _named(client, self.name))
        best = max(compared, key=lambda each: (each.turns, each.whole), default=None)
        if best is None or not (best.whole or best.turns):
            return Found(None, history.exchanges, history.system)
        session = best.session
        if not best.whole:
            session = client.sessions.fork(session.session_id, turn=best.last, metadata={CONVERSATION: self.name})
        return Found(session, history.exchanges[best.turns :], history.system)

    def fits(self, turns: Sequence[kvbank.Turn], found: Found, history: History) -> bool:
        """Tell whether a session has what the request says; see `Place.fits`."""
        said = [exchange for exchange, _ in said_in(turns)]
        return history.known(said) == len(said) == len(history.exchanges) - len(found.unknown)

    def whole(self, client: kvbank.Client, history: History) -> History:
        """Return what the request says; see `Place.whole`."""
        return history


@dataclass(frozen=True, slots=True)
class Behind:
    """Behind the turn of a key, which any session has, or has had.

    A request with another system prompt than the session was begun with gets a new session, which is told all of it.
    """

    key: str
    name: str = ""
    holder: None = None
    forks: bool = True

    @property
    def line(self) -> Hashable:
        """Return the key of the turn."""
        return self.key

    def find(self, client: kvbank.Client, history: History, *, fork: bool = False) -> Found:
        """Return the session of a request; see `Place.find`. Raises kvbank.TurnNotFound."""
        turn = client.sessions.turn(self.key)
        session = client.sessions.get(turn.session_id)
        if history.system and not history.begins_with(session.settings.get("system", "")):
            return Found(None, _behind(client.sessions.turns_to(self.key), history).exchanges, history.system)
        if fork or session.head != turn.number:
            session = client.sessions.fork(session.session_id, turn_key=self.key)
        return Found(session, history.exchanges)

    def fits(self, turns: Sequence[kvbank.Turn], found: Found, history: History) -> bool:
        """Tell whether the turn is the last one; see `Place.fits`."""
        return found.session is None or (bool(turns) and turns[-1].key == self.key)

    def whole(self, client: kvbank.Client, history: History) -> History:
        """Return what was said up to the turn, and what the request says; see `Place.whole`."""
        session = client.sessions.get(client.sessions.turn(self.key).session_id)
        return _behind(client.sessions.turns_to(self.key), history, session)


@dataclass(frozen=True, slots=True)
class AtEnd:
    """At the end of a session, whatever stands there."""

    session_id: str
    holder: str | None = None
    name: str = ""
    forks: bool = False

    @property
    def line(self) -> Hashable:
        """Return the id of the session."""
        return self.session_id

    def find(self, client: kvbank.Client, history: History, *, fork: bool = False) -> Found:
        """Return the session of a request; see `Place.find`.

        Raises HistoryError for another system prompt than that of a session that has turns.
        """
        session = client.sessions.get(self.session_id)
        if session.head and history.system and not history.begins_with(session.settings.get("system", "")):
            text = (
                "the conversation was begun with others, and keeps them: leave them out, or begin another conversation"
            )
            raise HistoryError("instructions", text)
        return Found(session, history.exchanges, history.system or None)

    def fits(self, turns: Sequence[kvbank.Turn], found: Found, history: History) -> bool:
        """Say that it does; see `Place.fits`."""
        return True

    def whole(self, client: kvbank.Client, history: History) -> History:
        """Return what was said in the session, and what the request says; see `Place.whole`."""
        session = client.sessions.get(self.session_id)
        return _behind(client.sessions.turns(self.session_id), history, session)


def said_in(turns: Iterable[kvbank.Turn]) -> Iterator[tuple[Exchange | None, int]]:
    """Yield what was said and answered in turns, with the number of the turn; None for what was forgotten."""
    for turn in turns:
        if turn.status == "forgotten":
            yield None, turn.number
        elif turn.status != "part":
            said, answered = (
                joined(*(item.text for item in turn.items if item.role == role)) for role in ("user", "assistant")
            )
            yield Exchange(said, answered), turn.number


def _behind(turns: Iterable[kvbank.Turn], history: History, session: kvbank.Session | None = None) -> History:
    """Return a conversation that goes on behind turns. session: whose system prompt it has without one of its own."""
    system = "" if session is None else session.settings.get("system", "")
    before = tuple(exchange for exchange, _ in said_in(turns) if exchange is not None)
    return replace(history, system=history.system or system, exchanges=(*before, *history.exchanges))


@dataclass(frozen=True, slots=True)
class _Compared:
    """A session whose first `turns` turns are the beginning of a request. last: the number of the last of them.

    whole: the session has no others.
    """

    session: kvbank.Session
    turns: int
    last: int
    whole: bool


def _compared(client: kvbank.Client, session: kvbank.Session, history: History) -> _Compared:
    """Return how much of a session is the beginning of a request."""
    if not history.begins_with(session.settings.get("system", "")):
        return _Compared(session, 0, 0, whole=False)
    said = list(said_in(client.sessions.turns(session.session_id)))
    count = history.known([exchange for exchange, _ in said])
    return _Compared(session, count, said[count - 1][1] if count else 0, whole=count == len(said))


def _named(client: kvbank.Client, name: str) -> Iterator[kvbank.Session]:
    """Yield the sessions of a name: the one that is called so, and those that were begun or forked for it."""
    called = ""
    with suppress(kvbank.SessionNotFound):
        session = client.sessions.get(name=name)
        called = session.session_id
        yield session
    others = client.sessions.list({CONVERSATION: name})
    yield from (session for session in islice(others, _MOST_BRANCHES) if session.session_id != called)
