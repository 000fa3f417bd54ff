"""Room in banks that have a capacity. Owns the invariants that a bank never holds more than it, that a write and the
evictions it needs are one transaction, and that what an eviction takes beyond that goes in the background, in steps.

The plan of an eviction is made once, from the ledger. Its rest stands in the ledger (`doomed`) and in the database, so
that a write that needs room takes the next of it, and a restart goes on with it. A step that cannot be written ends the
eviction: the next write that needs room tries again, and so does the timer, after a pause that grows.

Nothing here makes a thread wait, but for the one that reads ledgers: who has to wait for a bank gets a future.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from sqlalchemy import Connection

from memory_service.domain.chunk_size import size_of
from memory_service.domain.errors import ServiceError
from memory_service.domain.eviction import NOBODY, Candidates, Victims, full, overflows, plan
from memory_service.domain.model import Bank, Capacity, Chunk, Eviction, EvictionReason, Usage
from memory_service.observe.troubles import Troubles
from memory_service.storage.local.evicting.ledger import Ledger, Loading
from memory_service.storage.local.evicting.removal import STEP, Removal
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.records import bank_rows, chunk_rows, gone_rows
from memory_service.storage.local.records.gone_rows import Removed
from memory_service.storage.local.records.records import Records

MOST_EXPLAINED = 10_000
# From this part of the capacity on, the ledger is loaded.
_NEAR = 0.8
# Readings of a ledger, each of which a transaction that failed has made useless.
_MOST_READINGS = 3
# Seconds between two tries to go on with an eviction that could not be written.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class CrowdedError(ServiceError):
    """A bank whose capacity was lowered holds more than a write can evict; it is tried again when the bank is down."""

    def __init__(self) -> None:
        super().__init__("BANK_FULL", "the bank is being brought down to its capacity")


class Made(NamedTuple):
    """Room for one write: ids that were evicted for it, and what is left of the plan."""

    evicted: Sequence[int] = ()
    doomed: Victims = NOBODY
    reasons: Mapping[EvictionReason, int] = {}


class Room:
    """Plans and makes the evictions of all banks."""

    def __init__(self, store: Records, directory: KnownBanks, removal: Removal, troubles: Troubles) -> None:
        self._records = store
        self._ledgers = store.ledgers
        self._directory = directory
        self._removal = removal
        self._troubles = troubles
        # Bank id -> usage in the unit of its capacity, as the last write saw it. Says when to load, and no more.
        self._used: dict[int, int] = {}
        self._lock = threading.Lock()
        self._loads: dict[int, Future[None]] = {}
        self._loader = ThreadPoolExecutor(1, "kvbank-ledger")
        # Banks with an eviction under way. Changed by the writer's thread.
        self._evicting: set[int] = set()
        # What writes wait for, by bank: that it is down to its capacity, or that nothing more may go.
        self._waited: dict[int, Future[None]] = {}
        # Banks whose eviction could not be written: when it is tried again (monotonic), and the pause before that.
        self._pauses: dict[int, tuple[float, float]] = {}
        self._closed = False

    def open(self) -> None:
        """Load the ledgers that are needed soon, and go on with evictions that a stop interrupted."""
        with self._records.read() as connection:
            interrupted = gone_rows.saved_plans(connection)
        for bank in self._directory.all():
            self.measure(bank)
            if bank.bank_id in interrupted or self._near(bank):
                self._load(bank)

    def close(self) -> None:
        """Begin no step any more. This is called before the records are closed."""
        self._closed = True
        for bank_id in list(self._waited):
            self._settle(bank_id, _not_serving())
        self._loader.shutdown(cancel_futures=True)

    def try_again(self) -> None:
        """Go on with evictions that could not be written, after their pause. Call this every second."""
        now = time.monotonic()
        for bank_id, (due, _) in list(self._pauses.items()):
            if due <= now and (bank := self._directory.current(bank_id)) is not None:
                self._load(bank)

    @property
    def stalled(self) -> int:
        """Return how many banks have an eviction that could not be written."""
        return len(self._pauses)

    def measure(self, bank: Bank) -> None:
        """Learn that a bank is new, or has another capacity; where it holds more than that, it is brought down to
        it."""
        if bank.capacity is not None:
            self._used[bank.bank_id] = int(getattr(bank.usage, bank.capacity.unit))
            if self._too_full(bank):
                self._load(bank)
        if not self._too_full(bank):
            self._well(bank)
            self._settle(bank.bank_id)

    def forget(self, bank: Bank) -> None:
        """Learn that a bank is gone."""
        self._ledgers.drop(bank.bank_id)
        self._used.pop(bank.bank_id, None)
        self._well(bank)
        self._settle(bank.bank_id)
        with self._lock:
            self._loads.pop(bank.bank_id, None)

    def _near(self, bank: Bank) -> bool:
        return bank.capacity is not None and self._used.get(bank.bank_id, 0) > _NEAR * bank.capacity.limit

    def _too_full(self, bank: Bank) -> bool:
        """Tell whether a bank holds more than its capacity, which was lowered, and the policy may evict."""
        if bank.capacity is None or bank.policy.kind == "reject":
            return False
        return self._used.get(bank.bank_id, 0) > bank.capacity.limit

    # A write

    def waited_for(self, bank_id: int, chunk: Chunk) -> "Future[None] | None":
        """Return what a write has to wait for before it is submitted: a bank whose capacity was lowered is brought down
        to it, which would be too much for one transaction, or its ledger is read. None is returned where nothing is
        waited for. Never blocks."""
        bank = self._directory.current(bank_id)
        if bank is None or bank.capacity is None:
            return None
        if self._too_full(bank):
            return self._down(bank)
        if self._near(bank) and not self._ledgers.ready(bank_id) and not self._closed:
            loading = self._load(bank)
            if self._used.get(bank_id, 0) + size_of(chunk, bank.capacity.unit) > bank.capacity.limit:
                return loading
        return None

    def _down(self, bank: Bank) -> "Future[None]":
        """Bring a bank down. The future is done when the bank fits its capacity, or nothing more may go; it has the
        error of a step that could not be written."""
        with self._lock:
            waited = self._waited.get(bank.bank_id)
            if waited is not None:
                return waited
            waited = self._waited[bank.bank_id] = Future()
        waited.set_running_or_notify_cancel()
        if self._closed:
            self._settle(bank.bank_id, _not_serving())
        else:
            self._load(bank)
        return waited

    def _settle(self, bank_id: int, error: BaseException | None = None) -> None:
        """End the wait of those who wait for a bank, with an error where there is one."""
        with self._lock:
            waited = self._waited.pop(bank_id, None)
        if waited is None:
            return
        if error is None:
            waited.set_result(None)
        else:
            waited.set_exception(error)

    def make(self, connection: Connection, bank: Bank, chunk: Chunk) -> Made:
        """Evict what the chunk needs, in the operation of its write. Errors: TOO_LARGE, BANK_FULL, CrowdedError."""
        if bank.capacity is None or (usage := bank_rows.usage(connection, bank.bank_id)) is None:
            return Made()
        used, need = int(getattr(usage, bank.capacity.unit)), size_of(chunk, bank.capacity.unit)
        if not overflows(bank.capacity, used, need):
            self._used[bank.bank_id] = used + need
            return Made()
        ledger = self._ledger(connection, bank, bank.capacity)
        doomed, evicted, reasons = ledger.doomed, list[int](), Counter[EvictionReason]()
        planned, lowered = False, used > bank.capacity.limit
        while used + need > bank.capacity.limit:
            if fresh := not doomed:
                planned = True
                candidates = _without(ledger.candidates(), evicted)
                doomed = plan(candidates, bank.capacity, bank.policy, used, need)
            if lowered and len(doomed) > 2 * STEP:
                # As it is, whatever a transaction that failed has left here: this is what is waited for.
                self._used[bank.bank_id] = used
                raise CrowdedError
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
        self._removal.evicted(bank, made.evicted, made.reasons)
        self._well(bank)
        if made.doomed:
            self._go_on(bank)

    def grown(self, bank: Bank, usage: Usage, chunk_id: int, by: int) -> None:
        """Count what a chunk has grown by new metadata; this is the last step of that operation. Errors: BANK_FULL,
        where the policy evicts nothing; otherwise what is too much goes in the background."""
        if bank.capacity is None or bank.capacity.unit != "bytes":
            return
        if by > 0 and usage.bytes > bank.capacity.limit and bank.policy.kind == "reject":
            raise full(bank.capacity, usage.bytes - by, by, "its policy evicts nothing")
        self._used[bank.bank_id] = usage.bytes
        self._ledgers.change(bank.bank_id, lambda ledger: ledger.resize(chunk_id, by))

    def settle_down(self, bank_id: int) -> None:
        """Bring a bank down that is too full after a chunk has grown. This is called after the commit."""
        bank = self._directory.current(bank_id)
        if bank is not None and self._too_full(bank):
            self._load(bank)

    # In the background

    def _go_on(self, bank: Bank) -> None:
        """Submit the next step of the plan, unless one waits already. This runs in the writer's thread."""
        if bank.bank_id in self._evicting or self._closed:
            return
        self._evicting.add(bank.bank_id)
        taken = 0

        def operation(connection: Connection) -> Removed:
            nonlocal taken
            ledger, now = self._ledgers.get(bank.bank_id), self._directory.current(bank.bank_id)
            if ledger is None or now is None or now.capacity is None:
                return Removed([], 0, 0)
            planned = ledger.doomed
            doomed = planned or self._excess(connection, now, ledger)
            removed = gone_rows.evict(connection, bank.bank_id, doomed.part(0, STEP), self._records.clock.now_us())
            rest = doomed.part(STEP)
            if not planned or not rest:
                gone_rows.save_plan(connection, bank.bank_id, rest)
            taken = removed.size(now.capacity.unit)
            self._used[bank.bank_id] = self._used.get(bank.bank_id, 0) - taken

            def change(ledger: Ledger) -> None:
                ledger.remove(removed.ids)
                ledger.doomed = rest
                if not rest:
                    ledger.compact()

            self._ledgers.change(bank.bank_id, change)
            return removed

        def applied(removed: Removed) -> None:
            self._evicting.discard(bank.bank_id)
            self._well(bank)
            self._removal.evicted(bank, removed.ids, removed.reasons)
            ledger = self._ledgers.get(bank.bank_id)
            # Not where nothing may go: that would be asked again and again.
            if removed.ids or ledger is None or ledger.doomed:
                self._resume(bank)
            else:
                self._settle(bank.bank_id)

        def failed(done: "Future[Removed]") -> None:
            # In the writer's thread. The ledgers are dropped; whoever tries again loads the plan too.
            if (error := done.exception()) is not None:
                self._evicting.discard(bank.bank_id)
                self._used[bank.bank_id] = self._used.get(bank.bank_id, 0) + taken
                self._pause(bank)
                self._settle(bank.bank_id, error)

        self._records.writer.submit(operation, applied).add_done_callback(failed)

    def _pause(self, bank: Bank) -> None:
        last = self._pauses.get(bank.bank_id)
        pause = _FIRST_PAUSE_S if last is None else min(2 * last[1], _LONGEST_PAUSE_S)
        self._pauses[bank.bank_id] = (time.monotonic() + pause, pause)
        self._troubles.begin("evictions", "not written; the next write tries again, and so does the service")

    def _well(self, bank: Bank) -> None:
        """Note that an eviction of the bank was written, or is not needed any more."""
        if self._pauses.pop(bank.bank_id, None) is not None and not self._pauses:
            self._troubles.end("evictions")

    def _excess(self, connection: Connection, bank: Bank, ledger: Ledger) -> Victims:
        """Plan the evictions of a bank whose capacity was lowered, until it fits, or only pinned chunks are left."""
        usage = bank_rows.usage(connection, bank.bank_id)
        if bank.capacity is None or usage is None or not self._too_full(bank):
            return NOBODY
        used = self._used[bank.bank_id] = int(getattr(usage, bank.capacity.unit))
        return plan(ledger.candidates(), bank.capacity, bank.policy, used, 0, partly=True)

    def _resume(self, bank: Bank) -> None:
        """Go on with the evictions of a bank, where some are left. This runs in the writer's thread."""
        current = self._directory.current(bank.bank_id)
        if current is None or current.capacity is None:
            self._settle(bank.bank_id)
            return
        ledger = self._ledgers.get(bank.bank_id)
        if ledger is None:
            # Dropped, by a transaction that failed; the plan comes back with it.
            self._load(current)
        elif ledger.doomed or self._too_full(current):
            self._go_on(current)
        else:
            self._well(bank)
            self._settle(bank.bank_id)

    # The ledger

    def _ledger(self, connection: Connection, bank: Bank, capacity: Capacity) -> Ledger:
        """Return the ledger of a bank, in the writer's thread; it is read there only where `_load` has not done it
        yet."""
        if (ledger := self._ledgers.get(bank.bank_id)) is None:
            ledger = _read(connection, bank, capacity)
            self._ledgers.put(bank.bank_id, ledger)
        return ledger

    def _load(self, bank: Bank) -> "Future[None]":
        """Read the ledger beside the writer, once at a time, if it is not at hand; then go on with what is to go."""
        with self._lock:
            loading = self._loads.get(bank.bank_id)
            # One that runs may have looked before the change for which this is called.
            if loading is None or loading.done() or loading.running():
                loading = self._loads[bank.bank_id] = self._loader.submit(self._load_now, bank.bank_id)
            return loading

    def _load_now(self, bank_id: int) -> None:
        """Read a ledger from a snapshot that is opened between two transactions; changes that are made after it are
        entered when it has been read."""
        try:
            self._read_beside(bank_id)
        except BaseException as error:
            self._settle(bank_id, error)
            raise

    def _read_beside(self, bank_id: int) -> None:
        writer = self._records.writer

        def begin() -> tuple[Bank, Connection, Loading] | None:
            bank = self._directory.current(bank_id)
            if self._closed or bank is None or bank.capacity is None:
                self._settle(bank_id)
                return None
            if self._ledgers.ready(bank_id):
                self._resume(bank)
                return None
            return bank, self._records.snapshot(), self._ledgers.begin(bank_id)

        for _ in range(_MOST_READINGS):
            if (begun := writer.between(begin).result()) is None:
                return
            bank, connection, loading = begun
            assert bank.capacity is not None
            with connection:
                ledger = _read(connection, bank, bank.capacity)

            def finish(bank: Bank = bank, loading: Loading = loading, ledger: Ledger = ledger) -> bool:
                finished = self._ledgers.finish(loading, ledger)
                if finished:
                    self._resume(bank)
                return finished

            # Not again where the step that follows has failed, and the ledger is gone with it: that would not end.
            if writer.between(finish).result():
                return
        text = f"the records of bank {bank.name} cannot be read in peace: transactions fail"
        raise ServiceError("STORAGE_ERROR", text)

    # Questions

    def explain(self, bank: Bank, need: int) -> tuple[list[Eviction], str]:
        """Return what a write of `need` would evict, in order, and a sentence about it: at most MOST_EXPLAINED chunks,
        and fewer where their metadata would fill a message."""
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
        """Return what the next plan would look at, and what is left of the present one."""

        def look() -> tuple[Candidates, Victims] | None:
            ledger = self._ledgers.get(bank.bank_id)
            return None if ledger is None else (Candidates(*map(np.copy, ledger.candidates())), ledger.doomed)

        while (found := self._records.writer.between(look).result()) is None:
            self._load(bank).result()
            # Deleted meanwhile, or left without a capacity: nothing would go.
            if not self._ledgers.ready(bank.bank_id):
                return Candidates(*[np.empty(0, np.int64)] * 4), NOBODY
        return found


def _not_serving() -> ServiceError:
    return ServiceError("NOT_SERVING", "the service is shutting down")


def _read(connection: Connection, bank: Bank, capacity: Capacity) -> Ledger:
    rows = chunk_rows.ledger_rows(connection, bank.bank_id, capacity.unit)
    return Ledger(rows, gone_rows.saved_plan(connection, bank.bank_id))


def _without(candidates: Candidates, chunk_ids: Sequence[int]) -> Candidates:
    if not chunk_ids:
        return candidates
    left = ~np.isin(candidates.ids, chunk_ids)
    return Candidates(*(column[left] for column in candidates))
