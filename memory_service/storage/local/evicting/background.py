"""Evictions in the background: what a plan takes beyond the write that needed it, and what a bank holds beyond a
capacity that was lowered. This file owns that at most one step of a bank is under way, and that each step is a
transaction of its own, between those of writes.

The rest of a plan stands in the ledger (`doomed`) and in the database, so that a write that needs room takes the next
of it, and a restart goes on with it. A step that cannot be written ends the eviction: the next write that needs room
tries again, and so does the timer.

No thread waits here, but for those that read ledgers and plan: a write that has to wait for a bank gets a future.
"""

import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from sqlalchemy import Connection

from memory_service.domain.errors import ServiceError
from memory_service.domain.eviction import NOBODY, Victims, plan
from memory_service.domain.fair_threads import FairThreads
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, Capacity, Chunk
from memory_service.observe.troubles import Troubles
from memory_service.storage.chunks.removed import Removed
from memory_service.storage.local.evicting.ledger import Ledger
from memory_service.storage.local.evicting.ledgers import Ledgers, Loading
from memory_service.storage.local.evicting.measured import Measured
from memory_service.storage.local.evicting.planning import UNPLANNED, Planned, Planning
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.evicting.retries import Retries
from memory_service.storage.local.evicting.waits import Waits
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.records import bank_rows, chunk_rows, gone_rows
from memory_service.storage.local.records.records import Records

# Seconds for which an eviction rests at most.
_LONGEST_REST_S = 0.01
# Readings of a ledger, each of which a transaction that failed has made useless.
_MOST_READINGS = 3


