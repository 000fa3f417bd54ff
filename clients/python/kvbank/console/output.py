"""The command line prints by this file: text that no terminal obeys, and JSON that every parser takes."""

import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import PurePath
from typing import Any

# Controls, surrogates, and separators of lines and paragraphs.
_OBEYED = frozenset(("Cc", "Cs", "Zl", "Zp"))
# Of the invisible formatting characters, among them the bidirectional overrides, those that spelling and emoji need.
_JOINERS = "\u200c\u200d\u00ad"


def printable(text: str, keep: str = "") -> str:
    """Return `text` with every character that a terminal may obey written as an escape such as `\\x1b`.

    Escaped are control characters (all of ANSI and OSC sequences begin with one), invisible formatting such as
    bidirectional overrides, line and paragraph separators, and the surrogates that stand for bytes of a file name that
    are not UTF-8. keep: control characters that stay, such as line ends in a model's answer.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _is_obeyed(c) and c not in keep else c for c in text)


def _is_obeyed(character: str) -> bool:
    category = unicodedata.category(character)
    return category in _OBEYED or (category == "Cf" and character not in _JOINERS)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def one_line(text: str, longest: int = 1000) -> str:
    """Return `text` as one printable line, of which a very long one has the beginning and the end alone."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 200]} ... {line[-195:]}"


def print_line(text: str) -> None:
    """Print a text for people as one printable line."""
    print(printable(text, keep="\t"))


def print_json(value: Any) -> None:
    """Print a JSON document, with times in ISO 8601, durations in seconds, and figures that are not finite as null."""
    # DEL is the one control character that JSON lets stand as it is.
    print(json.dumps(_plain(value), indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; what JSON does not know is returned as it is."""
    for kind, made in _PLAIN:
        if isinstance(value, kind):
            return made(value)
    return value


# What becomes of values of these types; the first that fits counts.
_PLAIN: tuple[tuple[type | tuple[type, ...], Callable[[Any], Any]], ...] = (
    (float, lambda number: float(number) if math.isfinite(number) else None),
    (date, lambda time: time.isoformat()),
    (timedelta, lambda span: span.total_seconds()),
    (PurePath, str),
    (Mapping, lambda mapping: {str(key): _plain(each) for key, each in mapping.items()}),
    ((str, bytes), lambda text: text),
    ((Sequence, set, frozenset), lambda items: [_plain(each) for each in items]),
)
