"""A trace is what happened to the chunks of one bank, step by step, as the service has recorded it.

A replay gives the same steps to banks that are smaller. It asks only for what the recorded bank had: chunks that were
there before the recording are not known, and what a full bank has evicted was asked for no more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from kvbank.files import traces
from model_worker.errors import InputError


@dataclass(frozen=True, slots=True)
class Write:
    """A chunk is written."""

    chunk: int


@dataclass(frozen=True, slots=True)
class Retrieve:
    """A retrieval has found these chunks, ascending; a chunk stands there once for each query that has found it."""

    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Remove:
    """These chunks are deleted, have expired, or were damaged: no policy has chosen that."""

    chunks: tuple[int, ...]


Step: TypeAlias = Write | Retrieve | Remove


@dataclass(frozen=True, slots=True)
class Trace:
    """The steps of one bank.

    evicted: chunks that went while the bank was recorded because it was full, whose later use is not known. unknown:
    how often chunks were found that were there before the recording; these are left out. lost: events that are not in
    the trace.
    """

    name: str
    steps: Sequence[Step]
    evicted: int = 0
    unknown: int = 0
    lost: int = 0

    @property
    def written(self) -> int:
        """Return how many chunks are written."""
        return sum(isinstance(step, Write) for step in self.steps)

    @property
    def asked(self) -> int:
        """Return how often chunks are found, over all retrievals."""
        return sum(len(step.chunks) for step in self.steps if isinstance(step, Retrieve))

    @property
    def most(self) -> int:
        """Return the most chunks that are there at once."""
        most = now = 0
        for step in self.steps:
            if isinstance(step, Write):
                now += 1
                most = max(most, now)
            elif isinstance(step, Remove):
                now -= len(step.chunks)
        return most


@dataclass(slots=True)
class _Making:
    """The trace of a bank while its events are read."""

    steps: list[Step] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    live: set[int] = field(default_factory=set)
    evicted: int = 0
    unknown: int = 0

    def take(self, event: traces.Event) -> None:
        """Add the step of an event. Raises ValueError for a chunk that is written twice."""
        match event:
            case traces.Wrote(chunk=chunk):
                if chunk in self.written:
                    raise ValueError(f"chunk {chunk} is written twice")
                self.written.add(chunk)
                self.live.add(chunk)
                self.steps.append(Write(chunk))
            case traces.Retrieved(queries=queries):
                found = sorted(chunk for query in queries for chunk in query)
                self.unknown += sum(chunk not in self.written for chunk in found)
                # An answer that was under way while a chunk was removed may stand behind the removal.
                known = tuple(chunk for chunk in found if chunk in self.live)
                if known:
                    self.steps.append(Retrieve(known))
            case traces.Gone(chunks=chunks, why="evicted"):
                self.evicted += len(self.written.intersection(chunks))
            case traces.Gone(chunks=chunks):
                self._remove(chunks)
            case traces.Dropped():
                self._remove(self.live)

    def _remove(self, chunks: Iterable[int]) -> None:
        gone = tuple(sorted(self.live.intersection(chunks)))
        self.live.difference_update(gone)
        if gone:
            self.steps.append(Remove(gone))


def read_traces(path: Path) -> list[Trace]:
    """Return the traces of a file, one for each bank of which something was found; each has the name of the file, and
    where there are several, of its bank too.

    Raises InputError for a file that is no trace, or of which nothing was found.
    """
    made: dict[tuple[str, str], _Making] = {}
    store, lost = "", 0
    try:
        for event in traces.read(path):
            match event:
                case traces.Begun():
                    store = event.store
                case traces.Lost():
                    lost += event.events
                case _:
                    made.setdefault((store, event.bank), _Making()).take(event)
    except traces.TraceError as error:
        raise InputError(str(error)) from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    found = [(bank, own) for (_, bank), own in made.items() if any(isinstance(step, Retrieve) for step in own.steps)]
    if not found:
        raise InputError(f"{path} has no bank of which a chunk was written and found again")
    names = _names(path, [bank for bank, _ in found])
    return [Trace(name, own.steps, own.evicted, own.unknown, lost) for name, (_, own) in zip(names, found, strict=True)]


def _names(path: Path, banks: Sequence[str]) -> list[str]:
    """Return a name for each bank; banks of the same name, which are of several stores, are numbered."""
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    if len(banks) == 1:
        return [stem]
    before = [banks[:at].count(bank) for at, bank in enumerate(banks)]
    return [
        f"{stem}: {bank}" + (f" ({number + 1})" if number else "") for bank, number in zip(banks, before, strict=True)
    ]