class Background:
    """Goes on with evictions, a step at a time, and reads the ledgers that they need."""

    def __init__(
        self,
        records: Records,
        known: KnownBanks,
        ledgers: Ledgers,
        removal: Removal,
        troubles: Troubles,
        limits: Limits,
        pauses: Pauses,
    ) -> None:
        self.records = records
        self.known = known
        self.ledgers = ledgers
        self.removal = removal
        self.limits = limits
        self.pauses = pauses
        self.measured = Measured()
        self.waits = Waits()
        self.retries = Retries(troubles, limits)
        # Ids of banks with a step under way. The writer's thread changes it.
        self.under_way: set[int] = set()
        self._lock = threading.Lock()
        self.loads: dict[int, Future[None]] = {}
        self._loader = FairThreads(1, "kvbank-ledger")
        self._planner = FairThreads(1, "kvbank-plan")
        self._ended = threading.Event()

    @property
    def closed(self) -> bool:
        """Tell whether no step is begun any more."""
        return self._ended.is_set()

    def close(self) -> None:
        """Begin no step any more. This is called before the records are closed."""
        self._ended.set()
        self.waits.settle_all(ServiceError("NOT_SERVING", "the service is shutting down"))
        for threads in (self._loader, self._planner):
            threads.close()
            threads.left()

    def forget(self, bank_id: int) -> None:
        """Learn that a bank is gone."""
        self.ledgers.drop(bank_id)
        self.measured.used.pop(bank_id, None)
        self.settled(bank_id)
        with self._lock:
            self.loads.pop(bank_id, None)

    def settled(self, bank_id: int) -> None:
        """Learn that nothing more of a bank is to go."""
        self.retries.well(bank_id)
        self.waits.settle(bank_id)

    def try_again(self) -> None:
        """Go on with evictions that could not be written, after their pause. Call this every second."""
        for bank_id in self.retries.due():
            if (bank := self.known.current(bank_id)) is not None:
                self.load(bank)

    # Steps, in the writer's thread

    def go_on(self, bank: Bank, plan: Planned = UNPLANNED) -> None:
        """Submit the next step of the plan, unless one waits already. plan: one that was just made."""
        self.pauses.reach("eviction")
        if bank.bank_id in self.under_way or self.closed or self.pauses.leaves_out("evictions"):
            return
        self.under_way.add(bank.bank_id)
        step = EvictionStep(self, bank, plan)
        self.records.writer.submit(step.run, step.applied, tenant=bank.tenant).add_done_callback(step.ended)

    def resume(self, bank_id: int) -> None:
        """Go on with the evictions of a bank, where some are left."""
        bank = self.known.current(bank_id)
        if bank is None or bank.capacity is None:
            self.waits.settle(bank_id)
            return
        ledger = self.ledgers.get(bank_id)
        if ledger is None:
            # Dropped, by a transaction that failed; the plan comes back with it.
            self.load(bank)
        elif ledger.doomed or self.measured.too_full(bank):
            self.go_on(bank)
        else:
            self.settled(bank_id)

    def rest(self, bank: Bank, seconds: float) -> None:
        """Go on with the evictions of a bank after a rest, which readers have the interpreter and a core for: a thread
        that gives the interpreter up at each statement, and takes it again at once, keeps it from those that wait."""

        def rested() -> None:
            self.pauses.reach("eviction rests")
            self._ended.wait(min(seconds, _LONGEST_REST_S))
            self.records.writer.between(partial(self.resume, bank.bank_id))

        with suppress(RuntimeError):  # closed meanwhile
            self._planner.submit(bank.tenant, rested)

    # Plans

    def is_large(self, ledger: Ledger) -> bool:
        """Tell whether evictions of a bank are planned beside the writer."""
        return len(ledger) >= self.limits.planned_beside

    def plan(self, bank: Bank, chunk: Chunk | None = None) -> "Future[Planned]":
        """Plan beside the writer, which goes on meanwhile, what a chunk needs, or without one, what a bank holds beyond
        its capacity. It goes by the bank as it is when the plan has its turn: UNPLANNED is returned where nothing more
        is to be planned then. Any thread may call this; it never blocks. Errors by the future: those of
        `domain.eviction.plan`, NOT_SERVING."""
        try:
            return self._planner.submit(bank.tenant, partial(self._plan, bank, chunk))
        except RuntimeError:  # closed meanwhile
            refused: Future[Planned] = Future()
            refused.set_exception(ServiceError("NOT_SERVING", "the service is shutting down"))
            return refused

    def _plan(self, bank: Bank, chunk: Chunk | None) -> Planned:
        there = self.ledgers.get(bank.bank_id)
        if there is None or self.ledgers.evicting(bank.bank_id):
            return UNPLANNED
        planning = Planning(self.records, self.known, self.ledgers, bank.bank_id, chunk)
        # Behind the writes of the tenant: the one that got the plan before this brings it with it.
        begun = self.records.writer.between(partial(planning.begin, there.room()), tenant=bank.tenant)
        if not begun.result():
            return UNPLANNED
        self.pauses.reach("plan")
        return planning.planned()

    def plan_down(self, bank: Bank) -> None:
        """Plan the evictions of a bank whose capacity was lowered, and go on with them."""

        def planned(made: "Future[Planned]") -> None:
            if made.cancelled():
                return
            if (error := made.exception()) is not None:
                self.retries.failed(bank.bank_id)
                self.waits.settle(bank.bank_id, error)
            else:
                self.records.writer.between(partial(self.go_on, bank, made.result()))

        self.plan(bank).add_done_callback(planned)

    # Ledgers

    def load(self, bank: Bank) -> "Future[None]":
        """Read the ledger of a bank beside the writer, if it is not at hand; then go on with what is to go. A ledger is
        read once at a time."""
        with self._lock:
            loading = self.loads.get(bank.bank_id)
            # One that runs may have looked before the change for which this is called.
            if loading is None or loading.done() or loading.running():
                loading = self.loads[bank.bank_id] = self._loader.submit(bank.tenant, partial(self._load, bank.bank_id))
            return loading

    def read_ledger(self, connection: Connection, bank: Bank, capacity: Capacity) -> Ledger:
        """Read the ledger of a bank, with what is left of its plan."""
        self.pauses.reach("ledger")
        rows = chunk_rows.ledger_rows(connection, bank.bank_id, capacity.unit)
        return Ledger(rows, gone_rows.saved_plan(connection, bank.bank_id))

    def _load(self, bank_id: int) -> None:
        try:
            self._read_beside(bank_id)
        except BaseException as error:
            self.waits.settle(bank_id, error)
            raise

    def _read_beside(self, bank_id: int) -> None:
        writer = self.records.writer
        for _ in range(_MOST_READINGS):
            reading = LedgerReading(self, bank_id)
            if not writer.between(reading.begin).result():
                return
            reading.read()
            # Not again where the step that follows has failed, and the ledger is gone with it: that would not end.
            if writer.between(reading.finish).result():
                return
        text = f"the records of bank {reading.bank.name} cannot be read in peace: transactions fail"
        raise ServiceError("STORAGE_ERROR", text)


