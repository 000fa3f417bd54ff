"""The route `POST /v1/completions` goes on with a text, of which nothing is kept."""

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
from model_worker.http.requests import CompletionRequest
from model_worker.http.session_name import key_of
from model_worker.http.usage import finish_reason, usage_of
from model_worker.serve.served import Served

# Tokens of a completion where the caller does not say how many, as the API has it.
_TOKENS = 16


def routes(served: Served, metrics: Metrics) -> APIRouter:
    """Return the route of completions."""
    router = APIRouter()

    @router.post("/v1/completions", operation_id="createCompletion", responses=ANSWERS)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Go on with a text."""
        check_model(served, body.model)
        key, prompt = key_of(request, needed=served.needs_key), body.only_prompt
        decoding = body.decoding(served.bounds.new_tokens if body.max_tokens else _TOKENS)
        answer = Answer(served.engine, metrics, lambda take: served.complete(key, prompt, decoding, take))
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }
        if body.stream:
            await answer.begun(request)
            return streamed(answer, _chunks(answer, head, with_usage=body.with_usage))
        reply = await answer.whole(request)
        choice = {"index": 0, "text": reply.text, "logprobs": None, "finish_reason": finish_reason(reply)}
        return json_response({**head, "choices": [choice], "usage": usage_of(reply.usage)})

    return router


async def _chunks(answer: Answer, head: dict[str, Any], *, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a text. with_usage: with a last one that says the tokens."""
    head = {**head, "usage": None} if with_usage else head

    def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]}

    async for piece in answer.pieces():
        yield chunk(piece)
    reply = await answer.reply()
    yield chunk("", finish_reason(reply))
    if with_usage:
        yield {**head, "choices": [], "usage": usage_of(reply.usage)}
