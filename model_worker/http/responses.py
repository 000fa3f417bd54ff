"""The routes of `/v1/responses`: answers that can be asked for again, gone on with, cancelled and forgotten."""

import json
import uuid
from concurrent.futures import Future
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

import kvbank
from model_worker.http.answers import Answer
from model_worker.http.asking import client_of
from model_worker.http.conversation_ids import session_id_of
from model_worker.http.errors import ApiError, json_response, told
from model_worker.http.events import ANSWERS, streamed
from model_worker.http.items import Limit, Order, page
from model_worker.http.metrics import Metrics
from model_worker.http.models import check_model
from model_worker.http.response_events import events
from model_worker.http.response_object import LONGEST_NOTES, notes_of, of_pending, of_reply, of_stored, response
from model_worker.http.response_requests import ResponseRequest
from model_worker.http.session_name import key_of, session_name
from model_worker.serve.answering import Question, Reply
from model_worker.serve.places import AtEnd, Behind, Named, Place
from model_worker.serve.served import Served
from model_worker.serve.stored import forget, input_items, stored

_PREFIX = "resp_"


def routes(served: Served, metrics: Metrics) -> APIRouter:
    """Return the routes of responses."""
    router = APIRouter(prefix="/v1/responses")
    served.background.describe = lambda error: told(error).message

    @router.post("", operation_id="createResponse", responses=ANSWERS)
    async def create(request: Request, body: ResponseRequest) -> Response:
        """Answer what is said, at the beginning of a conversation or behind an earlier response."""
        check_model(served, body.model)
        _check(body)
        key, place, history = key_of(request, needed=served.needs_key), _place(request, body), body.history()
        notes = notes_of(body, history, served.name)
        if len(json.dumps(notes, ensure_ascii=False)) > LONGEST_NOTES:
            raise ApiError(400, "metadata: it is too long", param="metadata", code="invalid_value")
        decoding = body.decoding(served.bounds.new_tokens)
        question = Question(f"{_PREFIX}{uuid.uuid4().hex}", history, decoding, len(history.exchanges), notes)
        if body.background:
            return json_response(await run_in_threadpool(_in_background, served, metrics, key, place, question))
        store = body.store is not False
        answer = Answer(served.engine, metrics, lambda take: served.answer(key, place, question, take, store=store))
        if body.stream:
            await answer.begun(request)
            return streamed(answer, events(answer, question.key, notes, history.system), end=b"")
        return json_response(of_reply(question.key, notes, await answer.whole(request)))

    _stored_routes(router, served)
    _input_routes(router, served)
    return router


def _stored_routes(router: APIRouter, served: Served) -> None:
    @router.get("/{response_id}", operation_id="retrieveResponse")
    def retrieve(request: Request, response_id: str, stream: Annotated[bool | None, Query()] = None) -> Response:
        """Return a response as it is now."""
        if stream:
            text = "stream is not supported by this worker for a response that was begun before"
            raise ApiError(400, text, param="stream", code="unsupported_parameter")
        with client_of(served, request) as client:
            return json_response(_found(served, client, response_id))

    @router.delete("/{response_id}", operation_id="deleteResponse")
    def delete(request: Request, response_id: str) -> Response:
        """Forget a response with what was said, for good and in all branches."""
        _check_id(response_id)
        with client_of(served, request) as client:
            _forget(served, client, response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.post("/{response_id}/cancel", operation_id="cancelResponse")
    def cancel(request: Request, response_id: str) -> Response:
        """Cancel a response that was begun with `background`; one that has ended stays as it is."""
        with client_of(served, request) as client:
            found = _found(served, client, response_id)
            if not found["background"]:
                raise ApiError(400, "only a response that was begun with background can be cancelled")
            if found["status"] in ("queued", "in_progress"):
                served.background.cancel(client, response_id)
            return json_response(_found(served, client, response_id))


def _input_routes(router: APIRouter, served: Served) -> None:
    @router.get("/{response_id}/input_items", operation_id="listInputItems")
    def list_input_items(
        request: Request, response_id: str, limit: Limit = 20, order: Order = "desc", after: str = ""
    ) -> Response:
        """List what the request of a response said."""
        _check_id(response_id)
        with client_of(served, request) as client:
            found = list(input_items(client, stored(client, response_id)))
        found = found if order == "desc" else found[::-1]
        ids = [each.id for each in found]
        if after and after not in ids:
            raise ApiError(400, "after: the response has no such item", param="after", code="invalid_value")
        return json_response(page(iter(found[ids.index(after) + 1 if after else 0 :]), limit))


def _check(body: ResponseRequest) -> None:
    """Refuse what cannot be asked for together. Raises ApiError."""
    if body.conversation_id and body.previous_response_id:
        text = "previous_response_id: a request goes on in a conversation or behind a response, not both"
        raise ApiError(400, text, param="previous_response_id", code="invalid_value")
    if body.background and (body.store is False or body.stream):
        text = "background: such a response is stored, and not streamed"
        raise ApiError(400, text, param="background", code="invalid_value")


def _place(request: Request, body: ResponseRequest) -> Place:
    """Return where a request goes on. Raises what names of sessions that are none raise."""
    if body.conversation_id:
        return AtEnd(session_id_of(body.conversation_id))
    if body.previous_response_id:
        _check_id(body.previous_response_id)
        return Behind(body.previous_response_id)
    return Named(session_name(request, body))


def _check_id(key: str) -> None:
    """Refuse an id that is none of a response. Raises kvbank.TurnNotFound."""
    if not key.startswith(_PREFIX):
        raise kvbank.TurnNotFound("this is not the id of a response")


def _in_background(served: Served, metrics: Metrics, key: str, place: Place, question: Question) -> dict[str, Any]:
    """Accept a response in the background, and return it as it is now."""
    job = served.answer_in_background(key, place, question)

    def used(result: "Future[Reply]") -> None:
        if result.exception() is None:
            metrics.used(result.result().usage)

    job.result.add_done_callback(used)
    status = "in_progress" if job.result.running() else "queued"
    return response(question.key, question.notes or {}, status, question.history.system)


def _forget(served: Served, client: kvbank.Client, key: str) -> None:
    """Forget a response, also one that ends while it is being cancelled. Raises kvbank.TurnNotFound."""
    with suppress(kvbank.TurnNotFound):
        forget(client, stored(client, key))
        return
    try:
        served.background.forget(client, key)
    except kvbank.TurnNotFound:  # there is none, or it has ended meanwhile
        forget(client, stored(client, key))
    else:
        with suppress(kvbank.TurnNotFound):
            forget(client, stored(client, key))


def _found(served: Served, client: kvbank.Client, key: str) -> dict[str, Any]:
    """Return a response, which may be under way at any worker. Raises kvbank.TurnNotFound."""
    _check_id(key)
    with suppress(kvbank.TurnNotFound):
        return of_stored(stored(client, key))
    pending = served.background.pending(client, key)
    if pending.status not in ("queued", "in_progress"):
        with suppress(kvbank.TurnNotFound):  # it may have ended meanwhile
            return of_stored(stored(client, key))
    return of_pending(pending)