class EvictionStep:
    """One step of an eviction in the background: an operation of the writer's thread, with what follows its commit."""

    def __init__(self, background: Background, bank: Bank, plan: Planned) -> None:
        self._background = background
        self._bank_id = bank.bank_id
        self._bank = bank
        self._plan = plan
        # Whether the eviction is to be planned beside the writer first.
        self._unplanned = False
        # When `run` began, in seconds, and how often something had been read.
        self._begun, self._reads = 0.0, 0
        # What `run` has counted as gone, in the unit of the capacity.
        self._taken = 0

    def run(self, connection: Connection) -> Removed:
        """Evict the next chunks of the plan; where there is none, plan what goes down to the capacity."""
        self._begun, self._reads = time.monotonic(), self._background.records.reads
        background, bank_id = self._background, self._bank_id
        ledger, bank = background.ledgers.get(bank_id), background.known.current(bank_id)
        if ledger is None or bank is None or bank.capacity is None:
            return Removed([], 0, 0)
        self._bank = bank
        planned, most = ledger.doomed, background.limits.step_rows
        doomed = planned or self._excess(connection, bank, ledger)
        if self._unplanned:
            return Removed([], 0, 0)
        now = background.records.clock.now_us()
        background.pauses.reach("eviction step")
        removed = gone_rows.evict(connection, bank_id, doomed.part(0, most), now, background.limits.eviction_log)
        rest = doomed.part(most)
        if not planned or not rest:
            gone_rows.save_plan(connection, bank_id, rest)
            background.pauses.reach("eviction planned")
        self._taken = removed.size(bank.capacity.unit)
        background.measured.add(bank_id, -self._taken)

        def change(ledger: Ledger) -> None:
            ledger.remove(removed.ids)
            ledger.doomed = rest

        background.ledgers.change(bank_id, change)
        return removed

    def _excess(self, connection: Connection, bank: Bank, ledger: Ledger) -> Victims:
        """Plan the evictions of a bank whose capacity was lowered, until it fits, or only pinned chunks are left."""
        measured, usage = self._background.measured, bank_rows.usage(connection, bank.bank_id)
        if bank.capacity is None or usage is None or not measured.too_full(bank):
            return NOBODY
        used = measured.used[bank.bank_id] = int(getattr(usage, bank.capacity.unit))
        if self._plan.holds(ledger):
            return self._plan.victims
        if self._background.is_large(ledger):
            self._unplanned = True
            return NOBODY
        return plan(ledger.candidates(), bank.capacity, bank.policy, used, 0, partly=True)

    def applied(self, removed: Removed) -> None:
        """Remove what belongs to the evicted chunks, and go on with the next step."""
        background, bank_id = self._background, self._bank_id
        background.under_way.discard(bank_id)
        if self._unplanned:
            background.plan_down(self._bank)
            return
        background.retries.well(bank_id)
        background.removal.evicted(self._bank, removed.ids, removed.reasons)
        ledger = background.ledgers.get(bank_id)
        # Not where nothing may go: that would be asked again and again.
        if not removed.ids and ledger is not None and not ledger.doomed:
            background.waits.settle(bank_id)
        elif self._reads == background.records.reads:
            background.resume(bank_id)
        else:
            background.rest(self._bank, time.monotonic() - self._begun)

    def ended(self, done: "Future[Removed]") -> None:
        """Note a step that was not committed. The ledgers are dropped then, and the next try reads the plan too."""
        if (error := done.exception()) is not None:
            background, bank_id = self._background, self._bank_id
            background.under_way.discard(bank_id)
            background.measured.add(bank_id, self._taken)
            background.retries.failed(bank_id)
            background.waits.settle(bank_id, error)


class LedgerReading:
    """One reading of a ledger. `begin` and `finish` run between two transactions of the writer, `read` beside it."""

    bank: Bank

    def __init__(self, background: Background, bank_id: int) -> None:
        self._background = background
        self._bank_id = bank_id

    def begin(self) -> bool:
        """Open the snapshot, and return whether there is something to read."""
        background, bank_id = self._background, self._bank_id
        bank = background.known.current(bank_id)
        if background.closed or bank is None or bank.capacity is None:
            background.waits.settle(bank_id)
            return False
        if background.ledgers.ready(bank_id):
            background.resume(bank_id)
            return False
        self.bank, self._capacity = bank, bank.capacity
        self._connection = background.records.snapshot()
        self._loading: Loading = background.ledgers.begin(bank_id)
        return True

    def read(self) -> None:
        """Read the ledger from the snapshot."""
        with self._connection:
            self._ledger = self._background.read_ledger(self._connection, self.bank, self._capacity)

    def finish(self) -> bool:
        """Enter the changes that were made meanwhile, and go on with what is to go; return False when the ledger must
        be read again."""
        finished = self._background.ledgers.finish(self._loading, self._ledger)
        if finished:
            self._background.resume(self._bank_id)
        return finished
