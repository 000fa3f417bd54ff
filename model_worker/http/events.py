"""A stream of server-sent events, as clients of OpenAI's API read it."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from model_worker.http.answers import Answer
from model_worker.http.errors import told

_END = b"data: [DONE]\n\n"
_STREAM = "text/event-stream"
# What the app's document says of an answer that may be a stream.
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or its pieces.", "content": {"application/json": {}, _STREAM: {}}}
}


def event(document: dict[str, Any]) -> bytes:
    """Return one event with a JSON document, and with its type as its name where it has one."""
    named = f"event: {document['type']}\n".encode() if "type" in document else b""
    return named + b"data: " + json.dumps(document).encode() + b"\n\n"


class _Streamed(StreamingResponse):
    """A response that ends its answer with itself, also where the caller leaves before the first event is made."""

    def __init__(self, answer: Answer, body: AsyncIterator[bytes]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(body, media_type=_STREAM, headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.leave()


def streamed(answer: Answer, events: AsyncIterator[dict[str, Any]], end: bytes = _END) -> StreamingResponse:
    """Return the response that sends events, and at last `end`, which says that there are no more.

    An error in between is an event of its own, and the last one. Where the caller leaves, the answer ends.
    """

    async def body() -> AsyncIterator[bytes]:
        try:
            async for each in events:
                yield event(each)
            yield end
        except Exception as error:
            yield event(told(error).body())

    return _Streamed(answer, body())
