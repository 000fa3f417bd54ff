"""A conversation as one prompt, for a request without a session (pure)."""

from typing import Any

from model_worker.model import MemoryModel
from model_worker.serve.history import History
from model_worker.session.prompt import PromptFormat, prompt_format
from model_worker.user_text import begin_of, encode_between, encode_text


def prompt_of(model: MemoryModel, history: History) -> tuple[list[int], PromptFormat]:
    """Return the token ids of a conversation up to its answer, and the format that they are in."""
    style = prompt_format("auto", model.tokenizer, model.model.config, bool(history.system))
    ids = _begin(model.tokenizer, style)
    if history.system:
        ids += encode_between(model.tokenizer, style.system[0], history.system, style.system[1])
    written: str | None = None
    for exchange in history.exchanges:
        ids += _said(model.tokenizer, style, written, exchange.said)
        written = style.lead + exchange.answered
        ids += encode_text(model.tokenizer, written)
    return ids + _said(model.tokenizer, style, written, history.said), style


def _begin(tokenizer: Any, style: PromptFormat) -> list[int]:
    begin = begin_of(tokenizer) if style.begin else None
    return [] if begin is None else [begin]


def _said(tokenizer: Any, style: PromptFormat, written: str | None, text: str) -> list[int]:
    before, behind = style.around(written)
    return encode_between(tokenizer, before, text, behind)
