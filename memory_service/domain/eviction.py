"""Which chunks go when a bank is full. This file owns the policies: MemLong's strict rule (`frequency`), the half that
its release evicts (`recency_half`), least recently used (`lru`), and `reject`.

It reads and writes nothing. A bank of a million chunks is planned in some ten milliseconds, so nothing loops over
chunks.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from memory_service.domain.errors import ServiceError
from memory_service.domain.model import Capacity, EvictionReason, Policy

_REASONS: tuple[EvictionReason, ...] = get_args(EvictionReason)
# Rows that are looked at together: what they take stays in a core's cache, and no fresh memory is needed for it.
_BLOCK = 8192


class Candidates(NamedTuple):
    """The live chunks of a bank that are not pinned, oldest first: int64 [n] each. `used` is the time of the last
    retrieval, or of the writing, in microseconds since 1970."""

    ids: NDArray[np.int64]
    # The sizes are in the unit of the bank's capacity.
    sizes: NDArray[np.int64]
    retrievals: NDArray[np.int64]
    used: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Victims:
    """Chunks that go, in order: ids int64 [n], reasons uint8 [n] (numbers of EvictionReason's values)."""

    ids: NDArray[np.int64]
    codes: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, begin: int, end: int | None = None) -> "Victims":
        """Return the victims from number `begin` up to `end`."""
        return Victims(self.ids[begin:end], self.codes[begin:end])

    def reasons(self) -> list[EvictionReason]:
        """Return the reason of each victim."""
        return [_REASONS[code] for code in self.codes]

    def tally(self) -> dict[EvictionReason, int]:
        """Count the victims of each reason."""
        counts = np.bincount(self.codes, minlength=len(_REASONS))
        return {reason: int(n) for reason, n in zip(_REASONS, counts, strict=True) if n}

    def to_bytes(self) -> bytes:
        """Pack the victims for the database: the lowest id, then ids above it and codes, 5 bytes a victim where that is
        possible."""
        base = int(self.ids.min(initial=2**63 - 1))
        above = self.ids - base
        narrow = above.astype("<u4" if int(above.max(initial=0)) < 2**32 else "<u8")
        return struct.pack("<qB", base, narrow.itemsize) + narrow.tobytes() + self.codes.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> "Victims":
        """Unpack the victims that `to_bytes` has packed."""
        base, width = struct.unpack_from("<qB", data)
        count = (len(data) - 9) // (width + 1)
        above = np.frombuffer(data, f"<u{width}", count, 9)
        return Victims(base + above.astype(np.int64), np.frombuffer(data, np.uint8, count, 9 + width * count))


NOBODY = Victims(np.empty(0, np.int64), np.empty(0, np.uint8))


def overflows(capacity: Capacity | None, usage: int, need: int) -> bool:
    """Tell whether a write makes an eviction necessary.

    usage, need: what the bank holds and what the write adds, in the unit of the capacity. Errors: TOO_LARGE for a write
    that can never fit.
    """
    if capacity is None:
        return False
    if need > capacity.limit:
        text = f"{need} {capacity.unit} do not fit in a bank of {capacity.limit}"
        raise ServiceError("TOO_LARGE", text, limit=capacity.limit, size=need)
    return usage + need > capacity.limit


def plan(
    candidates: Candidates, capacity: Capacity, policy: Policy, usage: int, need: int, *, partly: bool = False
) -> Victims:
    """Choose the victims for a write of `need`, in the unit of the capacity.

    usage: that of the whole bank, pinned chunks included. partly: return all candidates where even they are too few.
    Errors: TOO_LARGE for a write that can never fit, BANK_FULL where the policy refuses, or only pinned chunks are
    left.
    """
    if not overflows(capacity, usage, need):
        return NOBODY
    if policy.kind == "reject":
        raise full(capacity, usage, need, "its policy evicts nothing")
    chosen = _chosen(candidates, policy, usage, _keep(usage, capacity, policy, need))
    rows = np.concatenate([part for _, part in chosen])
    excess = usage + need - capacity.limit - int(candidates.sizes[rows].sum())
    room = _room(candidates, rows, excess)
    if excess > int(candidates.sizes[room].sum()) and not partly:
        pinned = usage - int(candidates.sizes.sum())
        raise full(capacity, usage, need, f"pinned chunks, which stay, take {pinned}")
    parts = [*chosen, ("room", room)]
    codes = [np.full(len(part), _REASONS.index(reason), np.uint8) for reason, part in parts]
    return Victims(candidates.ids[np.concatenate([rows, room])], np.concatenate(codes))


def wanted(capacity: Capacity, policy: Policy, usage: int, need: int) -> int:
    """Return how much goes from a full bank before a write of `need`, in the unit of the capacity, where a plan goes by
    the last use alone; 0 for other policies."""
    return usage - _keep(usage, capacity, policy, need) if policy.kind == "lru" else 0


