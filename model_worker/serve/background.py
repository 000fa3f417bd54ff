"""Responses in the background, without a caller that waits: each has a session, held from when it is accepted.

This file owns how any worker tells what has become of such a response. The session names it in its metadata. While the
lease is held it is under way; a worker that cancels it takes the lease over, so that the one that makes the response
can append nothing any more; and where there is neither a lease nor a turn, its worker has died.
"""

import json
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import kvbank
from kvbank.serving.clients import Clients
from model_worker.serve.answering import Question, Reply, answer
from model_worker.serve.conversations import Conversations
from model_worker.serve.engine import Engine, Job, Left, Turn
from model_worker.serve.places import CONVERSATION, AtEnd, Place
from model_worker.session.lease import Lease

# Metadata of a session: the response that is made in it, and what has become of that: "in_progress", with the holder of
# the lease, "cancelled", or "failed", with the reason.
KEY, STATE = "background", "background_state"
MARKS = (KEY, STATE)
_IN_PROGRESS, _CANCELLED, _FAILED = "in_progress ", "cancelled", "failed "
# The setting of a session with what the request asked for, and the most letters of it.
_NOTES, _MOST_NOTES = "background", 4096
_LONGEST_VALUE = 512
_ENDED = "the worker that made the response has ended"
# Times that a response is cancelled which takes its session back meanwhile.
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Pending:
    """A response that has no turn. status: queued, in_progress, cancelled or failed. error: why it failed."""

    key: str
    status: str
    session_id: str
    notes: Mapping[str, Any]
    system: str
    begun: datetime
    error: str = ""


class Background:
    """The responses that this worker makes in the background. describe: returns what is told of an error."""

    def __init__(self, clients: Clients, engine: Engine, describe: Callable[[BaseException], str] = str) -> None:
        self._clients, self._engine, self.describe = clients, engine, describe
        self._lock = threading.Lock()
        self._jobs: dict[str, Job[Reply]] = {}

    def begin(self, conversations: Conversations, key: str, place: Place, question: Question) -> Job[Reply]:
        """Accept a response, and return the job that makes it. key: with which the service is asked.

        Raises kvbank.LeaseHeld where its session is another worker's, and Busy and Stopping.
        """
        with ExitStack() as stack:
            client = stack.enter_context(self._clients.client(key))
            held = _Held.of(conversations, client, place, question)
            stack.callback(held.release)
            job = self._engine.submit(key, held.session.session_id, self._work(conversations, client, held))
            held.ended = stack.pop_all()
        with self._lock:
            self._jobs[question.key] = job

        def over(result: "Future[Reply]") -> None:
            with self._lock:
                self._jobs.pop(question.key, None)
            with held.ended:
                held.over(result.exception(), self.describe)

        job.result.add_done_callback(over)
        return job

    def _work(self, conversations: Conversations, client: kvbank.Client, held: "_Held") -> Callable[[Turn], Reply]:
        def work(turn: Turn) -> Reply:
            held.check()
            place, question = held.place, held.question
            return answer(conversations, client, turn, place=place, question=question, on_text=lambda _: None)

        return work

    def pending(self, client: kvbank.Client, key: str) -> Pending:
        """Return what is known of a response without a turn. Raises kvbank.TurnNotFound where there is none."""
        session = _session_of(client, key)
        state = session.metadata.get(STATE, "")
        status, error = "failed", state.removeprefix(_FAILED)
        if _under_way(session):
            status, error = "queued" if self._waits(key) else "in_progress", ""
        elif state.startswith(_IN_PROGRESS):
            error = _ENDED
        elif state == _CANCELLED:
            status, error = _CANCELLED, ""
        notes, system = json.loads(session.settings.get(_NOTES, "{}")), session.settings.get("system", "")
        return Pending(key, status, session.session_id, notes, system, session.update_time, error)

    def cancel(self, client: kvbank.Client, key: str) -> None:
        """Cancel a response that has no turn, wherever it is made. Raises kvbank.TurnNotFound where there is none.

        A response that is there before its worker learns of it stays.
        """
        for _ in range(_TRIES):
            session = _session_of(client, key)
            if session.lease is None or not _under_way(session):
                break
            lease = client.sessions.acquire(session.session_id, session.lease.holder).lease
            with suppress(kvbank.TurnNotFound):
                client.sessions.turn(key)  # it was quicker
                break
            client.sessions.update(session.session_id, metadata={**session.metadata, STATE: _CANCELLED})
            with suppress(
                kvbank.LeaseLost
            ):  # it has taken its session back, and may not have seen that it is cancelled
                client.sessions.release(session.session_id, 0 if lease is None else lease.epoch)
                break
        with self._lock:
            job = self._jobs.get(key)
        if job is not None:
            self._engine.forget(job)

    def forget(self, client: kvbank.Client, key: str) -> None:
        """Cancel a response that has no turn, and take its marks away. Raises kvbank.TurnNotFound."""
        self.cancel(client, key)
        _unmark(client, _session_of(client, key))

    def _waits(self, key: str) -> bool:
        with self._lock:
            job = self._jobs.get(key)
        return job is not None and not job.result.running()


