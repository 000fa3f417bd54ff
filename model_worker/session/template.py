"""Chat templates: programs of others that come with a tokenizer."""

from collections.abc import Sequence
from typing import Any

from model_worker.errors import InputError


def rendered(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    """Return the text of a conversation up to where an answer begins.

    Raises InputError for a template that fails, whatever it fails with: it may be no template, refuse the conversation,
    or end in any error of Python.
    """
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True))
    except Exception as error:
        raise InputError(f"the chat template of this model fails: {type(error).__name__}: {error}") from error
