"""Option values for people: "chunks=10k", "bytes=2GiB", "30d". Errors are usage errors (exit code 2)."""

import re
from datetime import timedelta

import typer

import kvbank
from kvbank import _quantities

_BOUND = re.compile(r"(chunks|tokens|bytes)=(.+)")


def capacity(text: str) -> kvbank.Capacity | None:
    """ "tokens=1M", or "none"."""
    return None if text == "none" else kvbank.Capacity(**_bounds(text))


def quota(text: str) -> kvbank.Quota | None:
    """ "chunks=10k,bytes=2GiB", or "none"."""
    return None if text == "none" else kvbank.Quota(**_bounds(text))


def expiry(text: str, renew: bool) -> kvbank.Expiry | None:
    """ "90s", "15m", "12h", "30d", "2w", or "never"."""
    if text == "never":
        return None
    try:
        if text[-1:].isdigit():
            raise ValueError("days or seconds?")
        span = timedelta(seconds=_quantities.seconds(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a time such as 90s, 15m, 12h, 30d, 2w, or never") from None
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is longer than a calendar") from None
    return kvbank.Expiry(span, renew)


def layers(text: str) -> list[int]:
    """ "1,3"."""
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise typer.BadParameter(f"{text!r} are not layers such as 1,3")
    return [int(layer) for layer in text.split(",")]


def _bounds(text: str) -> dict[str, int]:
    bounds: dict[str, int] = {}
    for part in text.split(","):
        match = _BOUND.fullmatch(part)
        try:
            if match is None or match[1] in bounds:
                raise ValueError("no bound, or the second one of a kind")
            bounds[match[1]] = _quantities.amount(match[2])
        except ValueError:
            text = f"{text!r} is not a bound such as chunks=10k, tokens=1M, bytes=2GiB, or none"
            raise typer.BadParameter(text) from None
    return bounds
