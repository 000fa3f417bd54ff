"""Text that people hand over, as token ids: nothing in it is a control token.

A tokenizer reads `<|im_end|>` in a text as the token that ends a turn, so that whoever writes it could end his turn and
begin another. This file owns the rule that only a template writes control tokens: what looks like one in a text is
encoded as the characters that it is written with.

Control tokens are the tokenizer's special tokens, and those added tokens that its chat template names, or writes around
what is said: a template may put them together from a role, as `'<|' + role + '|>'`. (Other added tokens, such as runs
of spaces, are ordinary text.)
"""

import re
from contextlib import suppress
from typing import Any

from model_worker.errors import InputError
from model_worker.session.template import rendered

# Conversations that are rendered to see what a template writes; not every template takes a system's words.
_TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]
_EXAMPLES = (_TALK, [{"role": "system", "content": "a"}, *_TALK])


def readable(text: str) -> str:
    """The text with halves of surrogate pairs joined, and lone ones replaced by U+FFFD: no tokenizer takes these."""
    return str(text).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, none of which is a control token; as the tokenizer has them where that is so anyway."""
    ids, control = _encode(tokenizer, text), _control_tokens(tokenizer)
    if control.keys().isdisjoint(ids):
        return ids
    parts = _broken(text, list(control.values()))
    ids = [token for part in parts for token in _encode(tokenizer, part, split_special_tokens=True)]
    return [token for token in ids if token not in control]  # a token of one character cannot be broken


def encode_between(tokenizer: Any, before: str, text: str, behind: str) -> list[int]:
    """Token ids of a text between two parts of a template, whose control tokens count.

    All three are encoded in one, as a model is used to, unless a control token would come of the text.
    """
    control = _control_tokens(tokenizer)
    whole, first, last = (_encode(tokenizer, part) for part in (before + text + behind, before, behind))
    if [x for x in whole if x in control] == [x for x in first + last if x in control]:
        return whole
    return first + encode_text(tokenizer, text) + last


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """What the tokenizer writes for each of its control tokens, by id."""
    template = _template_text(tokenizer)
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    for token, added in tokenizer.added_tokens_decoder.items():
        if added.special or (added.content in template and not added.content.isspace()):
            found[token] = added.content
    return found


def _template_text(tokenizer: Any) -> str:
    """The chat template with what it writes; empty where there is none."""
    source = getattr(tokenizer, "chat_template", None)
    if not source:
        return ""
    texts = [str(source)]
    for example in _EXAMPLES:
        with suppress(InputError):
            texts.append(rendered(tokenizer, example))
    return "\n".join(texts)


def _broken(text: str, contents: list[str]) -> list[str]:
    """The text cut behind the first character of each of `contents` in it."""
    anywhere = re.compile("(?=" + "|".join(re.escape(content) for content in contents if content) + ")")
    cuts = [found.start() + 1 for found in anywhere.finditer(text)]
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if begin < end]


def _encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False, **options)) if text else []
