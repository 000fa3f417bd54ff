"""A history as a session of the service: turns of a chunk each, whose chunks a bank has, as if all had been said.

A session of a shorter history is a fork, which has the first turns and their chunks alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import kvbank
from kvbank.wire.scalars import Scalar
from model_worker.model import MemoryModel
from model_worker.remember.delivery import source_key
from model_worker.session.answer import decoded
from model_worker.session.session import Session
from model_worker.user_text import readable

# Turns that one call appends at most, which is the service's bound.
_MOST_TURNS = 100


class SessionHistory:
    """A session of `model` with the tokens of a history, and its forks. The chunks of the history are in `bank`."""

    def __init__(self, model: MemoryModel, bank: str, history: Sequence[int]) -> None:
        """Append the history to a new session, turn by turn."""
        self._model, self._chunk, self._client = model, model.chunk, model.client
        with Session.open(model, bank=bank) as session:
            self._info = session.info
        self._ids = [self._info.session_id]
        info = self._client.sessions.acquire(self._info.session_id, "kvbank eval ttft")
        assert info.lease is not None
        turns = [self._turn(history, at) for at in range(0, len(history) - self._chunk + 1, self._chunk)]
        for first in range(0, len(turns), _MOST_TURNS):
            some = turns[first : first + _MOST_TURNS]
            self._client.sessions.append(info.session_id, some, epoch=info.lease.epoch, follows=first)
        self._client.sessions.release(info.session_id, info.lease.epoch)

    def _turn(self, history: Sequence[int], at: int) -> kvbank.Turn:
        end = at + self._chunk
        ids, answer = history[at:end], at + self._chunk // 2
        words = [decoded(self._model.tokenizer, part) for part in (history[at:answer], history[answer:end])]
        items = [kvbank.Item(role, text) for role, text in zip(("user", "assistant"), words, strict=True)]
        # Of the last tokens a worker makes its window, and writes what leaves that; the bank has it already.
        kept = max(0, end - self._model.window) // self._chunk * self._chunk
        return kvbank.Turn(items, ids, prompt_tokens=answer - at, kept=kept)

    def own(self, chunk: kvbank.NewChunk) -> kvbank.NewChunk:
        """Return a chunk of the history as one of the session."""
        branch = self._info.stretches[-1].branch
        marks: dict[str, Scalar] = {"branch": branch, "turn": chunk.start // self._chunk + 1, "role": "user+assistant"}
        key = source_key(branch, chunk.start, [int(token) for token in chunk.token_ids])
        return replace(chunk, metadata={**chunk.metadata, **marks}, **key)

    def way(self, length: int) -> "SessionWay":
        """Return what answers a question behind the first `length` tokens of the history."""
        fork = self._client.sessions.fork(self._info.session_id, turn=length // self._chunk)
        self._ids.append(fork.session_id)
        return SessionWay(self._model, fork.session_id)

    def close(self) -> None:
        """Delete the session and its forks."""
        for session_id in self._ids:
            self._client.sessions.forget(session_id)


class SessionWay:
    """What a worker does that goes on with a session: it takes the lease, gets turns and window from the service, feeds
    the question, recalls, and has the first token of the answer durable in the service."""

    def __init__(self, model: MemoryModel, session_id: str) -> None:
        self._model, self._session_id = model, session_id
        self._open: Session | None = None

    def __call__(self, question: Sequence[int]) -> int:
        """Answer a question by one token, and return how many there are in the answer. Call `rest` after it."""
        text = readable(decoded(self._model.tokenizer, question)).strip() or "?"
        self._open = Session.open(self._model, session_id=self._session_id, min_score=None, min_share=None)
        turn = self._open.say(text, max_new_tokens=1)
        return turn.token_count - turn.prompt_tokens

    def rest(self) -> None:
        """Let the session go, which no answer waits for."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def window_bytes(self) -> int:
        """Return the bytes of the window that the service keeps of the session."""
        return self._model.client.sessions.window_size(self._session_id)
