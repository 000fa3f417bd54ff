"""Banks within their capacities. This file owns the invariants that a bank never holds more than its capacity, and that
a write and the evictions it needs are one transaction; what a plan takes beyond that goes in steps, which any service
takes: the plan is in the database.

A plan is made under the lock of the bank's row, from what is there, or from the reserve that an earlier plan has left;
see `memory_service.domain.eviction` and `reserves`.
"""

import logging
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy import Connection

from memory_service.domain import eviction
from memory_service.domain.chunk_size import size_of
from memory_service.domain.errors import ServiceError
from memory_service.domain.eviction import Candidates, Victims, full, overflows, plan
from memory_service.domain.fair_threads import FairThreads
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, Capacity, Chunk, Eviction, EvictionReason
from memory_service.storage.chunks import explaining
from memory_service.storage.chunks.counts import Counts
from memory_service.storage.chunks.removed import Removed
from memory_service.storage.postgres import changing as changes
from memory_service.storage.postgres import reserves
from memory_service.storage.postgres.changing import Changing
from memory_service.storage.postgres.database import Database
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.removal import Removal
from memory_service.storage.postgres.rows import bank_rows, chunk_rows, gone_rows
from memory_service.storage.postgres.rows.change_rows import Changed

_log = logging.getLogger(__name__)


class CrowdedError(ServiceError):
    """The refusal of a write into a bank whose capacity was lowered, and which holds more than one write can evict. The
    write is tried again when the bank is down."""

    def __init__(self) -> None:
        super().__init__("BANK_FULL", "the bank is being brought down to its capacity")


@dataclass(slots=True)
class Made:
    """What made room for one write: ids that were evicted for it, why, and whether more of the plan is left."""

    evicted: list[int] = field(default_factory=list)
    reasons: Counter[EvictionReason] = field(default_factory=Counter)
    more: bool = False


