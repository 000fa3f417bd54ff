"""A response as OpenAI's API describes it, whether it is under way or has ended.

This file owns which of its fields are kept with the turn: the notes of a request, from which every worker makes the
same document later.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from model_worker.http.items import output_item
from model_worker.http.response_requests import ResponseRequest
from model_worker.serve.answering import Reply
from model_worker.serve.background import Pending
from model_worker.serve.history import History
from model_worker.serve.items import items_of
from model_worker.serve.stored import Stored
from model_worker.serve.usage import Usage

# Letters of what is kept, of the 16,384 that the metadata of a turn take.
LONGEST_NOTES = 15_000


def notes_of(body: ResponseRequest, history: History, model: str) -> dict[str, Any]:
    """Return what is kept of a request with its turn. model: the name of the model."""
    return {
        "created_at": int(time.time()),
        "model": model,
        "metadata": body.metadata or {},
        "temperature": body.temperature_or_1,
        "top_p": body.top_p_or_1,
        "max_output_tokens": body.max_output_tokens,
        "previous_response_id": body.previous_response_id,
        "conversation": body.conversation_id or None,
        "truncation": body.truncation or "disabled",
        "background": bool(body.background),
        "store": body.store is not False,
        "own": len(history.exchanges),
        "said": len(history.last),
    }


def response(key: str, notes: Mapping[str, Any], status: str, system: str = "", **fields: Any) -> dict[str, Any]:
    """Return the document of a response. notes: of its request. system: the system prompt. fields: those that differ
    from what a response has that has not ended."""
    conversation = notes.get("conversation")
    document = {
        "id": key,
        "object": "response",
        "created_at": notes.get("created_at", 0),
        "status": status,
        "error": None,
        "incomplete_details": None,
        "instructions": system or None,
        "model": notes.get("model", ""),
        "output": [],
        "parallel_tool_calls": False,
        "tool_choice": "none",
        "tools": [],
        "text": {"format": {"type": "text"}},
        "conversation": {"id": conversation} if conversation else None,
        "usage": None,
    }
    same = ("metadata", "temperature", "top_p", "max_output_tokens", "previous_response_id")
    more = {name: notes.get(name) for name in (*same, "truncation", "background", "store")}
    return document | more | fields


def of_reply(key: str, notes: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    """Return the document of a response that this worker has made."""
    status = "cancelled" if reply.left else "incomplete" if reply.cut else "completed"
    item = output_item(key, notes["said"], reply.text, complete=not reply.cut)
    return _ended(key, notes, status, reply.system, reply.usage, [item], int(time.time()))


def of_stored(found: Stored) -> dict[str, Any]:
    """Return the document of a response that is kept."""
    items = [item for item in items_of(found.turn) if item.role == "assistant"]
    output = [output_item(item.key, item.place, item.text, complete=item.complete) for item in items]
    made = found.turn.create_time
    at = None if made is None else int(made.timestamp())
    return _ended(found.turn.key, found.notes, found.status, found.system, found.usage, output, at)


def of_pending(found: Pending) -> dict[str, Any]:
    """Return the document of a response that has no turn."""
    notes = {"created_at": int(found.begun.timestamp()), "background": True, "store": True, **found.notes}
    error = {"code": "server_error", "message": found.error} if found.status == "failed" else None
    return response(found.key, notes, found.status, found.system, error=error)


def _ended(
    key: str,
    notes: Mapping[str, Any],
    status: str,
    system: str,
    usage: Usage,
    output: Sequence[Mapping[str, Any]],
    completed_at: int | None,
) -> dict[str, Any]:
    return response(
        key,
        notes,
        status,
        system,
        output=output,
        usage=_usage(usage),
        completed_at=completed_at if status == "completed" else None,
        incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
    )


def _usage(usage: Usage) -> dict[str, Any]:
    """Return the tokens of a response: cached ones needed no forward, and written ones went to the memory."""
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.written},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
