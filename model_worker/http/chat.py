"""The route `POST /v1/chat/completions` answers the last message of a conversation."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from model_worker.http.answers import Answer
from model_worker.http.errors import json_response
from model_worker.http.events import ANSWERS, streamed
from model_worker.http.metrics import Metrics
from model_worker.http.models import check_model
from model_worker.http.requests import ChatRequest
from model_worker.http.session_name import key_of, session_name
from model_worker.http.usage import finish_reason, usage_of
from model_worker.serve.answering import Question
from model_worker.serve.places import Named
from model_worker.serve.served import Served


def routes(served: Served, metrics: Metrics) -> APIRouter:
    """Return the route of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", operation_id="createChatCompletion", responses=ANSWERS)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer the last message of a conversation."""
        check_model(served, body.model)
        key, place = key_of(request, needed=served.needs_key), Named(session_name(request, body))
        question = Question(f"chatcmpl-{uuid.uuid4().hex}", body.history(), body.decoding(served.bounds.new_tokens))
        answer = Answer(
            served.engine, metrics, lambda take: served.answer(key, place, question, take, store=bool(place.name))
        )
        head = {"id": question.key, "created": int(time.time()), "model": served.name}
        if body.stream:
            await answer.begun(request)
            return streamed(answer, _chunks(answer, head, with_usage=body.with_usage))
        reply = await answer.whole(request)
        message = {"role": "assistant", "content": reply.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(reply)}
        return json_response({**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(reply.usage)})

    return router


async def _chunks(answer: Answer, head: dict[str, Any], *, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of an answer. with_usage: with a last one that says the tokens."""
    head = {**head, "object": "chat.completion.chunk"} | ({"usage": None} if with_usage else {})

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]}

    yield chunk({"role": "assistant", "content": ""})
    async for piece in answer.pieces():
        yield chunk({"content": piece})
    reply = await answer.reply()
    yield chunk({}, finish_reason(reply))
    if with_usage:
        yield {**head, "choices": [], "usage": usage_of(reply.usage)}
