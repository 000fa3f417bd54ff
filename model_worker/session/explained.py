"""Why an answer came, with what the banks say of its chunks now.

A turn keeps the names of the chunks alone; their words are read here when they are shown. So nothing is shown that was
deleted since.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import kvbank
from model_worker.session.turn_memory import branch_at

# What the service says where a chunk is not there, or the caller may not read its bank.
_GONE = (kvbank.NotFound, kvbank.PermissionDenied)


@dataclass(frozen=True, slots=True)
class ExplainedChunk:
    """A chunk that an answer attended to. traced: as the turn has it. stored: as its bank has it; None for one that is
    not there any more, or that the caller may not read."""

    traced: kvbank.AnswerChunk
    stored: kvbank.Chunk | None


def explained(
    client: kvbank.Client, session: kvbank.Session, trace: kvbank.AnswerTrace, *, timeout: float | None = None
) -> list[ExplainedChunk]:
    """Return the chunks of a trace, the one with the most attention first, as their banks have them.

    session: to which the turn was appended. timeout: seconds for each call. Raises what the service raises, but for
    chunks that are not there.
    """
    unnamed = [chunk for chunk in trace.chunks if not chunk.chunk_id and chunk.start >= 0]
    found = _at(client, session, [chunk.start for chunk in unnamed], timeout) if unnamed else {}
    return [
        ExplainedChunk(chunk, _named(client, chunk, timeout) if chunk.chunk_id else found.get(chunk.start))
        for chunk in trace.chunks
    ]


def _named(client: kvbank.Client, chunk: kvbank.AnswerChunk, timeout: float | None) -> kvbank.Chunk | None:
    with suppress(*_GONE):
        return client.get_chunk(chunk.bank, chunk.chunk_id, timeout=timeout)
    return None


def _at(
    client: kvbank.Client, session: kvbank.Session, starts: Sequence[int], timeout: float | None
) -> dict[int, kvbank.Chunk]:
    """Return the chunks of a session that begin at these offsets, by the offset."""
    places = [
        kvbank.Filter(metadata={"branch": branch_at(session, start)}, start_from=start, start_before=start + 1)
        for start in starts
    ]
    with suppress(*_GONE):
        found = client.list_chunks(session.bank, filter=kvbank.Filter(any_of=places), timeout=timeout)
        return {chunk.start: chunk for chunk in found}
    return {}
