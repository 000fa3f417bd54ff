"""The sessions of an engine. This file owns that each change of a session is one transaction: what it goes by (lease,
last turn, keys) and what it writes are of the same moment."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from sqlalchemy import Connection

from memory_service.domain import session_checks
from memory_service.domain import sessions as rules
from memory_service.domain.clock import Clock
from memory_service.domain.errors import ServiceError, session_exists, turn_not_found
from memory_service.domain.sessions import Session, Stretch, Turn, TurnPoint
from memory_service.observe.metrics import Metrics
from memory_service.storage.base import SessionTotals, Space
from memory_service.storage.quotas import Quotas
from memory_service.storage.sessions import deletion
from memory_service.storage.sessions.rows import Rows
from memory_service.storage.sessions.session_row import NEVER, Branch
from memory_service.storage.sessions.turn_row import Place, Prepared, prepared
from memory_service.storage.sessions.view import SessionsView, ended_at, turns_of
from memory_service.storage.sessions.windows import SessionWindows
from memory_service.storage.transactions import BankDeletion, Transactions

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sessions:
    """Implements `memory_service.storage.base.SessionRecords` over rows.

    most: the sessions that a tenant may have. banks: some go with their sessions, as do the windows.
    """

    records: Transactions
    clock: Clock
    rows: Rows
    quotas: Quotas
    space: Space
    banks: BankDeletion
    windows: SessionWindows
    metrics: Metrics
    most: int

    @contextmanager
    def read(self, tenant: str = "") -> Iterator[SessionsView]:
        """Look at the sessions of a tenant as they are now, "" for those of all. Errors: Cancelled."""
        now = self.clock.now_us()
        with self.records.of(tenant).read() as connection:
            yield SessionsView(self.rows, connection, now)

    # Sessions

    def create(self, new: Session) -> Session:
        """Make a session without turns; see `SessionRecords.create`."""
        self.space.for_records().give()
        branch = rules.new_branch()

        def make(connection: Connection, now: int) -> Session:
            self.quotas.check_session(connection, new.tenant, self.most)
            self._free_name(connection, new, now)
            made = replace(new, branch=branch, created=now, updated=now, stretches=(Stretch(branch, 0),))
            self.rows.sessions.add_branch(connection, Branch(branch, new.session_id, new.tenant))
            return self._saved(connection, rules.lasting(made, now))

        return self._change(new.tenant, make)

    def update(self, tenant: str, session_id: str, changes: Mapping[str, object]) -> Session:
        """Replace fields of a session; see `SessionRecords.update`."""
        self.space.for_records().give()

        def change(connection: Connection, now: int) -> Session:
            session = self.rows.sessions.get(connection, tenant, session_id, now)
            changed = replace(session, **changes)  # type: ignore[arg-type]
            session_checks.session(changed)
            if changed.name != session.name:
                self._free_name(connection, changed, now)
            if changed.ttl != session.ttl:
                changed = rules.lasting(changed, now)
            return self._saved(connection, changed)

        return self._change(tenant, change)

    def fork(self, tenant: str, new: Session, session_id: str, turn: int | None) -> Session:
        """Make a session with the turns of another; see `SessionRecords.fork`."""

        def make(connection: Connection, now: int) -> Session:
            session = self.rows.sessions.get(connection, tenant, session_id, now)
            at = session.head if turn is None else turn
            return self._forked(connection, new, session, self._place(connection, session, at), now)

        self.space.for_records().give()
        return self._change(tenant, make)

    def fork_at(self, tenant: str, new: Session, key: str) -> Session:
        """Make a session with the turns of another up to the one that has a key; see `SessionRecords.fork_at`."""

        def make(connection: Connection, now: int) -> Session:
            session, place = ended_at(self.rows, connection, tenant, key, now)
            return self._forked(connection, new, session, place, now)

        self.space.for_records().give()
        return self._change(tenant, make)

    def _forked(self, connection: Connection, new: Session, of: Session, place: Place, now: int) -> Session:
        self.quotas.check_session(connection, new.tenant, self.most)
        self._free_name(connection, new, now)
        made = replace(
            of,
            session_id=new.session_id,
            name=new.name,
            metadata=new.metadata,
            forked_from=TurnPoint(of.session_id, place.number),
            created=now,
            updated=now,
            epoch=0,
            lease=None,
        )
        return self._saved(connection, rules.lasting(self._behind(connection, made, place), now))

    def rewind(self, tenant: str, session_id: str, epoch: int, turn: int) -> Session:
        """Let a session go on behind an earlier turn; see `SessionRecords.rewind`."""

        def change(connection: Connection, now: int) -> tuple[Session, str]:
            session = self.rows.sessions.get(connection, tenant, session_id, now)
            rules.check_lease(session, epoch, now)
            place = self._place(connection, session, turn)
            if turn == session.head:
                return session, ""
            rewound = self._behind(connection, session, place)
            if len(session.stretches) > 1 and session.stretches[-2].last == session.head:
                self.rows.sessions.delete_branch(connection, session.branch)  # nothing was ever appended to it
            saved = self._saved(connection, rules.lasting(replace(rewound, updated=now), now))
            return saved, self.rows.windows.delete(connection, session_id, after=turn)

        self.space.for_records().give()
        rewound, window = self._change(tenant, change)
        self.windows.remove(window)
        return rewound

    def _free_name(self, connection: Connection, session: Session, now: int) -> None:
        """See to it that the name of a session is free. Errors: SESSION_EXISTS."""
        taken = self.rows.sessions.taken(connection, session.tenant, session.name) if session.name else None
        if taken is None or taken[0] == session.session_id:
            return
        if taken[1] is None or taken[1] > now:
            raise session_exists(session.name)
        # It has expired, and goes soon; until then it does without its name.
        other = self.rows.sessions.get(connection, session.tenant, taken[0], taken[1] - 1)
        self.rows.sessions.save(connection, replace(other, name=""))

    # Leases

    def acquire(self, tenant: str, session_id: str, holder: str, ttl: int) -> Session:
        """Give a session to a holder; see `SessionRecords.acquire`."""
        return self._changed(tenant, session_id, lambda session, now: rules.acquired(session, holder, ttl, now))

    def renew(self, tenant: str, session_id: str, epoch: int, ttl: int | None) -> Session:
        """Let a lease begin anew; see `SessionRecords.renew`."""
        return self._changed(tenant, session_id, lambda session, now: rules.renewed(session, epoch, ttl, now))

    def release(self, tenant: str, session_id: str, epoch: int) -> None:
        """End the lease of a session; see `SessionRecords.release`."""
        self._changed(tenant, session_id, lambda session, _: rules.released(session, epoch))

    # Turns

    def append(
        self, tenant: str, session_id: str, epoch: int, follows: int, turns: Sequence[Turn]
    ) -> tuple[list[Turn], Session]:
        """Add turns behind the last one; see `SessionRecords.append`."""
        made = [prepared(turn) for turn in turns]
        size = sum(each.size for each in made)

        def add(connection: Connection, now: int) -> tuple[list[Turn], Session, int]:
            session = rules.renewed(self.rows.sessions.get(connection, tenant, session_id, now), epoch, None, now)
            if (known := self._replayed(connection, session, follows, made)) is not None:
                return known, self._saved(connection, session), 0
            rules.check_follows(session, follows)
            self.quotas.check_session_bytes(connection, tenant, size)
            longer, placed = rules.appended(session, turns, now)
            for each, turn in zip(made, placed, strict=True):
                self.rows.turns.insert(connection, tenant, session.branch, each, turn)
            self.rows.sessions.add_bytes(connection, session.branch, size)
            return placed, self._saved(connection, longer), len(made)

        with self.space.for_records(size):
            appended, session, new = self._change(tenant, add)
        self.metrics.turns_appended.inc(new)
        return appended, session

    # Deletion

    def expire(self, tenant: str, session_id: str, most: int) -> bool:
        """Delete at most `most` turns of a session, if it has expired by now, and return whether more of it is left.
        When no turn is left, its bank goes, if that was made for it and no other has it, and last the session with its
        window, by which a stop in between is found. Errors: CHECKSUM_MISMATCH."""

        def shorten(connection: Connection, now: int) -> tuple[Session, bool, bool] | None:
            if not self.rows.sessions.existing(connection, [session_id]):
                return None  # its tenant, or another service, has deleted it meanwhile
            session = self.rows.sessions.get(connection, tenant, session_id, NEVER)
            if session.expires is None or session.expires > now:
                return None  # a turn has come meanwhile
            more = deletion.shorten(self.rows, connection, session_id, most)
            return session, more, self._has_bank_alone(connection, session)

        def drop(connection: Connection, _: int) -> str | None:
            # A fork that has gone since has left turns, or the bank, to this session.
            more = deletion.shorten(self.rows, connection, session_id, most)
            if more or self._has_bank_alone(connection, session) != alone:
                return None
            window = self.rows.windows.delete(connection, session_id)
            for left in deletion.delete(self.rows, connection, session_id)[0]:
                deletion.clear_some(self.rows, connection, left, most)
            return window

        if (found := self._change(tenant, shorten)) is None:
            return False
        session, more, alone = found
        if more:
            return True
        if alone:
            with suppress(ServiceError):  # its worker has not made it, or it is gone
                self.banks.delete(tenant, session.bank)
        if (window := self._change(tenant, drop)) is None:
            return True
        self.windows.remove(window)
        self.metrics.sessions_expired.inc()
        return False

    def _has_bank_alone(self, connection: Connection, session: Session) -> bool:
        """Tell whether the bank of a session was made for it, and no other session has it."""
        others = self.rows.sessions.is_used
        return session.has_own_bank and not others(connection, session.tenant, session.bank, but=session.session_id)

    def totals(self) -> SessionTotals:
        """Add up what all sessions hold; see `SessionRecords.totals`."""
        now = self.clock.now_us()
        with self.records.read() as connection:
            return self.rows.sessions.totals(connection, now)

    def _changed(self, tenant: str, session_id: str, change: Callable[[Session, int], Session]) -> Session:
        """Replace a session by what a rule makes of it now."""

        def run(connection: Connection, now: int) -> Session:
            return self._saved(connection, change(self.rows.sessions.get(connection, tenant, session_id, now), now))

        return self._change(tenant, run)

    def _change(self, tenant: str, operation: Callable[[Connection, int], T]) -> T:
        """Run an operation in a transaction, with the time of it. It is durable whatever the setting says of chunks:
        an epoch that was given must never be given again, and a turn that was answered must not be lost."""

        def run(connection: Connection) -> T:
            return operation(connection, self.clock.now_us())

        return self.records.of(tenant).change(run, tenant=tenant, durable=True)

    def _saved(self, connection: Connection, session: Session) -> Session:
        """Write the row of a session, and return it with its last stretch up to its last turn."""
        self.rows.sessions.save(connection, session)
        *others, own = session.stretches
        return replace(session, stretches=(*others, replace(own, last=session.head)))

    def _place(self, connection: Connection, session: Session, turn: int) -> Place:
        """Find where a turn of a session ends. Errors: TURN_NOT_FOUND."""
        if turn == 0:
            return Place("", 0, 0)
        stretch = next((each for each in session.stretches if turn <= each.last), None)
        place = None if stretch is None or turn < 0 else self.rows.turns.place(connection, stretch.branch, turn)
        if place is None:
            raise turn_not_found(session.session_id, turn)
        return place

    def _behind(self, connection: Connection, session: Session, place: Place) -> Session:
        """Return a session that goes on behind a place of its line, on a branch of its own, which is inserted. Errors:
        INVALID_FIELD where it would have too many stretches."""
        branch = rules.new_branch()
        line = rules.line_behind(session.stretches, place.number, place.tokens, branch)
        new = Branch(branch, session.session_id, session.tenant, place.branch or None, place.number, place.tokens)
        self.rows.sessions.add_branch(connection, new)
        return replace(session, branch=branch, head=place.number, tokens=place.tokens, stretches=line)

    def _replayed(
        self, connection: Connection, session: Session, follows: int, made: Sequence[Prepared]
    ) -> list[Turn] | None:
        """Return the turns that were appended before with the keys of these; None where all keys are free. Errors:
        KEY_REUSED where any of them is another turn, or is elsewhere."""
        keyed = self.rows.turns.keyed
        known = [keyed(connection, session.tenant, each.turn.key) if each.turn.key else None for each in made]
        if not any(known):
            return None
        last = {stretch.branch: stretch.last for stretch in session.stretches}
        for number, (found, each) in enumerate(zip(known, made, strict=True), follows + 1):
            if found is None:
                continue
            here = found.number == number <= last.get(found.branch, 0)
            if not here or found.digest != each.digest:
                text = f"the key {each.turn.key!r} is that of another turn; draw a new key for every new turn"
                raise ServiceError("KEY_REUSED", text, key=each.turn.key)
        if not all(known):
            raise ServiceError("KEY_REUSED", "some of the turns were appended before, and some were not")
        # Those alone: a session may have gone on for long since.
        return list(islice(turns_of(self.rows, connection, session.stretches, follows, token_ids=False), len(made)))
