"""Every command takes its options and its connection from here. This file owns how a figure is written."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kvbank
from kvbank.console.keys import ApiKey

if TYPE_CHECKING:
    from kvbank import Bank, Client

DEFAULT_ADDRESS = "127.0.0.1:7400"

Memory = Annotated[
    str,
    typer.Option(
        "--memory", "-m", envvar="KVBANK_MEMORY", help="Memory service: HOST:PORT[,HOST:PORT], unix:PATH or a folder."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="Name of the bank.")]


@dataclass(frozen=True, slots=True)
class Service:
    """The options that say which service a command asks, and with which key."""

    memory: Memory = DEFAULT_ADDRESS
    api_key: ApiKey = None

    def connect(self) -> "Client":
        """Return a client of the service; see `connect`."""
        return connect(self.memory, self.api_key)


def connect(target: str, api_key: str | None = None) -> "Client":
    """Return a client that does not wait long: 10 s for an answer, 1 s for a server that was never reached."""
    return kvbank.connect(target, timeout=10, first_contact=1, api_key=api_key)


def size(count: float) -> str:
    """Write a number of bytes for people: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def moment(time: datetime | None) -> str:
    """Write a time to the second, in the local time zone; None is "never"."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "never"


def duration(span: timedelta) -> str:
    """Write a span of time as the options take it: "30d", "90s"."""
    seconds = span.total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:g}s"


def age(span: timedelta) -> str:
    """Write how long ago something was, in its largest unit: "3 d", "12 min"."""
    seconds = max(span.total_seconds(), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def capacity(bank: "Bank") -> str:
    """Write the capacity of a bank, such as "1,000 chunks"."""
    return bounds(bank.capacity, "unbounded")


def bounds(limits: Any, none: str) -> str:
    """Write the bounds of a Capacity or a Quota. none: what stands for no limits."""
    if limits is None:
        return none
    parts: dict[str, Callable[[int], str]] = {"chunks": _count, "tokens": _count, "bytes": size}
    given = ((unit, getattr(limits, unit), show) for unit, show in parts.items())
    return ", ".join(f"{show(limit)} {unit if unit != 'bytes' else ''}".strip() for unit, limit, show in given if limit)


def _count(number: int) -> str:
    return f"{number:,}"


def expiry(bank: "Bank") -> str:
    """Write when the chunks of a bank expire, such as "30d, renewed by use"."""
    if bank.expiry is None or bank.expiry.ttl is None:
        return "never"
    return duration(bank.expiry.ttl) + (", renewed by use" if bank.expiry.renew else "")


def reader(bank: "Bank") -> str:
    """Write the beginning of the digest of the model whose keys and values a bank holds."""
    return bank.kv.reader_digest[:12] if bank.kv else "vectors only"


def index(stats: "kvbank.IndexStats") -> str:
    """Write how a bank is searched now, such as "ivf, recall 0.991"."""
    if not stats.loaded:
        return "at rest"
    return stats.kind if stats.recall is None else f"{stats.kind}, recall {stats.recall:.3f}"
