"""The routes of `/v1/conversations`: sessions, and what was said in them, message by message."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

import kvbank
from model_worker.http.answers import unless_left
from model_worker.http.asking import SECONDS, client_of
from model_worker.http.conversation_ids import conversation_id, session_id_of
from model_worker.http.errors import ApiError, json_response
from model_worker.http.items import Limit, Order, item, item_list, page
from model_worker.http.response_requests import ConversationRequest, ConversationUpdate, ItemsRequest, MessageInput
from model_worker.http.session_name import key_of
from model_worker.serve.background import MARKS
from model_worker.serve.history import Exchange, HistoryError, exchanges_of, parted
from model_worker.serve.items import items_of, listed, turn_of
from model_worker.serve.served import Served


def routes(served: Served) -> APIRouter:
    """Return the routes of conversations."""
    router = APIRouter(prefix="/v1/conversations")
    _conversation_routes(router, served)
    _item_routes(router, served)
    return router


def _conversation_routes(router: APIRouter, served: Served) -> None:
    @router.post("", operation_id="createConversation")
    async def create(request: Request, body: ConversationRequest) -> Response:
        """Begin a new conversation. The messages of the system that it begins with are its system prompt."""
        key = key_of(request, needed=served.needs_key)
        system, exchanges = _parted(body.items or [])
        session = await run_in_threadpool(served.begun, key, system, _own(body.metadata))
        if exchanges:
            try:
                await _added(served, request, session.session_id, exchanges)
            except BaseException:
                await run_in_threadpool(_forget, served, request, session.session_id)
                raise
        return json_response(_conversation(session))

    @router.get("/{conversation}", operation_id="retrieveConversation")
    def retrieve(request: Request, conversation: str) -> Response:
        """Describe a conversation by its id."""
        session_id = session_id_of(conversation)
        with client_of(served, request) as client:
            return json_response(_conversation(client.sessions.get(session_id, timeout=SECONDS)))

    @router.post("/{conversation}", operation_id="updateConversation")
    def update(request: Request, conversation: str, body: ConversationUpdate) -> Response:
        """Replace the metadata of a conversation."""
        session_id = session_id_of(conversation)
        with client_of(served, request) as client:
            known = client.sessions.get(session_id, timeout=SECONDS).metadata
            marks = {name: text for name, text in known.items() if name in MARKS}
            updated = client.sessions.update(session_id, metadata={**_own(body.metadata), **marks})
            return json_response(_conversation(updated))

    @router.delete("/{conversation}", operation_id="deleteConversation")
    def delete(request: Request, conversation: str) -> Response:
        """Forget a conversation with all that was said in it, but for what other branches have of it."""
        _forget(served, request, session_id_of(conversation))
        return json_response({"id": conversation, "object": "conversation.deleted", "deleted": True})


def _item_routes(router: APIRouter, served: Served) -> None:
    @router.get("/{conversation}/items", operation_id="listItems")
    def list_items(
        request: Request, conversation: str, limit: Limit = 20, order: Order = "desc", after: str = ""
    ) -> Response:
        """List what was said in a conversation."""
        session_id = session_id_of(conversation)
        with client_of(served, request) as client:
            return json_response(page(listed(client, session_id, newest_first=order == "desc", after=after), limit))

    @router.post("/{conversation}/items", operation_id="createItems")
    async def add(request: Request, conversation: str, body: ItemsRequest) -> Response:
        """Add messages to a conversation, which the model reads."""
        session_id = session_id_of(conversation)
        system, exchanges = _parted(body.items)
        if system:
            raise HistoryError("items[0]", "a system message is given when the conversation is begun")
        turns = await _added(served, request, session_id, exchanges)
        return json_response(item_list([item(each) for turn in turns for each in items_of(turn)]))

    @router.get("/{conversation}/items/{item_id}", operation_id="retrieveItem")
    def retrieve_item(request: Request, conversation: str, item_id: str) -> Response:
        """Return one message of a conversation."""
        session_id = session_id_of(conversation)
        with client_of(served, request) as client:
            items = items_of(turn_of(client, session_id, item_id))
        return json_response(item(next(each for each in items if each.id == item_id)))

    @router.delete("/{conversation}/items/{item_id}", operation_id="deleteItem")
    def delete_item(request: Request, conversation: str, item_id: str) -> Response:
        """Forget the turn of a message, which is the message and its answer, for good and in all branches."""
        session_id = session_id_of(conversation)
        with client_of(served, request) as client:
            client.sessions.forget_turn(turn_of(client, session_id, item_id).key)
            return json_response(_conversation(client.sessions.get(session_id)))


def _own(metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the metadata of a caller. Raises ApiError for names that are the worker's own."""
    if taken := sorted(set(metadata or {}).intersection(MARKS)):
        raise ApiError(
            400, f"metadata: {taken[0]} is a name of the worker's own", param="metadata", code="invalid_value"
        )
    return metadata or {}


def _forget(served: Served, request: Request, session_id: str) -> None:
    with client_of(served, request) as client:
        client.sessions.forget(session_id)


def _parted(items: list[MessageInput]) -> tuple[str, list[Exchange]]:
    """Return the system prompt and the exchanges of messages. Raises HistoryError."""
    system, rest = parted([each.plain() for each in items], "items")
    return system, exchanges_of(rest)


async def _added(served: Served, request: Request, session_id: str, exchanges: list[Exchange]) -> list[kvbank.Turn]:
    """Add exchanges to a session, and return their turns; none is added where the caller leaves."""
    job = served.add(key_of(request, needed=served.needs_key), session_id, exchanges)
    result = asyncio.wrap_future(job.result)
    # Its error has been looked at also where nobody waits for it any more; asyncio would log it else.
    result.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        return await unless_left(request, asyncio.shield(result))
    except BaseException:
        served.engine.forget(job)
        raise


def _conversation(session: kvbank.Session) -> dict[str, Any]:
    metadata: Mapping[str, str] = {name: text for name, text in session.metadata.items() if name not in MARKS}
    return {
        "id": conversation_id(session.session_id),
        "object": "conversation",
        "created_at": int(session.create_time.timestamp()),
        "metadata": metadata,
    }
