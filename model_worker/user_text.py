"""User text as token ids: a text that somebody hands over never becomes a control token.

A tokenizer reads `<|im_end|>` in a text as the token that ends a turn, so that the author of the text could end the
turn and begin another. This file owns the rule that only a chat template writes control tokens: characters of a text
that look like a control token are encoded as the characters that they are.

Control tokens are the tokenizer's special tokens, and those added tokens that its chat template names or writes around
a message: a template may put them together from a role, as `'<|' + role + '|>'`. Other added tokens, such as runs of
spaces, are ordinary text.
"""

import copy
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from model_worker.errors import InputError

# Conversations that are rendered to see which tokens a template writes; not every template takes a system message.
_TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]
# The copy of a tokenizer, with the tokens that it had, by the tokenizer.
_PLAIN: WeakKeyDictionary[Any, tuple[int, Any]] = WeakKeyDictionary()
_EXAMPLES = (_TALK, [{"role": "system", "content": "a"}, *_TALK])


def readable(text: str) -> str:
    """Join the halves of surrogate pairs in a text, and replace lone ones by U+FFFD, since no tokenizer takes them."""
    return str(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text, none of which is a control token.

    The ids are the tokenizer's own where these have no control token.
    """
    ids, control = _encode(tokenizer, text), _control_tokens(tokenizer)
    if control.keys().isdisjoint(ids):
        return ids
    parts = _broken(text, list(control.values()))
    plain = _plain(tokenizer)
    ids = [token for part in parts for token in _encode(plain, part, split_special_tokens=True)]
    return [token for token in ids if token not in control]  # a token of one character cannot be broken


def begin_of(tokenizer: Any) -> int | None:
    """Return the token that the tokenizer puts in front of a text; None where it puts none."""
    first = tokenizer.encode("a", verbose=False)[:1]
    return first[0] if first == [tokenizer.bos_token_id] else None


def encode_between(tokenizer: Any, before: str, text: str, behind: str) -> list[int]:
    """Return the token ids of a text between two parts of a template, in which control tokens are control tokens.

    The three are encoded as one string, as a model is used to, unless the text would give a control token that way.
    """
    control = _control_tokens(tokenizer)
    whole, first, last = (_encode(tokenizer, part) for part in (before + text + behind, before, behind))
    if [x for x in whole if x in control] == [x for x in first + last if x in control]:
        return whole
    return first + encode_text(tokenizer, text) + last


def rendered(tokenizer: Any, turns: Sequence[dict[str, str]], *, answer: bool = True) -> str:
    """Render a conversation by the tokenizer's chat template, with `answer` up to where an answer begins.

    Raises InputError for a template that fails with any error: it may be no template, or refuse the conversation.
    """
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=answer))
    except Exception as error:  # a template is a program of others, which may raise anything
        raise InputError(f"the chat template of this model fails: {type(error).__name__}: {error}") from error


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the text of each control token of the tokenizer, by its id."""
    template = _template_text(tokenizer)
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.special or (added.content in template and not added.content.isspace()):
            found[token] = added.content
    return found


def _template_text(tokenizer: Any) -> str:
    """Return the source of the chat template and the texts that it renders, or an empty string without a template."""
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        return ""
    texts = [str(source)]
    for example in _EXAMPLES:
        with suppress(InputError):
            texts.append(rendered(tokenizer, example))
    return "\n".join(texts)


def _broken(text: str, contents: list[str]) -> list[str]:
    """Cut the text behind the first character of each occurrence of one of `contents`."""
    anywhere = re.compile("(?=" + "|".join(re.escape(content) for content in contents if content) + ")")
    cuts = [found.start() + 1 for found in anywhere.finditer(text)]
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if begin < end]


def _plain(tokenizer: Any) -> Any:
    """Return a copy of a tokenizer, for texts of which nothing is a control token.

    A call with `split_special_tokens` changes the tokenizer, and other threads that encode at that moment would write
    control tokens as characters.
    """
    size, copied = _PLAIN.get(tokenizer, (0, None))
    if copied is None or size != len(tokenizer):
        size, copied = _PLAIN[tokenizer] = len(tokenizer), copy.deepcopy(tokenizer)
    return copied


def _encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False, **options)) if text else []
