"""The parts of an object that a reader wants: which bytes lie where in its file of the cache, and which requests bring
them. This file owns that neighbours are asked for at once, and that no request is larger than a bound."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from memory_service.domain.limits import ObjectLimits
from memory_service.domain.model import Payload, Tensor

_PREFIX = "chunks"


def key(bank_uid: str, chunk_id: int) -> str:
    """Return the key of the object of a chunk. The keys of a bank are in the order of its chunks."""
    return f"{_PREFIX}/{bank_uid}/{chunk_id:020d}"


def chunk_of(key_: str) -> tuple[str, int] | None:
    """Return the bank uid and the chunk id of a key; None for one that is none of a chunk."""
    parts = key_.split("/")
    if len(parts) != 3 or parts[0] != _PREFIX or len(parts[2]) != 20 or not parts[2].isdecimal():
        return None
    return parts[1], int(parts[2])


def below(bank_uid: str = "") -> str:
    """Return what the keys of all chunks of a bank begin with, or of those of all banks."""
    return f"{_PREFIX}/{bank_uid}" if bank_uid else _PREFIX


@dataclass(frozen=True, slots=True)
class Run:
    """Tensors that are neighbours in an object: its bytes from `begin` on and before `end`, which are at `place` in the
    file."""

    begin: int
    end: int
    place: int


@dataclass(frozen=True, slots=True)
class Layout:
    """What of an object is wanted: the tensors of a descriptor, which may be cut to some layers."""

    runs: tuple[Run, ...]
    header_length: int

    @classmethod
    def of(cls, payload: Payload) -> "Layout":
        """Lay out the tensors of a descriptor."""
        runs: list[Run] = []
        place = 0
        for tensor in payload.tensors:
            end = tensor.offset + tensor.length
            if runs and runs[-1].end == tensor.offset:
                runs[-1] = Run(runs[-1].begin, end, runs[-1].place)
            elif tensor.length:
                runs.append(Run(tensor.offset, end, place))
            place += tensor.length
        return cls(tuple(runs), payload.header_length)

    @property
    def size(self) -> int:
        """Return the bytes of all runs."""
        return sum(run.end - run.begin for run in self.runs)

    @property
    def name(self) -> str:
        """Return a short name of the runs, which no others of the same object have."""
        said = ",".join(f"{run.begin}-{run.end}" for run in self.runs)
        return xxhash.xxh3_128_hexdigest(said.encode())[:16]

    def requests(self, limits: ObjectLimits) -> Sequence[tuple[int, int]]:
        """Return (begin, end) of the requests that bring the header and all runs: those that are near each other are
        one request, which is cut where it is too large."""
        joined = [(0, max(self.header_length, 1))]
        for run in self.runs:
            if run.begin - joined[-1][1] <= limits.gap_bytes:
                joined[-1] = (joined[-1][0], run.end)
            else:
                joined.append((run.begin, run.end))
        step = limits.part_bytes
        return [(at, min(at + step, end)) for begin, end in joined for at in range(begin, end, step)]

    def within(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield what some bytes of the object have of each run: first and last byte there, and their place in the
        file."""
        for run in self.runs:
            first, last = max(begin, run.begin), min(end, run.end)
            if first < last:
                yield first, last, run.place + first - run.begin

    def place_of(self, tensor: Tensor) -> int:
        """Return where a tensor, which is not empty, begins in the file."""
        return next(place for _, _, place in self.within(tensor.offset, tensor.offset + tensor.length))
