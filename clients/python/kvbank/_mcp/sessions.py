"""Why an answer of a conversation came is read here from what its worker kept with the turn.

The trace of a turn names chunks and has no texts: these are read from the bank, so that nothing is shown that was
forgotten.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice

import kvbank
from kvbank._mcp import answers

_ID_LENGTH = 32
# Turns that are read at once.
_SOME = 100


def answer_reason(client: kvbank.Client, session: str, turn: int | None) -> answers.AnswerReason:
    """Return why an answer came. session: name or id. turn: its number; None is the last one that has a trace.

    Errors: SessionNotFound; TurnNotFound for a turn that is not there, or that has no trace.
    """
    found = _found(client, session)
    candidates = ((each, each.trace) for each in _turns(client, found, turn))
    chosen, trace = next((pair for pair in candidates if pair[1] is not None), (None, None))
    if chosen is None or trace is None:
        which = "no turn" if turn is None else f"no turn {turn}" if turn > found.head else f"nothing of turn {turn}"
        raise kvbank.TurnNotFound(f"session {session!r} has {which} that keeps why its answer came")
    return answers.AnswerReason(
        session=found.session_id,
        turn=chosen.number,
        question=chosen.text("user"),
        answer=chosen.text("assistant"),
        trace=asdict(trace),
        passages=[answers.Passage.of(chunk) for chunk in _chunks(client, trace)],
    )


def _turns(client: kvbank.Client, session: kvbank.Session, turn: int | None) -> Iterator[kvbank.Turn]:
    """Yield the turn of a number, or all turns, the last one first."""
    if turn is not None:
        yield from islice(client.sessions.turns(session.session_id, turn - 1), 1)
        return
    for begin in range((session.head - 1) // _SOME * _SOME, -1, -_SOME):
        yield from reversed([*islice(client.sessions.turns(session.session_id, begin), _SOME)])


def _chunks(client: kvbank.Client, trace: kvbank.AnswerTrace) -> list[kvbank.Chunk]:
    """Return the chunks of a trace that are still there, and that the caller may read."""
    found = []
    for each in trace.chunks:
        if each.bank:
            with suppress(kvbank.NotFound, kvbank.PermissionDenied):
                found.append(client.get_chunk(each.bank, each.chunk_id))
    return found


def _found(client: kvbank.Client, which: str) -> kvbank.Session:
    """Return a session by its name, or else by its id."""
    try:
        return client.sessions.get(name=which)
    except kvbank.SessionNotFound:
        if len(which) != _ID_LENGTH:
            raise
    return client.sessions.get(which)
