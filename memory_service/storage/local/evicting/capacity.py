"""Banks within their capacities. This file owns the invariants that a bank never holds more than its capacity, and that
a write and the evictions it needs are one transaction; what an eviction takes beyond that goes in the background.

The plan of an eviction is made once, from the ledger; see `memory_service.domain.eviction`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection

from memory_service.domain.chunk_size import size_of
from memory_service.domain.errors import ServiceError
from memory_service.domain.eviction import NOBODY, Candidates, Victims, full, overflows, plan
from memory_service.domain.model import Bank, Capacity, Chunk, Eviction, EvictionReason, Usage
from memory_service.storage.chunks import explaining
from memory_service.storage.chunks.removed import Removed
from memory_service.storage.local.evicting.background import Background
from memory_service.storage.local.evicting.ledger import Copied, Ledger
from memory_service.storage.local.evicting.planning import UNPLANNED, Planned
from memory_service.storage.local.records import bank_rows, gone_rows


class CrowdedError(ServiceError):
    """The refusal of a write into a bank whose capacity was lowered, and which holds more than one write can evict. The
    write is tried again when the bank is down."""

    def __init__(self) -> None:
        super().__init__("BANK_FULL", "the bank is being brought down to its capacity")


class UnplannedError(ServiceError):
    """The refusal of a write that needs room in a large bank, whose eviction is not planned yet. The write is tried
    again with a plan."""

    def __init__(self) -> None:
        super().__init__("BANK_FULL", "an eviction is being planned")


class Made(NamedTuple):
    """What made room for one write: ids that were evicted for it, and what is left of the plan."""

    evicted: Sequence[int] = ()
    doomed: Victims = NOBODY
    reasons: Mapping[EvictionReason, int] = {}


NOTHING_MADE = Made()


class Capacities:
    """Keeps all banks within their capacities. The writer's thread calls the methods, except where it is said."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._records = background.records
        self._ledgers = background.ledgers
        self._known = background.known
        self._measured = background.measured
        self._limits = background.limits

    def open(self) -> None:
        """Load the ledgers that are needed soon, and go on with evictions that a stop interrupted. This is called at
        the start, before any write."""
        with self._records.read() as connection:
            interrupted = gone_rows.saved_plans(connection)
        for bank in self._known.all():
            self.measure(bank)
            if bank.bank_id in interrupted or self._measured.near(bank):
                self._background.load(bank)

    @property
    def stalled(self) -> int:
        """Return how many banks have an eviction that could not be written. Any thread may ask."""
        return len(self._background.retries)

    def measure(self, bank: Bank) -> None:
        """Learn that a bank is new, or has another capacity; where it holds more than that, it is brought down to
        it."""
        if bank.capacity is not None:
            self._measured.used[bank.bank_id] = int(getattr(bank.usage, bank.capacity.unit))
            if self._measured.too_full(bank):
                self._background.load(bank)
        if not self._measured.too_full(bank):
            self._background.settled(bank.bank_id)

    def forget(self, bank: Bank) -> None:
        """Learn that a bank is gone."""
        self._background.forget(bank.bank_id)

    # A write

    def waited_for(self, bank_id: int, chunk: Chunk) -> "Future[None] | None":
        """Return what a write has to wait for before it is submitted: a bank whose capacity was lowered is brought down
        to it, which would be too much for one transaction, or its ledger is read. None is returned where nothing is
        waited for. Any thread may call this; it never blocks."""
        bank = self._known.current(bank_id)
        if bank is None or bank.capacity is None:
            return None
        if self._measured.too_full(bank):
            return self._down(bank)
        if self._measured.near(bank) and not self._ledgers.ready(bank_id) and not self._background.closed:
            loading = self._background.load(bank)
            if self._measured.used.get(bank_id, 0) + size_of(chunk, bank.capacity.unit) > bank.capacity.limit:
                return loading
        return None

    def _down(self, bank: Bank) -> "Future[None]":
        """Bring a bank down. The future is done when the bank fits its capacity, or nothing more may go; it has the
        error of a step that could not be written."""
        waited, new = self._background.waits.of(bank.bank_id)
        if new and self._background.closed:
            self._background.waits.settle(bank.bank_id, ServiceError("NOT_SERVING", "the service is shutting down"))
        elif new:
            self._background.load(bank)
        return waited

    def planned(self, bank: Bank, chunk: Chunk) -> "Future[Planned]":
        """Plan what a write needs that was refused for want of a plan. Any thread may call this; it never blocks.
        Errors by the future: TOO_LARGE, BANK_FULL, NOT_SERVING."""
        return self._background.plan(bank, chunk)

    def make(self, connection: Connection, bank: Bank, chunk: Chunk, plan: Planned = UNPLANNED) -> Made:
        """Evict what the chunk needs, in the operation of its write. plan: one that was just made for the write.
        Errors: TOO_LARGE, BANK_FULL, CrowdedError, UnplannedError."""
        if bank.capacity is None or (usage := bank_rows.usage(connection, bank.bank_id)) is None:
            return NOTHING_MADE
        used, need = int(getattr(usage, bank.capacity.unit)), size_of(chunk, bank.capacity.unit)
        if not overflows(bank.capacity, used, need):
            self._measured.used[bank.bank_id] = used + need
            return NOTHING_MADE
        ledger = self._ledger(connection, bank, bank.capacity)
        victims = plan.victims if plan.holds(ledger) else NOBODY
        if not ledger.doomed and not victims and bank.policy.kind != "reject" and self._background.is_large(ledger):
            self._measured.used[bank.bank_id] = used
            raise UnplannedError
        going = _Going(bank, bank.capacity, ledger, need, used, self._limits.step_rows, victims)
        while not going.fits:
            step = going.next_step()
            if going.crowded:
                # As it is, whatever a transaction that failed has left here: this is what is waited for.
                self._measured.used[bank.bank_id] = going.used
                raise CrowdedError
            removed = self._evict(connection, bank.bank_id, step)
            if going.fresh and not removed.ids:
                self._ledgers.drop(bank.bank_id)
                raise RuntimeError(f"the ledger of bank {bank.title} has chunks that do not exist")
            going.went(removed)
        if going.planned or not going.doomed:
            gone_rows.save_plan(connection, bank.bank_id, going.doomed)
        self._measured.used[bank.bank_id] = going.used + need
        return Made(going.evicted, going.doomed, going.reasons)

    def _evict(self, connection: Connection, bank_id: int, victims: Victims) -> Removed:
        now = self._records.clock.now_us()
        return gone_rows.evict(connection, bank_id, victims, now, self._limits.eviction_log)

    def _ledger(self, connection: Connection, bank: Bank, capacity: Capacity) -> Ledger:
        """Return the ledger of a bank; it is read here only where it has not been read beside the writer yet."""
        if (ledger := self._ledgers.get(bank.bank_id)) is None:
            ledger = self._background.read_ledger(connection, bank, capacity)
            self._ledgers.put(bank.bank_id, ledger)
        return ledger

    def enter(self, bank: Bank, chunk: Chunk, made: Made) -> None:
        """Enter a write in the ledger; this is the last step of its operation."""
        if bank.capacity is None:
            return
        size = size_of(chunk, bank.capacity.unit)

        def change(ledger: Ledger) -> None:
            if made.evicted:
                ledger.remove(made.evicted)
                ledger.doomed = made.doomed
            ledger.add(chunk.chunk_id, size, chunk.created, chunk.pinned)

        self._ledgers.change(bank.bank_id, change)

    def applied(self, bank: Bank, made: Made) -> None:
        """Learn that a write was committed, and go on with what is left of its plan."""
        self._background.removal.evicted(bank, made.evicted, made.reasons)
        self._background.retries.well(bank.bank_id)
        if made.doomed:
            self._background.go_on(bank)

    def grown(self, bank: Bank, usage: Usage, chunk_id: int, by: int) -> None:
        """Count what a chunk has grown by new metadata; this is the last step of that operation. Errors: BANK_FULL,
        where the policy evicts nothing; otherwise what is too much goes in the background."""
        if bank.capacity is None or bank.capacity.unit != "bytes":
            return
        if by > 0 and usage.bytes > bank.capacity.limit and bank.policy.kind == "reject":
            raise full(bank.capacity, usage.bytes - by, by, "its policy evicts nothing")
        self._measured.used[bank.bank_id] = usage.bytes
        self._ledgers.change(bank.bank_id, lambda ledger: ledger.resize(chunk_id, by))

    def settle_down(self, bank_id: int) -> None:
        """Bring a bank down that is too full after a chunk has grown. This is called after the commit."""
        bank = self._known.current(bank_id)
        if bank is not None and self._measured.too_full(bank):
            self._background.load(bank)

    # Questions

    def explain(self, bank: Bank, need: int) -> tuple[list[Eviction], str]:
        """Return what a write of `need` would evict, in order, and a sentence about it: at most MOST_EXPLAINED chunks,
        and fewer where their metadata would fill a message. Any thread may call this."""
        evicting = self._ledgers.evicting(bank.bank_id)
        decision = explaining.decide(bank, need, evicting, lambda: self._looked_at(bank))
        text = explaining.sentence(bank, need, decision)
        if not decision.victims:
            return [], text
        shown = decision.victims.part(0, explaining.MOST_EXPLAINED)
        with self._records.read() as connection:
            rows = {row.chunk_id: row for row in gone_rows.victims(connection, bank.bank_id, shown.ids.tolist())}
        named = zip(shown.ids.tolist(), shown.reasons(), strict=True)
        return [gone_rows.eviction(rows[i], reason, None) for i, reason in named if i in rows], text

    def _looked_at(self, bank: Bank) -> tuple[Candidates, Victims]:
        """Return what the next plan would look at, and what is left of the present one."""
        while (found := self._copied(bank.bank_id)) is None:
            self._background.load(bank).result()
            # Deleted meanwhile, or left without a capacity: nothing would go.
            if not self._ledgers.ready(bank.bank_id):
                return Candidates(*[np.empty(0, np.int64)] * 4), NOBODY
        copy, doomed = found
        return copy.candidates(), doomed

    def _copied(self, bank_id: int) -> tuple[Copied, Victims] | None:
        """Return a copy of a ledger, and what is left of its plan; None where the ledger is not at hand."""
        if (there := self._ledgers.get(bank_id)) is None:
            return None
        room = there.room()

        def copied() -> tuple[Copied, Victims] | None:
            ledger = self._ledgers.get(bank_id)
            return None if ledger is None else (ledger.copied(room), ledger.doomed)

        return self._records.writer.between(copied).result()


