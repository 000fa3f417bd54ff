"""Tokens and ends of answers, in the words of OpenAI's API."""

from typing import Any

from model_worker.serve.answering import Reply
from model_worker.serve.usage import Usage


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return the tokens of an answer: cached ones needed no forward, and written ones went to the memory."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.written},
    }


def finish_reason(reply: Reply) -> str:
    """Return why an answer ended."""
    return "length" if reply.cut else "stop"
