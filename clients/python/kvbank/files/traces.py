"""Traces say what happened to the chunks of banks: written, retrieved, gone. The service records them, and commands
read them.

This file owns the form of a trace: JSON lines, an event each, which begin with a line of the form's version. A trace
has numbers and the names of banks, no texts and no vectors. Every start of the service begins anew in the same file,
and so does a service whose file was emptied under it.
"""

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

VERSION = 1
# What the first line of a trace begins with.
HEAD = b'{"kvbank_trace":'
# Bytes of the longest line; a retrieval of 100,000 hits has two million.
_LONGEST = 1 << 24


class TraceError(ValueError):
    """The error for a file that is no trace, or cannot be read. Its text is one line for people."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The service has begun to record. store: the identity of what is stored. Times are in milliseconds since 1970."""

    time: int
    store: str


@dataclass(frozen=True, slots=True)
class Wrote:
    """A chunk was written. tokens, size: what it takes of a capacity in tokens, and in bytes."""

    time: int
    bank: str
    chunk: int
    tokens: int
    size: int


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A retrieval was answered and counted. queries: the ids of the chunks that each query found, best first."""

    time: int
    bank: str
    queries: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Gone:
    """Chunks have left a bank. why: deleted, evicted, expired or quarantined."""

    time: int
    bank: str
    chunks: tuple[int, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A bank was deleted with all its chunks."""

    time: int
    bank: str


@dataclass(frozen=True, slots=True)
class Lost:
    """So many events are not in the trace, because the disk was slower than they came."""

    time: int
    events: int


Event: TypeAlias = Begun | Wrote | Retrieved | Gone | Dropped | Lost


def line(event: Event) -> bytes:
    """Return the line of an event, with its end."""
    return json.dumps(_written(event), separators=(",", ":")).encode() + b"\n"


def _written(event: Event) -> dict[str, Any]:
    match event:
        case Begun(time, store):
            return {"kvbank_trace": VERSION, "t": time, "store": store}
        case Wrote(time, bank, chunk, tokens, size):
            return {"t": time, "bank": bank, "write": chunk, "tokens": tokens, "bytes": size}
        case Retrieved(time, bank, queries):
            return {"t": time, "bank": bank, "retrieve": queries}
        case Gone(time, bank, chunks, why):
            return {"t": time, "bank": bank, "gone": chunks, "why": why}
        case Dropped(time, bank):
            return {"t": time, "bank": bank, "dropped": True}
        case Lost(time, events):
            return {"t": time, "lost": events}


def read(path: Path) -> Iterator[Event]:
    """Yield the events of a trace, which may be packed by gzip (a name that ends in .gz).

    A line that a kill has cut off, which is the last one or stands before a new beginning, is passed over. Errors:
    TraceError.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise TraceError(f"{path} is no file")
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from _events(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _events(path: Path, file: BinaryIO | gzip.GzipFile) -> Iterator[Event]:
    broken, number = 0, 0
    while raw := file.readline(_LONGEST):
        number += 1
        try:
            event = _event(raw)
        except (ValueError, RecursionError):
            event = None
        if number == 1 and not isinstance(event, Begun):
            raise TraceError(f"{path} is no trace of version {VERSION}")
        if broken and not isinstance(event, Begun):
            break
        broken = number if event is None else 0
        if event is not None:
            yield event
        elif not raw.endswith(b"\n") and len(raw) < _LONGEST:
            return
    if number == 0:
        raise TraceError(f"{path} is empty")
    if broken:
        raise TraceError(f"{path}: line {broken} is no line of a trace of version {VERSION}")


def _event(raw: bytes) -> Event:
    """Return the event of a line. Errors: ValueError."""
    match json.loads(raw):
        case {"kvbank_trace": version, "t": int(time), "store": str(store)} if version == VERSION:
            return Begun(time, store)
        case {"t": int(time), "bank": str(bank), "write": int(chunk), "tokens": int(tokens), "bytes": int(size)}:
            return Wrote(time, bank, chunk, tokens, size)
        case {"t": int(time), "bank": str(bank), "retrieve": list(queries)}:
            return Retrieved(time, bank, tuple(map(_ids, queries)))
        case {"t": int(time), "bank": str(bank), "gone": chunks, "why": str(why)}:
            return Gone(time, bank, _ids(chunks), why)
        case {"t": int(time), "bank": str(bank), "dropped": True}:
            return Dropped(time, bank)
        case {"t": int(time), "lost": int(events)}:
            return Lost(time, events)
    raise ValueError


def _ids(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(isinstance(each, int) for each in found):
        raise ValueError
    return tuple(found)
