"""The routes that show what a session has in its memory, what was evicted of it, and what became of it over time."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

import kvbank
from model_worker.http.asking import SECONDS, client_of
from model_worker.http.documents import chunk_document, eviction_document, turn_document
from model_worker.http.errors import json_response
from model_worker.serve.served import Served

# Tokens of a session of which one page has the chunks, and the most that can be asked for.
_SPAN, _LONGEST = 4096, 65_536
# Entries of a bank's log that are looked through, and that are shown, of evictions.
_LOOKED_AT, _EVICTIONS = 2000, 100
_TURNS, _MOST_TURNS = 100, 1000


def routes(served: Served) -> APIRouter:
    """Return the routes of the memory of sessions."""
    router = APIRouter(prefix="/v1/kvbank/sessions/{session_id}")

    @router.get("/memory", operation_id="retrieveSessionMemory")
    def memory(
        request: Request,
        session_id: str,
        before: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
        tokens: Annotated[int, Query(ge=1, le=_LONGEST)] = _SPAN,
    ) -> Response:
        """Show the chunks that begin in the last `tokens` tokens before the offset `before`, the newest first, and what
        was evicted of the session, or would be next."""
        with client_of(served, request) as client:
            session = client.sessions.get(session_id, timeout=SECONDS)
            end = session.tokens if before is None else min(before, session.tokens)
            begin = max(0, end - tokens)
            chunks = sorted(_between(client, session, begin, end), key=lambda chunk: -chunk.start)
            evicted, planned = _evictions(client, session)
        return json_response(
            {
                "object": "kvbank.memory",
                "bank": session.bank,
                "tokens": session.tokens,
                "data": [chunk_document(chunk) for chunk in chunks],
                "before": begin or None,
                "evicted": [eviction_document(each) for each in evicted],
                "next": [eviction_document(each) for each in planned],
            }
        )

    @router.get("/timeline", operation_id="retrieveSessionTimeline")
    def timeline(
        request: Request, session_id: str, limit: Annotated[int, Query(ge=1, le=_MOST_TURNS)] = _TURNS
    ) -> Response:
        """Show what was written, recalled, forgotten and evicted, the oldest first, for the last `limit` turns."""
        with client_of(served, request) as client:
            session = client.sessions.get(session_id, timeout=SECONDS)
            turns = list(client.sessions.turns(session_id, page_size=1000, timeout=SECONDS))
            evicted, _ = _evictions(client, session)
        events = [event for turn in turns[-limit:] for event in _events(turn, turns, session.bank)]
        events += [{"kind": "evicted", "at": each["evicted_at"], **each} for each in map(eviction_document, evicted)]
        return json_response({"object": "list", "data": sorted(events, key=lambda event: event["at"] or 0.0)})

    return router


def _between(client: kvbank.Client, session: kvbank.Session, begin: int, end: int) -> list[kvbank.Chunk]:
    """Return the chunks of a session that begin in a range of its offsets."""
    if begin >= end:
        return []
    own = kvbank.Filter(stretches=session.stretches, start_from=begin, start_before=end)
    try:
        return list(client.list_chunks(session.bank, filter=own, timeout=SECONDS))
    except kvbank.BankNotFound:  # it is made with the first chunk
        return []


def _evictions(client: kvbank.Client, session: kvbank.Session) -> tuple[list[kvbank.Eviction], list[kvbank.Eviction]]:
    """Return which chunks of a session were evicted, newest first, and which would be next."""
    try:
        log = islice(client.list_evictions(session.bank, timeout=SECONDS), _LOOKED_AT)
        plan = client.explain_eviction(session.bank, timeout=SECONDS)
        return _own(session, log), _own(session, plan)
    except kvbank.BankNotFound:
        return [], []


def _own(session: kvbank.Session, evictions: Iterable[kvbank.Eviction]) -> list[kvbank.Eviction]:
    """Return those evictions of a bank that are of a session's chunks."""
    ends = {stretch.branch: stretch.start_before for stretch in session.stretches}
    found = (
        each
        for each in evictions
        if (branch := each.metadata.get("branch")) in ends and ((end := ends[str(branch)]) is None or each.start < end)
    )
    return list(islice(found, _EVICTIONS))


def _events(turn: kvbank.Turn, turns: Sequence[kvbank.Turn], bank: str) -> list[dict[str, Any]]:
    """Return what took place with a turn. turns: all of the session. bank: the session's."""
    said = turn_document(turn)
    event = {"at": said["created_at"], "turn": turn.number, "tokens": turn.token_count}
    if turn.status == "forgotten":
        return [{"kind": "forgotten", **event}]
    events: list[dict[str, Any]] = [{"kind": "written", "id": turn.key, **event}]
    if (trace := turn.trace) is not None and trace.chunks:
        starts = [each.start for each in turns]
        own = [chunk for chunk in trace.chunks if chunk.bank in (bank, "") and chunk.start >= 0]
        from_turns = sorted({turns[bisect_right(starts, chunk.start) - 1].number for chunk in own})
        events.append(
            {"kind": "recalled", "id": turn.key, **event, "chunks": len(trace.chunks), "from_turns": from_turns}
        )
    return events
