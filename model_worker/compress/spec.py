"""The grammar in which a compressor is asked for: `name`, or `name:parameter=value,...`.

The first parameter may go without its name: `tova:64` is `tova:m=64`. Which parameters a method has, and of which type,
the method says (`Compressor.from_words`).
"""

import math
import re
import types
from typing import Any, get_args

FIRST = ""  # the key of a first word without a name

_FORMS = {int: r"\d+", float: r"\d+(\.\d+)?(e[+-]?\d+)?", str: r".+"}


def parse(text: str) -> tuple[str, dict[str, str]]:
    """Return the name and the words by key; a first word without `=` has the key FIRST.

    Raises ValueError for a key that stands twice, and for a word that has no key.
    """
    name, _, rest = text.partition(":")
    words: dict[str, str] = {}
    for position, item in enumerate(rest.split(",") if rest else []):
        key, equals, value = item.strip().partition("=")
        if not equals and position == 0:
            key, value = FIRST, key
        elif not key:
            raise ValueError(f"{item!r} has no key")
        if key in words:
            raise ValueError(f"{key!r} stands twice")
        words[key] = value
    return name, words


def value(text: str, hint: Any) -> Any:
    """Return what `text` says as a value of the type `hint`: `int`, `float` or `str`, or one of them or None.

    Raises ValueError for a text of another form, and for a number that is not finite.
    """
    kind = next(t for t in get_args(hint) if t is not types.NoneType) if isinstance(hint, types.UnionType) else hint
    if re.fullmatch(_FORMS[kind], text) is None or (kind is float and not math.isfinite(float(text))):
        raise ValueError(f"{text!r} is no {kind.__name__}")
    return kind(text)
