"""Messages as items of OpenAI's API, one by one and in lists that come in pages."""

from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, Literal

from fastapi import Query

from model_worker.serve.items import MessageItem, item_id

Limit = Annotated[int, Query(ge=1, le=100)]
Order = Annotated[Literal["asc", "desc"], Query()]


def output_item(key: str, place: int, text: str, *, complete: bool) -> dict[str, Any]:
    """Return an answer as an item. key: of its turn. place: in the turn. complete: it was not cut off."""
    status = "completed" if complete else "incomplete"
    head = {"id": item_id(key, place), "type": "message", "role": "assistant", "status": status}
    return {**head, "content": [text_part(text)]}


def text_part(text: str) -> dict[str, Any]:
    """Return the one part of an answer."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def item(message: MessageItem) -> dict[str, Any]:
    """Return a message of either side."""
    if message.role == "assistant":
        return output_item(message.key, message.place, message.text, complete=message.complete)
    content = [{"type": "input_text", "text": message.text}]
    return {"id": message.id, "type": "message", "role": message.role, "status": "completed", "content": content}


def page(messages: Iterator[MessageItem], limit: int) -> dict[str, Any]:
    """Return the first messages, at most `limit`, and whether there are more."""
    found = [item(message) for message in islice(messages, limit + 1)]
    return item_list(found[:limit], has_more=len(found) > limit)


def item_list(items: list[dict[str, Any]], *, has_more: bool = False) -> dict[str, Any]:
    """Return a list of items."""
    first, last = (items[0]["id"], items[-1]["id"]) if items else (None, None)
    return {"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more}
