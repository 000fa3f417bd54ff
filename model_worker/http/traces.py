"""The route `GET /v1/kvbank/responses/{id}/trace` says why an answer came."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from model_worker.http.asking import SECONDS, client_of
from model_worker.http.documents import trace_document
from model_worker.http.errors import ApiError, json_response
from model_worker.serve.served import Served
from model_worker.session.explained import explained


def routes(served: Served) -> APIRouter:
    """Return the route of traces."""
    router = APIRouter()

    @router.get("/v1/kvbank/responses/{response_id}/trace", operation_id="explainResponse")
    def trace(request: Request, response_id: str) -> Response:
        """Say which chunks an answer attended to. response_id: what the caller got as the id of the answer."""
        with client_of(served, request) as client:
            turn = client.sessions.turn(response_id, timeout=SECONDS)
            if (found := turn.trace) is None:
                text = "of this answer it was not kept why it came: its worker keeps no traces, or is none"
                raise ApiError(404, text, code="no_trace")
            session = client.sessions.get(turn.session_id, timeout=SECONDS)
            chunks = explained(client, session, found, timeout=SECONDS)
        return json_response(trace_document(turn, found, chunks))

    return router
