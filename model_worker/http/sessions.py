"""The routes `/v1/kvbank/sessions` show sessions with their turns, and fork, rewind and forget them.

A worker has no rights of its own: each route asks the service with the key of its caller.
"""

from contextlib import suppress
from itertools import dropwhile, islice
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

import kvbank
from model_worker.http.asking import SECONDS, client_of
from model_worker.http.documents import receipt_document, session_document, turn_document
from model_worker.http.errors import ApiError, json_response
from model_worker.serve.served import Served
from model_worker.session.holder import own_holder

_SESSIONS, _TURNS, _MOST = 30, 50, 100
# Turns that may be the parts of one long message, before the one that has its words.
_PARTS = 20
_TITLE_LETTERS = 80
Number = Annotated[int, Field(ge=1, lt=2**63)]
NumberOrNone = Annotated[int, Field(ge=0, lt=2**63)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ForkRequest(_Body):
    """The body of `fork`. turn: the last one that the fork has; None: the last of all. name: may be empty."""

    turn: NumberOrNone | None = None
    name: Annotated[str, Field(max_length=200)] = ""


class RewindRequest(_Body):
    """The body of `rewind`. turn: the one behind which the session goes on; 0: none is left."""

    turn: NumberOrNone


class ForgetRequest(_Body):
    """The body of `forget`. first, last: numbers of turns, both included; last: None for the first one alone."""

    first: Number
    last: Number | None = None


def routes(served: Served) -> APIRouter:
    """Return the routes of sessions."""
    router = APIRouter(prefix="/v1/kvbank/sessions")

    @router.get("", operation_id="listSessions")
    def listed(
        request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=_MOST)] = _SESSIONS
    ) -> Response:
        """List sessions, those that were changed last first. after: the id of the last one of the page before."""
        with client_of(served, request) as client:
            found = client.sessions.list(timeout=SECONDS)
            if after is not None:
                found = islice(dropwhile(lambda session: session.session_id != after, found), 1, None)
            page = list(islice(found, limit + 1))
            data = [session_document(each, _title(client, each)) for each in page[:limit]]
        return json_response({"object": "list", "data": data, "has_more": len(page) > limit})

    @router.get("/{session_id}", operation_id="retrieveSession")
    def session(
        request: Request,
        session_id: str,
        after: Annotated[int | None, Query(ge=0, lt=2**63)] = None,
        limit: Annotated[int, Query(ge=1, le=_MOST)] = _TURNS,
    ) -> Response:
        """Show a session with turns: those behind the number `after`, or the last ones."""
        with client_of(served, request) as client:
            found = client.sessions.get(session_id, timeout=SECONDS)
            first = max(0, found.head - limit) if after is None else after
            turns = client.sessions.turns(session_id, first, page_size=limit, timeout=SECONDS)
            shown = [turn_document(turn) for turn in islice(turns, limit)]
            title = _title(client, found)
        return json_response({**session_document(found, title), "after": first, "data": shown})

    @router.post("/{session_id}/fork", operation_id="forkSession")
    def fork(request: Request, session_id: str, body: ForkRequest) -> Response:
        """Begin a session with the turns of another, up to one of them. Nothing is copied."""
        with client_of(served, request) as client:
            made = client.sessions.fork(session_id, name=body.name, turn=body.turn, timeout=SECONDS)
        return json_response(session_document(made))

    @router.post("/{session_id}/rewind", operation_id="rewindSession")
    def rewind(request: Request, session_id: str, body: RewindRequest) -> Response:
        """Let a session go on behind an earlier turn. The turns behind that one stay until they are forgotten."""
        with client_of(served, request) as client:
            lease = client.sessions.acquire(session_id, own_holder(), timeout=SECONDS).lease
            epoch = lease.epoch if lease is not None else 0
            try:
                made = client.sessions.rewind(session_id, body.turn, epoch=epoch, timeout=SECONDS)
            finally:
                with suppress(kvbank.ServiceError):  # it ends by itself
                    client.sessions.release(session_id, epoch, timeout=SECONDS)
        return json_response(session_document(made))

    @router.post("/{session_id}/forget", operation_id="forgetTurns")
    def forget(request: Request, session_id: str, body: ForgetRequest) -> Response:
        """Delete turns for good, in all forks too, and return the receipt."""
        last = body.first if body.last is None else body.last
        if last < body.first:
            raise ApiError(400, "last is not before first", param="last", code="invalid_value")
        with client_of(served, request) as client:
            receipt = client.sessions.forget(session_id, first=body.first, last=last)
        return json_response(receipt_document(receipt))

    @router.delete("/{session_id}", operation_id="deleteSession")
    def delete(request: Request, session_id: str) -> Response:
        """Delete a session with its chunks for good, but for what forks have of it, and return the receipt."""
        with client_of(served, request) as client:
            receipt = client.sessions.forget(session_id)
        return json_response(receipt_document(receipt))

    return router


def _title(client: kvbank.Client, session: kvbank.Session) -> str:
    """Return how the first message that is a session's own begins; "" where it has none. A name is title enough.

    It is read from the turns, and not kept anywhere, so that it goes with its turn.
    """
    if session.name:
        return ""
    shared = 0 if session.forked_from is None else session.forked_from.turn
    after = shared if shared < session.head else 0
    turns = client.sessions.turns(session.session_id, after, page_size=_PARTS, timeout=SECONDS)
    said = (" ".join(turn.text("user").split()) for turn in islice(turns, _PARTS))
    return next((text for text in said if text), "")[:_TITLE_LETTERS]