class _Held:
    """The session of a response from its acceptance to its end: held, and marked with the response."""

    def __init__(self, client: kvbank.Client, session: kvbank.Session, question: Question) -> None:
        self._client, self.session = client, session
        self.question = replace(question, check=self.check)
        self._lease = Lease(client, session.session_id)
        self.place = AtEnd(session.session_id, self._lease.holder)
        self.ended = ExitStack()

    @classmethod
    def of(cls, conversations: Conversations, client: kvbank.Client, place: Place, question: Question) -> "_Held":
        """Hold the session of a place: a fork where the place is in the middle of one, so that it is there at once."""
        found = place.find(client, question.history, fork=True)
        named = {CONVERSATION: place.name} if place.name else {}
        session = found.session or conversations.begun(client, found.system or "", named)
        history = replace(question.history, exchanges=found.unknown, system=found.system or "")
        held = cls(client, session, replace(question, history=history))
        session = held._lease.take()
        try:
            notes = json.dumps(question.notes or {}, ensure_ascii=False)
            client.sessions.update(
                session.session_id,
                metadata={**session.metadata, KEY: question.key, STATE: _IN_PROGRESS + held._lease.holder},
                settings={**session.settings, **({_NOTES: notes} if len(notes) <= _MOST_NOTES else {})},
            )
        except BaseException:
            held.release()
            raise
        return held

    def check(self) -> None:
        """Raise Left where the response was cancelled."""
        if not _in_progress(self._client.sessions.get(self.session.session_id)):
            raise Left("the response was cancelled")

    def over(self, error: BaseException | None, describe: Callable[[BaseException], str]) -> None:
        """Take the marks of a response away, or say why there is none, unless it was cancelled."""
        with suppress(kvbank.KVBankError):
            session = self._client.sessions.get(self.session.session_id)
            if error is None:
                _unmark(self._client, session)
            elif _in_progress(session):
                state = _FAILED + (_ENDED if isinstance(error, Left) else describe(error))
                metadata = {**session.metadata, STATE: state[:_LONGEST_VALUE]}
                self._client.sessions.update(session.session_id, metadata=metadata)

    def release(self) -> None:
        """Let others have the session."""
        self._lease.release()


def _session_of(client: kvbank.Client, key: str) -> kvbank.Session:
    """Return the session in which a response is made, or was to be made. Raises kvbank.TurnNotFound."""
    found = next(client.sessions.list({KEY: key}), None)
    if found is None:
        raise kvbank.TurnNotFound("there is no such response")
    return found


def _in_progress(session: kvbank.Session) -> bool:
    """Tell whether a session is marked with a response that is to be made."""
    return session.metadata.get(STATE, "").startswith(_IN_PROGRESS)


def _under_way(session: kvbank.Session) -> bool:
    """Tell whether the worker that makes a response has its session."""
    return session.lease is not None and session.metadata.get(STATE) == _IN_PROGRESS + session.lease.holder


def _unmark(client: kvbank.Client, session: kvbank.Session) -> None:
    """Take the marks of a response away from a session."""
    client.sessions.update(
        session.session_id,
        metadata={name: value for name, value in session.metadata.items() if name not in MARKS},
        settings={name: value for name, value in session.settings.items() if name != _NOTES},
    )
