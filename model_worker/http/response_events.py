"""A response as a stream of events, in the order and with the names of OpenAI's API."""

from collections.abc import AsyncIterator, Mapping
from itertools import count
from typing import Any

from model_worker.http.answers import Answer
from model_worker.http.errors import told
from model_worker.http.items import output_item, text_part
from model_worker.http.response_object import of_reply, response


async def events(answer: Answer, key: str, notes: Mapping[str, Any], system: str) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of an answer. key: of its turn. notes: of its request. system: the system prompt that it names.

    An error in between is the last event, `response.failed`.
    """
    numbers = count()
    where = {"output_index": 0}
    part = {**where, "item_id": output_item(key, notes["said"], "", complete=True)["id"], "content_index": 0}

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "sequence_number": next(numbers), **fields}

    yield event("created", response=response(key, notes, "in_progress", system))
    yield event("in_progress", response=response(key, notes, "in_progress", system))
    begun = {**output_item(key, notes["said"], "", complete=True), "status": "in_progress", "content": []}
    yield event("output_item.added", **where, item=begun)
    yield event("content_part.added", **part, part=text_part(""))
    try:
        async for piece in answer.pieces():
            yield event("output_text.delta", **part, delta=piece, logprobs=[])
        reply = await answer.reply()
    except Exception as error:
        why = told(error)
        reason = {"code": "rate_limit_exceeded" if why.status == 429 else "server_error", "message": why.message}
        yield event("failed", response=response(key, notes, "failed", system, error=reason))
        return
    document = of_reply(key, notes, reply)
    [item] = document["output"]
    yield event("output_text.done", **part, text=reply.text, logprobs=[])
    yield event("content_part.done", **part, part=item["content"][0])
    yield event("output_item.done", **where, item=item)
    yield event(str(document["status"]), response=document)