@dataclass(slots=True)
class _Going:
    """The evictions of one write, a step at a time: first the rest of an earlier plan, then plans of its own."""

    bank: Bank
    capacity: Capacity
    ledger: Ledger
    # The size of the chunk, and what the bank holds at this moment, both in the unit of the capacity.
    need: int
    used: int
    step_rows: int
    # What is to go, of a plan that was made for this write, as long as there is no earlier one.
    doomed: Victims = NOBODY
    evicted: list[int] = field(default_factory=list)
    reasons: Counter[EvictionReason] = field(default_factory=Counter)
    # Whether a plan was made for this write, and whether the last step is the first of a plan.
    planned: bool = False
    fresh: bool = False
    lowered: bool = False

    def __post_init__(self) -> None:
        self.planned = bool(self.doomed) and not self.ledger.doomed
        self.doomed = self.ledger.doomed or self.doomed
        self.lowered = self.used > self.capacity.limit

    @property
    def fits(self) -> bool:
        """Tell whether there is room for the chunk."""
        return self.used + self.need <= self.capacity.limit

    @property
    def crowded(self) -> bool:
        """Tell whether more is to go from a bank whose capacity was lowered than one write can evict."""
        return self.lowered and len(self.doomed) > 2 * self.step_rows

    def next_step(self) -> Victims:
        """Return the chunks that go next; plan where none are left. Errors: BANK_FULL."""
        self.fresh = not self.doomed
        if self.fresh:
            self.planned = True
            candidates = _without(self.ledger.candidates(), self.evicted)
            self.doomed = plan(candidates, self.capacity, self.bank.policy, self.used, self.need)
        return self.doomed.part(0, self.step_rows)

    def went(self, removed: Removed) -> None:
        """Note what the step has removed."""
        self.doomed = self.doomed.part(self.step_rows)
        self.evicted += removed.ids
        self.reasons.update(removed.reasons)
        self.used -= removed.size(self.capacity.unit)


def _without(candidates: Candidates, chunk_ids: Sequence[int]) -> Candidates:
    if not chunk_ids:
        return candidates
    left = ~np.isin(candidates.ids, chunk_ids)
    return Candidates(*(column[left] for column in candidates))
