"""Sizes, counts and spans of time are read and written here as flags and variables have them: "256MiB", "10k", "1.5h".

Errors of all that reads: ValueError with what was expected.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_SCALES: dict[str, int] = {"": 1, "B": 1}
for _power, _letter in enumerate("kMGT", 1):
    for _prefix in (_letter, _letter.upper()):
        _SCALES |= {_prefix: 1000**_power, f"{_prefix}B": 1000**_power, f"{_prefix}iB": 1024**_power}
_SPANS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
# As many digits as any quantity has, so that no text is long to read.
_QUANTITY = re.compile(r"(\d{1,19}(?:\.\d{1,9})?) ?([A-Za-z]*)")


def amount(text: str) -> int:
    """Read a size in bytes, or a count: "1GiB" (1024), "1GB" and "1G" (1000), "10k", "4096"."""
    number, unit = _parts(text, "a size or count such as 256MiB, 2GB, 10k or 4096")
    scale = _SCALES.get(unit)
    if scale is None:
        raise ValueError(f"{text!r} has no unit of a size or count; they are k, M, G, T, each with B or iB too")
    whole, _, part = number.partition(".")
    exact, rest = divmod(int(whole + part) * scale, int("1" + "0" * len(part)))
    if rest:
        raise ValueError(f"{text!r} is no whole number")
    return exact


def seconds(text: str) -> float:
    """Read a span of time in seconds: "90s", "1.5h", "500ms", "30d"; a number alone is seconds."""
    number, unit = _parts(text, "a time such as 90s, 15m, 12h, 30d or 500ms")
    if unit not in _SPANS:
        raise ValueError(f"{text!r} has no unit of time; they are ms, s, m, h, d, w")
    return float(number) * _SPANS[unit]


def _parts(text: str, expected: str) -> tuple[str, str]:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not {expected}")
    return match[1], match[2]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A kind of quantity: what the help of an option calls a value, how a text is read, and how a value is written."""

    metavar: str
    read: Callable[[str], float]
    write: Callable[[Any], str]


def _written(value: float, units: dict[str, int]) -> str:
    """Write a quantity in the largest of the units, which are ascending, of which it is a whole multiple."""
    fitting = [(unit, scale) for unit, scale in units.items() if value and value % scale == 0]
    unit, scale = fitting[-1] if fitting else ("", 1)
    return f"{value / scale:g}{unit}"


SIZE = Quantity("SIZE", amount, lambda size: _written(size, {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}))
COUNT = Quantity("COUNT", amount, lambda count: _written(count, {"": 1, "k": 1000, "M": 1000**2}))
TIME = Quantity("TIME", seconds, lambda time: _written(time, {"s": 1, "m": 60, "h": 3600}))
