"""The sessions in which requests are answered: one is opened for a request, and let go behind it.

This file owns that a request has the session that it means: what was found before the session was held may have gone
another way since, and is looked for again then.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import kvbank
from model_worker.errors import SessionError
from model_worker.model import MemoryModel
from model_worker.serve.engine import Turn
from model_worker.serve.history import Exchange, History
from model_worker.serve.places import CONVERSATION, Found, Place
from model_worker.serve.usage import Before
from model_worker.session.preset import SessionPreset
from model_worker.session.session import Session

# Times that a session is looked for which another request changes meanwhile.
_TRIES = 3


class Conversation:
    """A session that is held for one request. Its window is there once `fit` has made it.

    unknown: exchanges of the request that the session has not seen. before: what the request has cost so far. kept:
    tokens of the session that were in its bank before the request.
    """

    def __init__(self, session: Session, unknown: tuple[Exchange, ...]) -> None:
        self.session, self.unknown = session, unknown
        self.before, self.kept = Before(session.info.tokens), 0

    def fit(self, turn: Turn) -> None:
        """Make the window of the session for a request that has the model now, and lends it from then on."""
        self.session.record.aside = turn.lending_model
        again = 0

        def noted(done: int, total: int) -> None:
            nonlocal again
            again = total
            turn.progress(done, total)

        self.session.fit(noted)
        self.before, self.kept = replace(self.before, again=again), self.session.memory.kept


class Conversations:
    """The sessions of all callers, with one model.

    name: how callers name the model. window, recent: of sessions. why: as in `Session.open`.
    """

    def __init__(
        self, model: MemoryModel, name: str, *, window: int | None = None, recent: int | None = None, why: int = 0
    ) -> None:
        self._model, self._name, self._why = model, name, why
        self._preset = SessionPreset.of(model.model, model.chunk, window=window, recent=recent)

    @contextmanager
    def opened(self, client: kvbank.Client, place: Place, history: History, found: Found) -> Iterator[Conversation]:
        """Hold the session of a request while the block runs, without the model; one that is not there is begun.

        found: what `place` has found. Raises SessionError where other requests are always quicker, and what
        `Session.taken` raises.
        """
        for _ in range(_TRIES):
            with ExitStack() as stack:
                try:
                    conversation = stack.enter_context(self._open(client, place, found))
                except kvbank.LeaseHeld:
                    if not place.forks:
                        raise
                    found = place.find(client, history, fork=True)
                    continue
                if place.fits(conversation.session.turns, found, history):
                    yield conversation
                    return
            found = place.find(client, history)  # another request was quicker
        raise SessionError("the conversation is used by other requests at the same time; ask again")

    @contextmanager
    def _open(self, client: kvbank.Client, place: Place, found: Found) -> Iterator[Conversation]:
        free = bool(place.name) and found.session is None and _is_free(client, place.name)
        with Session.taken(
            self._model,
            name=place.name if free else None,
            session_id=None if found.session is None else found.session.session_id,
            client=client,
            window=self._preset.window,
            holder=place.holder,
            system=found.system,
            metadata={CONVERSATION: place.name} if place.name else {},
            model_name=self._name,
            why=self._why,
            **self._preset.memory,
        ) as session:
            yield Conversation(session, found.unknown)

    def begun(self, client: kvbank.Client, system: str, metadata: Mapping[str, str]) -> kvbank.Session:
        """Make a session without turns, and return it. system: its system prompt. metadata: of the caller's."""
        return Session.begun(
            self._model,
            client=client,
            window=self._preset.window,
            system=system,
            metadata=metadata,
            model_name=self._name,
            **self._preset.memory,
        )


def _is_free(client: kvbank.Client, name: str) -> bool:
    """Tell whether no session has this name."""
    with suppress(kvbank.SessionNotFound):
        client.sessions.get(name=name)
        return False
    return True
