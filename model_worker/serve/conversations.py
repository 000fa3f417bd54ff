"""The conversation that a request goes on with: a session of the service, found by its name and by what was said.

This file owns which session a request takes. Of the sessions of a name that is the one with which the request has most
turns in common. Where the request goes another way than that session did, it gets a fork of it, which has those turns;
the other one stays as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice

import kvbank
from model_worker.errors import SessionError
from model_worker.model import MemoryModel, Progress
from model_worker.serve.history import Exchange, History
from model_worker.session.preset import SessionPreset
from model_worker.session.session import Session

# The metadata by which forks are found that have no name of their own, since a name is of one session.
_CONVERSATION = "conversation"
# Of so many sessions of a name, those that were used last, what was said is compared.
_MOST_BRANCHES = 32
# Times that a session is looked for which another request of the same name changes meanwhile.
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Known:
    """A session whose first `turns` turns are the beginning of a request. last: the number of the last of them.

    whole: the session has no others. session: None for one that is to be begun.
    """

    session: kvbank.Session | None = None
    turns: int = 0
    last: int = 0
    whole: bool = False


class Conversation:
    """A session that is open for one request.

    unknown: exchanges of the request that the session has not seen. again: tokens that were fed again, because the
    session's window had to be made anew. tokens, kept: tokens of the session, and those of them in its bank, before the
    request.
    """

    def __init__(self, session: Session, unknown: Sequence[Exchange], again: int) -> None:
        self.session, self.unknown, self.again = session, unknown, again
        self.tokens, self.kept = session.info.tokens, session.memory.kept


class Conversations:
    """The sessions of all callers, with one model.

    name: how callers name the model. window, recent: of sessions. why: as in
    `Session.open`.
    """

    def __init__(
        self, model: MemoryModel, name: str, *, window: int | None = None, recent: int | None = None, why: int = 0
    ) -> None:
        self._model, self._name, self._why = model, name, why
        self._preset = SessionPreset.of(model.model, model.chunk, window=window, recent=recent)

    def find(self, client: kvbank.Client, name: str, history: History) -> Known:
        """Return the session of a name that a request goes on with, forked where it has gone another way."""
        found = max(
            (_known(client, session, history) for session in _named(client, name)),
            key=lambda known: (known.turns, known.whole),
            default=Known(),
        )
        if found.session is None or found.whole or not found.turns:
            return found if found.whole else Known()
        fork = client.sessions.fork(found.session.session_id, turn=found.last, metadata={_CONVERSATION: name})
        return Known(fork, found.turns, found.last, whole=True)

    @contextmanager
    def opened(
        self, client: kvbank.Client, name: str, history: History, known: Known, progress: Progress
    ) -> Iterator[Conversation]:
        """Have the session of a request open while the block runs; one that is not there is begun.

        known: what `find` has found. progress: told of tokens that are fed. Raises SessionError where other requests of
        the name are always quicker, and what `Session.open` raises.
        """
        for _ in range(_TRIES):
            with self._open(client, name, known, history, progress) as conversation:
                said = [exchange for exchange, _ in said_in(conversation.session.turns)]
                if history.known(said) == len(said) == known.turns:
                    yield conversation
                    return
            known = self.find(client, name, history)  # another request of the name was quicker
        raise SessionError(f"session {name!r} is used by other requests at the same time; ask again")

    @contextmanager
    def _open(
        self, client: kvbank.Client, name: str, known: Known, history: History, progress: Progress
    ) -> Iterator[Conversation]:
        again = 0

        def noted(done: int, total: int) -> None:
            nonlocal again
            again = total
            progress(done, total)

        free = known.session is None and _is_free(client, name)
        with Session.open(
            self._model,
            name=name if free else None,
            session_id=None if known.session is None else known.session.session_id,
            client=client,
            window=self._preset.window,
            system=history.system,
            metadata={_CONVERSATION: name},
            model_name=self._name,
            why=self._why,
            progress=noted,
            **self._preset.memory,
        ) as session:
            yield Conversation(session, history.exchanges[known.turns :], again)


def said_in(turns: Iterable[kvbank.Turn]) -> Iterator[tuple[Exchange | None, int]]:
    """Yield what was said and answered in turns, with the number of the turn; None for what was forgotten."""
    for turn in turns:
        if turn.status == "forgotten":
            yield None, turn.number
        elif turn.status != "part":
            yield Exchange(turn.text("user"), turn.text("assistant")), turn.number


def _named(client: kvbank.Client, name: str) -> Iterator[kvbank.Session]:
    """Yield the sessions of a name: the one that is called so, and those that were begun or forked for it."""
    called = ""
    with suppress(kvbank.SessionNotFound):
        session = client.sessions.get(name=name)
        called = session.session_id
        yield session
    others = client.sessions.list({_CONVERSATION: name})
    yield from (session for session in islice(others, _MOST_BRANCHES) if session.session_id != called)


def _is_free(client: kvbank.Client, name: str) -> bool:
    """Tell whether no session has this name."""
    with suppress(kvbank.SessionNotFound):
        client.sessions.get(name=name)
        return False
    return True


def _known(client: kvbank.Client, session: kvbank.Session, history: History) -> Known:
    """Return how much of a session is the beginning of a request."""
    if not history.begins_with(session.settings.get("system", "")):
        return Known()
    said = list(said_in(client.sessions.turns(session.session_id)))
    count = history.known([exchange for exchange, _ in said])
    return Known(session, count, said[count - 1][1] if count else 0, whole=count == len(said))
