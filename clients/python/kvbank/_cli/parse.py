"""Values of options, such as "chunks=10k", "bytes=2GiB" and "30d", are read here. Errors: typer.BadParameter, which is
a usage error (exit code 2)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

import kvbank
from kvbank.console import quantities

if TYPE_CHECKING:
    from kvbank.wire.scalars import Scalar

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,400})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,400})(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,4})?")
_BOUND = re.compile(r"(banks|chunks|tokens|bytes|calls)=(.+)")
_TURNS = re.compile(r"([1-9][0-9]{0,17})(?:-([1-9][0-9]{0,17}))?")
_UNITS = ("chunks", "tokens", "bytes")


def capacity(text: str) -> kvbank.Capacity | None:
    """Read a capacity, such as "tokens=1M"; None for "none"."""
    return None if text == "none" else kvbank.Capacity(**_bounds(text, _UNITS))


def quota(text: str) -> kvbank.Quota | None:
    """Read a quota, such as "chunks=10k,bytes=2GiB"; None for "none"."""
    return None if text == "none" else kvbank.Quota(**_bounds(text, _UNITS))


def tenant_quota(text: str) -> kvbank.TenantQuota | None:
    """Read the quota of a tenant, such as "banks=10,bytes=2GiB"; None for "none"."""
    return None if text == "none" else kvbank.TenantQuota(**_bounds(text, ("banks", *_UNITS, "calls")))


def expiry(text: str, renew: bool) -> kvbank.Expiry | None:
    """Read an expiry, such as "90s", "15m", "12h", "30d" or "2w"; None for "never"."""
    return None if text == "never" else kvbank.Expiry(span(text, ", or never"), renew)


def span(text: str, otherwise: str = "") -> timedelta:
    """Read a span of time, such as "90s", "15m", "12h", "30d" or "2w". otherwise: what an error says besides of what
    is taken."""
    try:
        if text[-1:].isdigit():
            raise ValueError("days or seconds?")
        return timedelta(seconds=quantities.seconds(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a time such as 90s, 15m, 12h, 30d, 2w{otherwise}") from None
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is longer than a calendar") from None


def metadata(pairs: Sequence[str]) -> dict[str, Scalar]:
    """Read metadata, such as "year=2024", "score=0.5", "final=true" and "who=ann"; a string that looks like a value of
    another type is quoted: 'id="7"'."""
    found: dict[str, Scalar] = {}
    for pair in pairs:
        key, equals, given = pair.partition("=")
        if not equals or not key or key in found:
            raise typer.BadParameter(f"{pair!r} is not a KEY=VALUE, or the second one of its key")
        found[key] = value(given)
    return found


def texts(pairs: Sequence[str]) -> dict[str, str]:
    """Read metadata whose values are all strings, such as those of sessions, as they stand there."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key or key in found:
            raise typer.BadParameter(f"{pair!r} is not a KEY=VALUE, or the second one of its key")
        found[key] = value
    return found


def turns(text: str) -> tuple[int, int]:
    """Read numbers of turns, such as "7" or "7-9"; return the first and the last."""
    match = _TURNS.fullmatch(text)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise typer.BadParameter(f"{text!r} are not turns such as 7 or 7-9")
    return int(match[1]), int(match[2] or match[1])


def value(text: str) -> Scalar:
    """Read one value of metadata, as `metadata` does."""
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    if text in ("true", "false"):
        return text == "true"
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def written(found: Scalar) -> str:
    """Write a value of metadata as `metadata` reads it."""
    plain = isinstance(found, str) and value(found) == found and isinstance(value(found), str)
    return str(found) if plain else json.dumps(found, ensure_ascii=False)


def interval(text: str | float) -> float:
    """Read an interval, such as "2s" or "500ms", or seconds; return 0.1 to 3600 seconds."""
    try:
        span = quantities.seconds(text) if isinstance(text, str) else text
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not 0.1 <= span <= 3600:
        raise typer.BadParameter(f"{text} is not in the range of 0.1 to 3600 seconds")
    return span


def layers(text: str) -> list[int]:
    """Read numbers of layers, such as "1,3"."""
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise typer.BadParameter(f"{text!r} are not layers such as 1,3")
    return [int(layer) for layer in text.split(",")]


def _bounds(text: str, units: Sequence[str]) -> dict[str, int]:
    bounds: dict[str, int] = {}
    for part in text.split(","):
        match = _BOUND.fullmatch(part)
        try:
            if match is None or match[1] not in units or match[1] in bounds:
                raise ValueError("no bound, or the second one of a kind")
            bounds[match[1]] = quantities.amount(match[2])
        except ValueError:
            text = f"{text!r} is not a bound such as chunks=10k, tokens=1M, bytes=2GiB, or none"
            raise typer.BadParameter(text) from None
    return bounds