class Evicting:
    """Keeps all banks within their capacities. Any thread may call it."""

    def __init__(
        self,
        database: Database,
        feed: Feed,
        removal: Removal,
        counts: Counts,
        threads: FairThreads,
        limits: Limits,
        pauses: Pauses,
    ) -> None:
        self._database, self._feed, self._removal = database, feed, removal
        self._counts, self._threads = counts, threads
        self._limits, self._pauses = limits, pauses
        # Banks with an eviction that goes on, or waits for a thread, in this service.
        self._under_way: set[int] = set()
        self._stalled: set[int] = set()
        self.closed = False

    @property
    def stalled(self) -> int:
        """Return how many banks have an eviction that this service could not write."""
        return len(self._stalled)

    # A write

    def overflows(self, changing: Changing, chunk: Chunk) -> bool:
        """Tell whether a chunk makes an eviction necessary. Errors: TOO_LARGE."""
        capacity = changing.bank.capacity
        return capacity is not None and overflows(capacity, _used(changing, capacity), size_of(chunk, capacity.unit))

    def make_room(self, changing: Changing, chunk: Chunk) -> Made:
        """Evict what a chunk needs, in the transaction of its write; all chunks of the bank are rows. Errors:
        BANK_FULL, CrowdedError."""
        bank, made = changing.bank, Made()
        if (capacity := bank.capacity) is None:
            return made
        need = size_of(chunk, capacity.unit)
        lowered = _used(changing, capacity) > capacity.limit
        if lowered and gone_rows.steps_left(changing.connection, bank.bank_id) > 2:
            raise CrowdedError
        while _used(changing, capacity) + need > capacity.limit:
            step, fresh = self._next(changing, capacity, need)
            if fresh and lowered and gone_rows.steps_left(changing.connection, bank.bank_id) > 1:
                raise CrowdedError
            removed = self._evict(changing, step)
            if fresh and not removed.ids:
                raise RuntimeError(f"a plan for bank {bank.title} has chunks that do not exist")
            made.evicted += removed.ids
            made.reasons.update(removed.reasons)
        made.more = gone_rows.steps_left(changing.connection, bank.bank_id) > 0
        return made

    def _next(self, changing: Changing, capacity: Capacity, need: int, *, partly: bool = False) -> tuple[Victims, bool]:
        """Return the chunks that go next, and whether they begin a plan that was made for them. Errors: BANK_FULL."""
        connection, bank = changing.connection, changing.bank
        if step := gone_rows.next_step(connection, bank.bank_id):
            return step, False
        doomed = self._doomed(changing, capacity, need, partly)
        size = self._limits.step_rows
        gone_rows.save_plan(
            connection, bank.bank_id, [doomed.part(i, i + size) for i in range(size, len(doomed), size)]
        )
        return doomed.part(0, size), True

    def _doomed(self, changing: Changing, capacity: Capacity, need: int, partly: bool) -> Victims:
        """Choose the chunks that go: from the reserve of the bank, or from all rows, and then the reserve is made anew.
        Errors: BANK_FULL."""
        connection, bank, used = changing.connection, changing.bank, _used(changing, capacity)
        wanted = eviction.wanted(capacity, bank.policy, used, need)
        if wanted and (doomed := reserves.take(connection, bank, capacity, wanted, self._counts.unwritten())):
            return doomed
        candidates = self._candidates(connection, bank, capacity)
        doomed = plan(candidates, capacity, bank.policy, used, need, partly=partly)
        reserves.make(connection, bank, candidates, doomed)
        return doomed

    def _candidates(self, connection: Connection, bank: Bank, capacity: Capacity) -> Candidates:
        return chunk_rows.candidates(connection, bank.bank_id, capacity.unit, self._counts.unwritten())

    def _evict(self, changing: Changing, victims: Victims) -> Removed:
        now, bank_id = self._removal.now(), changing.bank.bank_id
        logged, before = self._limits.eviction_log, changing.usage.chunks_evicted
        removed = gone_rows.evict(changing.connection, bank_id, victims, now, logged, before)
        changing.removed(removed, "chunks_evicted")
        return removed

    def grown(self, changing: Changing, by: int) -> bool:
        """Learn that a chunk has grown by new metadata, and return whether the bank is too full now. Errors: BANK_FULL,
        where the policy evicts nothing."""
        capacity, policy = changing.bank.capacity, changing.bank.policy
        if capacity is None or capacity.unit != "bytes":
            return False
        used = changing.usage.bytes
        if by > 0 and used > capacity.limit and policy.kind == "reject":
            raise full(capacity, used - by, by, "its policy evicts nothing")
        return used > capacity.limit

    # In the background

    def go_on(self, bank: Bank) -> None:
        """Take the steps that are left of a bank's plan, and bring the bank down to its capacity, in a thread."""
        self._pauses.reach("eviction")
        if self.closed or self._pauses.leaves_out("evictions") or bank.bank_id in self._under_way:
            return
        self._under_way.add(bank.bank_id)
        with suppress(RuntimeError):  # closed meanwhile
            self._threads.submit(bank.tenant, lambda: self._step_on(bank))

    def _step_on(self, bank: Bank) -> None:
        more = False
        try:
            more = self.step(bank)
            self._stalled.discard(bank.bank_id)
        except Exception:
            self._stalled.add(bank.bank_id)
            _log.exception("an eviction of bank %s could not be written; it is tried again", bank.title)
        finally:
            self._under_way.discard(bank.bank_id)
        if more:
            self.go_on(bank)

    def bring_down(self, bank: Bank) -> None:
        """Take steps until a bank is within its capacity, or nothing more may go."""
        while not self.closed and self.step(bank):
            pass

    def step(self, bank: Bank) -> bool:
        """Take the next step of a bank's plan, in a transaction of its own; where there is none, plan what goes down to
        the capacity. Returns whether more is to go."""

        def operation(connection: Connection) -> tuple[Changing, Changed | None, Removed, bool] | None:
            changing = changes.begin(connection, bank)
            if changing is None or (capacity := changing.bank.capacity) is None:
                return None
            self._feed.begins(changing)
            step = gone_rows.next_step(connection, bank.bank_id)
            if not step and _used(changing, capacity) > capacity.limit and changing.bank.policy.kind != "reject":
                step, _ = self._next(changing, capacity, 0, partly=True)
            self._pauses.reach("eviction step")
            removed = self._evict(changing, step) if step else Removed([], 0, 0)
            self._pauses.reach("eviction planned")
            more = gone_rows.steps_left(connection, bank.bank_id) > 0
            more |= bool(removed.ids) and _used(changing, capacity) > capacity.limit
            return changing, changing.write(self._removal.now()), removed, more

        if (done := self._database.of(bank.tenant).change(operation)) is None:
            return False
        changing, changed, removed, more = done
        self._feed.committed(changing, changed)
        self._removal.evicted(bank, removed.ids, removed.reasons)
        return more

    def resume(self) -> None:
        """Go on with all plans that are left, such as those of a service that has ended. Call this every
        second."""
        with self._database.read() as connection:
            found = [bank_rows.get(connection, bank_id) for bank_id in gone_rows.planned(connection)]
        for bank in found:
            if bank is not None:
                self.go_on(bank)

    # Questions

    def explain(self, bank: Bank, need: int) -> tuple[list[Eviction], str]:
        """Return what a write of `need` would evict; see `Store.explain_eviction`."""
        with self._database.of(bank.tenant).read() as connection:
            doomed = gone_rows.plan_of(connection, bank.bank_id, explaining.MOST_EXPLAINED)

            def look() -> tuple[Candidates, Victims]:
                assert bank.capacity is not None
                return self._candidates(connection, bank, bank.capacity), doomed

            decision = explaining.decide(bank, need, bool(doomed), look)
            text = explaining.sentence(bank, need, decision)
            shown = decision.victims.part(0, explaining.MOST_EXPLAINED)
            rows = gone_rows.victims(connection, bank.bank_id, shown.ids.tolist())
        named = zip(shown.ids.tolist(), shown.reasons(), strict=True)
        return [gone_rows.eviction(rows[i], reason, None) for i, reason in named if i in rows], text


def _used(changing: Changing, capacity: Capacity) -> int:
    return int(getattr(changing.usage, capacity.unit))
