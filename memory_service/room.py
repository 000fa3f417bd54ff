"""Room in banks that have a capacity. Owns the invariants that a bank never holds more than it, that a write and the
evictions it needs are one transaction, and that what an eviction takes beyond that goes in the background, in steps.

The plan of an eviction is made once, from the ledger. Its rest stands in the ledger (`doomed`) and in the database, so
that a write that needs room takes the next of it, and a restart goes on with it.
"""

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection

from memory_service import bank_rows, chunk_rows, gone_rows
from memory_service.directory import Directory
from memory_service.domain import Bank, Capacity, Chunk, Eviction, EvictionReason, Unit
from memory_service.errors import ServiceError
from memory_service.eviction import NOBODY, Candidates, Victims, overflows, plan
from memory_service.gone_rows import Removed
from memory_service.ledger import Ledger, Loading
from memory_service.records import Records
from memory_service.removal import STEP, Removal

MOST_EXPLAINED = 10_000
# From this part of the capacity on, the ledger is loaded.
_NEAR = 0.8


class Made(NamedTuple):
    """Room for one write: ids that were evicted for it, and what is left of the plan."""

    evicted: Sequence[int] = ()
    doomed: Victims = NOBODY
    reasons: Mapping[EvictionReason, int] = {}


class Room:
    """The evictions of all banks."""

    def __init__(self, store: Records, directory: Directory, removal: Removal) -> None:
        self._records = store
        self._ledgers = store.ledgers
        self._directory = directory
        self._removal = removal
        # Bank id -> usage in the unit of its capacity, as the last write saw it. Says when to load, and no more.
        self._used: dict[int, int] = {}
        self._lock = threading.Lock()
        self._loads: dict[int, Future[None]] = {}
        self._loader = ThreadPoolExecutor(1, "kvbank-ledger")
        # Banks with an eviction under way. Changed by the writer's thread.
        self._evicting: set[int] = set()

    def open(self) -> None:
        """Load the ledgers that are needed soon; evictions that a stop interrupted go on."""
        with self._records.read() as connection:
            interrupted = gone_rows.saved_plans(connection)
        for bank in self._directory.all():
            self.measure(bank)
            if bank.bank_id in interrupted or self._near(bank):
                self._load(bank)

    def close(self) -> None:
        """Before the records are closed."""
        self._loader.shutdown(cancel_futures=True)

    def measure(self, bank: Bank) -> None:
        """A bank is new, or has another capacity; one that holds more than that now is brought down to it."""
        if bank.capacity is not None:
            self._used[bank.bank_id] = int(getattr(bank.usage, bank.capacity.unit))
            if self._too_full(bank):
                self._load(bank)

    def forget(self, bank: Bank) -> None:
        """A bank is gone."""
        self._ledgers.drop(bank.bank_id)
        self._used.pop(bank.bank_id, None)
        with self._lock:
            self._loads.pop(bank.bank_id, None)

    def _near(self, bank: Bank) -> bool:
        return bank.capacity is not None and self._used.get(bank.bank_id, 0) > _NEAR * bank.capacity.limit

    def _too_full(self, bank: Bank) -> bool:
        """Whether the capacity was lowered below what is there, and the policy may evict."""
        if bank.capacity is None or bank.policy.kind == "reject":
            return False
        return self._used.get(bank.bank_id, 0) > bank.capacity.limit

    # A write

    def prepare(self, bank_id: int, chunk: Chunk) -> None:
        """In a storage thread, before the write is submitted: have the ledger where it will be needed, and wait until a
        bank whose capacity was lowered is down to it, which would be too much for one transaction."""
        bank = self._directory.current(bank_id)
        if bank is None or bank.capacity is None:
            return
        if self._too_full(bank):
            self._bring_down(bank)
        if self._near(bank) and not self._ledgers.ready(bank_id):
            loading = self._load(bank)
            if self._used.get(bank_id, 0) + size_of(chunk, bank.capacity.unit) > bank.capacity.limit:
                loading.result()

    def _bring_down(self, bank: Bank) -> None:
        """Until the bank fits, or has nothing left that may go."""
        before = None
        while self._too_full(bank) and (used := self._used.get(bank.bank_id)) != before:
            before = used
            self._load(bank).result()
            # The first sees to it that a step is on its way, the second comes after that.
            self._records.writer.between(lambda: self._resume(bank)).result()
            self._records.writer.between(lambda: None).result()

    def make(self, connection: Connection, bank: Bank, chunk: Chunk) -> Made:
        """In the write's operation: evict what the chunk needs, at least. Errors: TOO_LARGE, BANK_FULL."""
        if bank.capacity is None or (usage := bank_rows.usage(connection, bank.bank_id)) is None:
            return Made()
        used, need = int(getattr(usage, bank.capacity.unit)), size_of(chunk, bank.capacity.unit)
        self._used[bank.bank_id] = used + need
        if not overflows(bank.capacity, used, need):
            return Made()
        ledger = self._ledger(connection, bank, bank.capacity)
        doomed, evicted, reasons = ledger.doomed, list[int](), Counter[EvictionReason]()
        planned = False
        while used + need > bank.capacity.limit:
            if fresh := not doomed:
                planned = True
                candidates = _without(ledger.candidates(), evicted)
                doomed = plan(candidates, bank.capacity, bank.policy, used, need)
            removed = gone_rows.evict(connection, bank.bank_id, doomed.part(0, STEP), self._records.clock.now_us())
            if fresh and not removed.ids:
                self._ledgers.drop(bank.bank_id)
                raise RuntimeError(f"the ledger of bank {bank.name} has chunks that do not exist")
            doomed = doomed.part(STEP)
            evicted += removed.ids
            reasons.update(removed.reasons)
            used -= removed.size(bank.capacity.unit)
        if planned or not doomed:
            gone_rows.save_plan(connection, bank.bank_id, doomed)
        self._used[bank.bank_id] = used + need
        return Made(evicted, doomed, reasons)

    def enter(self, bank: Bank, chunk: Chunk, made: Made) -> None:
        """The last step of the write's operation."""
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
        """After the write's commit."""
        self._removal.evicted(bank, made.evicted, made.reasons)
        if made.doomed:
            self._go_on(bank)

    # In the background

    def _go_on(self, bank: Bank) -> None:
        """The next step of the plan, unless one waits already. In the writer's thread."""
        if bank.bank_id in self._evicting:
            return
        self._evicting.add(bank.bank_id)

        def operation(connection: Connection) -> Removed:
            ledger, now = self._ledgers.get(bank.bank_id), self._directory.current(bank.bank_id)
            if ledger is None or now is None or now.capacity is None:
                return Removed([], 0, 0)
            planned = ledger.doomed
            doomed = planned or self._excess(connection, now, ledger)
            removed = gone_rows.evict(connection, bank.bank_id, doomed.part(0, STEP), self._records.clock.now_us())
            rest = doomed.part(STEP)
            if not planned or not rest:
                gone_rows.save_plan(connection, bank.bank_id, rest)
            self._used[bank.bank_id] = self._used.get(bank.bank_id, 0) - removed.size(now.capacity.unit)

            def change(ledger: Ledger) -> None:
                ledger.remove(removed.ids)
                ledger.doomed = rest
                if not rest:
                    ledger.compact()

            self._ledgers.change(bank.bank_id, change)
            return removed

        def applied(removed: Removed) -> None:
            self._evicting.discard(bank.bank_id)
            self._removal.evicted(bank, removed.ids, removed.reasons)
            ledger = self._ledgers.get(bank.bank_id)
            # Not where nothing may go: that would be asked again and again.
            if removed.ids or ledger is None or ledger.doomed:
                self._resume(bank)

        def failed(done: "Future[Removed]") -> None:
            # In the writer's thread. The ledgers are dropped; the next write that needs room loads the plan too.
            if done.exception() is not None:
                self._evicting.discard(bank.bank_id)

        self._records.writer.submit(operation, applied).add_done_callback(failed)

    def _excess(self, connection: Connection, bank: Bank, ledger: Ledger) -> Victims:
        """The plan for a bank whose capacity was lowered: until it fits, or only pinned chunks are left."""
        usage = bank_rows.usage(connection, bank.bank_id)
        if bank.capacity is None or usage is None or not self._too_full(bank):
            return NOBODY
        used = int(getattr(usage, bank.capacity.unit))
        return plan(ledger.candidates(), bank.capacity, bank.policy, used, 0, partly=True)

    def _resume(self, bank: Bank) -> None:
        """In the writer's thread."""
        bank = self._directory.current(bank.bank_id) or bank
        ledger = self._ledgers.get(bank.bank_id)
        if ledger is None:
            # Dropped, by a transaction that failed; the plan comes back with it.
            self._load(bank)
        elif ledger.doomed or self._too_full(bank):
            self._go_on(bank)

    # The ledger

    def _ledger(self, connection: Connection, bank: Bank, capacity: Capacity) -> Ledger:
        """In the writer's thread; reads it there only if `prepare` was overtaken."""
        if (ledger := self._ledgers.get(bank.bank_id)) is None:
            ledger = _read(connection, bank, capacity)
            self._ledgers.put(bank.bank_id, ledger)
        return ledger

    def _load(self, bank: Bank) -> "Future[None]":
        """Read the ledger beside the writer, once at a time."""
        with self._lock:
            loading = self._loads.get(bank.bank_id)
            if loading is None or loading.done():
                loading = self._loads[bank.bank_id] = self._loader.submit(self._load_now, bank.bank_id)
            return loading

    def _load_now(self, bank_id: int) -> None:
        """A snapshot is opened between two transactions, and what is changed after it is entered when it is read."""
        writer = self._records.writer

        def begin() -> tuple[Bank, Connection, Loading] | None:
            bank = self._directory.current(bank_id)
            if bank is None or bank.capacity is None or self._ledgers.ready(bank_id):
                return None
            return bank, self._records.snapshot(), self._ledgers.begin(bank_id)

        while (begun := writer.between(begin).result()) is not None:
            bank, connection, loading = begun
            assert bank.capacity is not None
            with connection:
                ledger = _read(connection, bank, bank.capacity)

            def finish(bank: Bank = bank, loading: Loading = loading, ledger: Ledger = ledger) -> None:
                if self._ledgers.finish(loading, ledger):
                    self._resume(bank)

            writer.between(finish).result()

    # Questions

    def explain(self, bank: Bank, need: int) -> tuple[list[Eviction], str]:
        """What a write of `need` would evict, in order, and a sentence about it: at most MOST_EXPLAINED of it, fewer
        where their metadata would fill a message."""
        capacity = bank.capacity
        if capacity is None:
            return [], ""
        used = int(getattr(bank.usage, capacity.unit))
        try:
            if not overflows(capacity, used, need) and bank.bank_id not in self._evicting:
                return [], ""
            candidates, victims = self._looked_at(bank)
            under_way = len(victims) > 0
            if not under_way:
                victims = plan(candidates, capacity, bank.policy, used, need)
            if not victims:
                return [], ""
        except ServiceError as refusal:
            return [], refusal.message
        parts = ", ".join(f"{count} {reason}" for reason, count in victims.tally().items())
        verb = "are about to go" if under_way else "would go"
        figures = f"{used} of {capacity.limit} {capacity.unit} used, {need} asked for"
        text = f"{len(victims)} of {bank.usage.chunks} chunks {verb} ({parts}): {figures}"
        shown = victims.part(0, MOST_EXPLAINED)
        with self._records.read() as connection:
            rows = {row.chunk_id: row for row in gone_rows.victims(connection, bank.bank_id, shown.ids.tolist())}
        named = zip(shown.ids.tolist(), shown.reasons(), strict=True)
        return [
            gone_rows.eviction(rows[chunk_id], reason, None) for chunk_id, reason in named if chunk_id in rows
        ], text

    def _looked_at(self, bank: Bank) -> tuple[Candidates, Victims]:
        """What the next plan would look at, and what is left of the present one."""

        def look() -> tuple[Candidates, Victims] | None:
            ledger = self._ledgers.get(bank.bank_id)
            return None if ledger is None else (Candidates(*map(np.copy, ledger.candidates())), ledger.doomed)

        while (found := self._records.writer.between(look).result()) is None:
            self._load(bank).result()
            # Deleted meanwhile, or left without a capacity: nothing would go.
            if not self._ledgers.ready(bank.bank_id):
                return Candidates(*[np.empty(0, np.int64)] * 4), NOBODY
        return found


def size_of(chunk: Chunk, unit: Unit) -> int:
    """What a chunk takes of a capacity or quota."""
    if unit == "chunks":
        return 1
    if unit == "tokens":
        return chunk.stored_length
    return chunk.payload.length if chunk.payload else 0


def _read(connection: Connection, bank: Bank, capacity: Capacity) -> Ledger:
    rows = chunk_rows.ledger_rows(connection, bank.bank_id, capacity.unit)
    return Ledger(rows, gone_rows.saved_plan(connection, bank.bank_id))


def _without(candidates: Candidates, chunk_ids: Sequence[int]) -> Candidates:
    if not chunk_ids:
        return candidates
    left = ~np.isin(candidates.ids, chunk_ids)
    return Candidates(*(column[left] for column in candidates))
