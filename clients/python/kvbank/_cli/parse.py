"""Option values for people: "chunks=10k", "bytes=2GiB", "30d". Errors are usage errors (exit code 2)."""

import re
from datetime import timedelta

import typer

import kvbank

_SCALES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BOUND = re.compile(r"(chunks|tokens|bytes)=(\d+)(k|M|G|KiB|MiB|GiB|TiB|)")
_SPAN = re.compile(r"(\d+)([smhdw])")


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
    match = _SPAN.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a time such as 90s, 15m, 12h, 30d, 2w, or never")
    try:
        return kvbank.Expiry(timedelta(seconds=int(match[1]) * _SPANS[match[2]]), renew)
    except OverflowError:
        raise typer.BadParameter(f"{text!r} is longer than a calendar") from None


def layers(text: str) -> list[int]:
    """ "1,3"."""
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise typer.BadParameter(f"{text!r} are not layers such as 1,3")
    return [int(layer) for layer in text.split(",")]


def _bounds(text: str) -> dict[str, int]:
    bounds: dict[str, int] = {}
    for part in text.split(","):
        match = _BOUND.fullmatch(part)
        if match is None or match[1] in bounds or len(match[2]) > 18:
            raise typer.BadParameter(f"{text!r} is not a bound such as chunks=10k, tokens=1M, bytes=2GiB, or none")
        bounds[match[1]] = int(match[2]) * _SCALES[match[3]]
    return bounds