def following(candidates: Candidates, policy: Policy, doomed: int, most: int) -> tuple[Victims, int]:
    """Return the chunks that go after those of a plan, in order, where the order is that of the last use, and when the
    last of them was used.

    doomed: the count of those of the plan. most: how many are returned at most; none for other policies.
    """
    if policy.kind != "lru" or most <= 0:
        return NOBODY, 0
    rows = _lowest(candidates.used, np.ones(len(candidates.ids), np.int64), doomed + most)[doomed:]
    codes = np.full(len(rows), _REASONS.index("least_recent"), np.uint8)
    return Victims(candidates.ids[rows], codes), int(candidates.used[rows].max(initial=0))


def full(capacity: Capacity, usage: int, need: int, why: str) -> ServiceError:
    """Make the error BANK_FULL. why: the end of its sentence."""
    text = f"the bank is full: {usage} of {capacity.limit} {capacity.unit} used, {need} asked for; {why}"
    return ServiceError("BANK_FULL", text, usage=usage, limit=capacity.limit, unit=capacity.unit, size=need)


def _keep(usage: int, capacity: Capacity, policy: Policy, need: int) -> int:
    """Return the usage at which the eviction may stop.

    Counted in chunks this is MemLong's own figure, relative to what is stored: N // 2 victims at target 50.
    """
    target = capacity.limit * policy.target // 100
    if capacity.unit == "chunks":
        stored = min(usage, capacity.limit)
        target = stored - stored * (100 - policy.target) // 100
    return min(target, capacity.limit - need)


_Rows = NDArray[np.intp]


def _chosen(candidates: Candidates, policy: Policy, usage: int, keep: int) -> list[tuple[EvictionReason, _Rows]]:
    """Choose what the policy takes: for each reason, in order, the rows of the candidates."""
    total = len(candidates.ids)
    if policy.kind == "recency_half":
        return [("oldest_half", np.arange(total // 2))]
    if policy.kind == "lru":
        return [("least_recent", _lowest(candidates.used, candidates.sizes, usage - keep))]
    # MemLong: the oldest below the lower bound, then by count and age up to the upper one.
    lower, upper = total * policy.lower // 100, total * policy.upper // 100
    usage -= int(candidates.sizes[:lower].sum())
    middle = _lowest(candidates.retrievals[lower:upper], candidates.sizes[lower:upper], usage - keep)
    return [("oldest", np.arange(lower)), ("least_retrieved", lower + middle)]


def _until(rows: _Rows, sizes: NDArray[np.int64], excess: int) -> _Rows:
    """Return the first of `rows` whose sizes make up `excess`, or all where they do not."""
    if excess <= 0:
        return rows[:0]
    for begin in range(0, len(rows), _BLOCK):
        taken = np.cumsum(sizes[rows[begin : begin + _BLOCK]])
        if taken[-1] >= excess:
            return rows[: begin + int(np.searchsorted(taken, excess)) + 1]
        excess -= int(taken[-1])
    return rows


def _room(candidates: Candidates, rows: _Rows, excess: int) -> _Rows:
    """Choose rows that the policy spares, oldest first, until the new chunk fits."""
    if excess <= 0:
        return rows[:0]
    spared = np.ones(len(candidates.ids), bool)
    spared[rows] = False
    return _until(np.flatnonzero(spared), candidates.sizes, excess)


def _lowest(values: NDArray[np.int64], sizes: NDArray[np.int64], excess: int) -> _Rows:
    """Choose the rows of the lowest values, of equal ones the first (older), until their sizes make up `excess`."""
    if excess <= 0 or not len(values):
        return np.arange(0)
    low = int(values.min())
    bits = (int(values.max()) - low).bit_length()
    # Roughly first, by the upper 16 bits: what lies beyond the border need not be put in order.
    shift = max(bits - 16, 0)
    blocks = [slice(begin, begin + _BLOCK) for begin in range(0, len(values), _BLOCK)]
    taken = np.zeros(1 << 16)
    for block in blocks:
        upper = (values[block] - low) >> shift
        taken[: int(upper.max()) + 1] += np.bincount(upper, sizes[block])
    border = low + ((int(np.searchsorted(np.cumsum(taken), excess)) + 1) << shift)
    rows = np.concatenate([np.flatnonzero(values[block] < border) + block.start for block in blocks])
    # Then 16 bits at a time: these numpy sorts by counting.
    for lower in range(0, bits, 16):
        rows = rows[np.argsort(((values[rows] - low) >> lower).astype(np.uint16), kind="stable")]
    return _until(rows, sizes, excess)
