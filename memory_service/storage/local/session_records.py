"""The sessions of a data folder, in the same database as its banks. This file owns that each change of a session is one
transaction: what it goes by (lease, last turn, keys) and what it writes are of the same moment."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from sqlalchemy import Connection

from memory_service.domain import session_checks
from memory_service.domain import sessions as rules
from memory_service.domain.errors import ServiceError, session_exists, turn_not_found
from memory_service.domain.sessions import Session, Stretch, Turn, TurnPoint
from memory_service.domain.validate import LARGEST_INT64
from memory_service.observe.metrics import Metrics
from memory_service.storage.base import SessionTotals
from memory_service.storage.local import quotas
from memory_service.storage.local.bank_changes import BankChanges
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.records import session_deletion, session_rows, turn_rows, window_rows
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.records.session_rows import Branch
from memory_service.storage.local.records.turn_rows import Place, Prepared
from memory_service.storage.local.windows import LocalWindows

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LocalSessionView:
    """Implements `memory_service.storage.base.SessionView` over one read transaction. now: the moment of it."""

    connection: Connection
    now: int

    def session(self, tenant: str, session_id: str) -> Session:
        """Read a session of a tenant, with its stretches; see `SessionView.session`."""
        return session_rows.get(self.connection, tenant, session_id, self.now)

    def named(self, tenant: str, name: str) -> Session:
        """Read a session of a tenant by its name; see `SessionView.named`."""
        return session_rows.named(self.connection, tenant, name, self.now)

    def sessions(
        self,
        tenant: str,
        before: tuple[int, str] | None,
        metadata: Mapping[str, str],
        may_use: Callable[[str], bool] | None = None,
    ) -> Iterator[Session]:
        """Read the sessions of a tenant, newest change first; see `SessionView.sessions`."""
        banks = None if may_use is None else list(filter(may_use, session_rows.banks_of(self.connection, tenant)))
        for session in session_rows.newest(self.connection, tenant, before, metadata, self.now, banks):
            yield session_rows.with_line(self.connection, session)

    def turns(self, session: Session, after: int, *, token_ids: bool) -> Iterator[Turn]:
        """Read the turns of a session; see `SessionView.turns`."""
        return turn_rows.of_line(self.connection, session.stretches, after, token_ids=token_ids)

    def turn(self, tenant: str, key: str, *, token_ids: bool) -> Turn:
        """Read a turn by its key; see `SessionView.turn`."""
        found = turn_rows.get(self.connection, tenant, key, token_ids=token_ids)
        if found is None:
            raise turn_not_found("", key)
        return found


@dataclass(frozen=True, slots=True)
class LocalSessions:
    """Implements `memory_service.storage.base.SessionRecords` for a data folder.

    most: the sessions that a tenant may have. changes: those of banks, of which some go with their sessions, as do the
    windows.
    """

    records: Records
    space: DiskSpace
    changes: BankChanges
    windows: LocalWindows
    metrics: Metrics
    most: int

    @contextmanager
    def read(self) -> Iterator[LocalSessionView]:
        """Look at the sessions as they are now. Errors: Cancelled."""
        now = self.records.clock.now_us()
        with self.records.read() as connection:
            yield LocalSessionView(connection, now)

    # Sessions

    def create(self, new: Session) -> Session:
        """Make a session without turns; see `SessionRecords.create`."""
        self.space.for_records().give()
        branch = rules.new_branch()

        def make(connection: Connection, now: int) -> Session:
            quotas.check_session(connection, new.tenant, self.most)
            self._free_name(connection, new, now)
            made = replace(new, branch=branch, created=now, updated=now, stretches=(Stretch(branch, 0),))
            session_rows.add_branch(connection, Branch(branch, new.session_id, new.tenant))
            return _saved(connection, rules.lasting(made, now))

        return self._change(new.tenant, make)

    def update(self, tenant: str, session_id: str, changes: Mapping[str, object]) -> Session:
        """Replace fields of a session; see `SessionRecords.update`."""
        self.space.for_records().give()

        def change(connection: Connection, now: int) -> Session:
            session = session_rows.get(connection, tenant, session_id, now)
            changed = replace(session, **changes)  # type: ignore[arg-type]
            session_checks.session(changed)
            if changed.name != session.name:
                self._free_name(connection, changed, now)
            if changed.ttl != session.ttl:
                changed = rules.lasting(changed, now)
            return _saved(connection, changed)

        return self._change(tenant, change)

    def fork(self, tenant: str, new: Session, session_id: str, turn: int | None) -> Session:
        """Make a session with the turns of another; see `SessionRecords.fork`."""

        def make(connection: Connection, now: int) -> Session:
            session = session_rows.get(connection, tenant, session_id, now)
            at = session.head if turn is None else turn
            return self._forked(connection, new, session, _place(connection, session, at), now)

        self.space.for_records().give()
        return self._change(tenant, make)

    def fork_at(self, tenant: str, new: Session, key: str) -> Session:
        """Make a session with the turns of another up to the one that has a key; see `SessionRecords.fork_at`."""

        def make(connection: Connection, now: int) -> Session:
            found = turn_rows.get(connection, tenant, key, token_ids=False)
            keyed = turn_rows.keyed(connection, tenant, key)
            if found is None or keyed is None:
                raise turn_not_found("", key)
            session = session_rows.get(connection, tenant, found.session_id, now)
            end = found.start + found.token_count
            # The line by which one comes to the turn, which need not be one of the session's any more.
            line = session_rows.line(connection, keyed.branch, found.number, end)
            place = Place(keyed.branch, found.number, end)
            return self._forked(connection, new, replace(session, stretches=line), place, now)

        self.space.for_records().give()
        return self._change(tenant, make)

    def _forked(self, connection: Connection, new: Session, of: Session, place: Place, now: int) -> Session:
        quotas.check_session(connection, new.tenant, self.most)
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
        return _saved(connection, rules.lasting(_behind(connection, made, place), now))

    def rewind(self, tenant: str, session_id: str, epoch: int, turn: int) -> Session:
        """Let a session go on behind an earlier turn; see `SessionRecords.rewind`."""

        def change(connection: Connection, now: int) -> tuple[Session, str]:
            session = session_rows.get(connection, tenant, session_id, now)
            rules.check_lease(session, epoch, now)
            place = _place(connection, session, turn)
            if turn == session.head:
                return session, ""
            rewound = _behind(connection, session, place)
            if len(session.stretches) > 1 and session.stretches[-2].last == session.head:
                session_rows.delete_branch(connection, session.branch)  # nothing was ever appended to it
            saved = _saved(connection, rules.lasting(replace(rewound, updated=now), now))
            return saved, window_rows.delete(connection, session_id, after=turn)

        self.space.for_records().give()
        rewound, window = self._change(tenant, change)
        self.windows.remove(window)
        return rewound

    def _free_name(self, connection: Connection, session: Session, now: int) -> None:
        """See to it that the name of a session is free. Errors: SESSION_EXISTS."""
        taken = session_rows.taken(connection, session.tenant, session.name) if session.name else None
        if taken is None or taken[0] == session.session_id:
            return
        if taken[1] is None or taken[1] > now:
            raise session_exists(session.name)
        # It has expired, and goes soon; until then it does without its name.
        other = session_rows.get(connection, session.tenant, taken[0], taken[1] - 1)
        session_rows.save(connection, replace(other, name=""))

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
        made = [turn_rows.prepared(turn) for turn in turns]
        size = sum(each.size for each in made)

        def add(connection: Connection, now: int) -> tuple[list[Turn], Session]:
            session = rules.renewed(session_rows.get(connection, tenant, session_id, now), epoch, None, now)
            if (known := _replayed(connection, session, follows, made)) is not None:
                return known, _saved(connection, session)
            rules.check_follows(session, follows)
            quotas.check_session_bytes(connection, tenant, size)
            longer, placed = rules.appended(session, turns, now)
            for each, turn in zip(made, placed, strict=True):
                turn_rows.insert(connection, tenant, session.branch, each, turn)
            session_rows.add_bytes(connection, session.branch, size)
            new.append(len(made))
            return placed, _saved(connection, longer)

        new: list[int] = []
        with self.space.for_records(size):
            appended = self._change(tenant, add)
        self.metrics.turns_appended.inc(sum(new))
        return appended

    # Deletion

    def expire(self, tenant: str, session_id: str) -> None:
        """Delete a session, with its window and its turns, if it has expired by now, and its bank, if that was made for
        it and no other has it. Errors: CHECKSUM_MISMATCH."""

        def drop(connection: Connection, now: int) -> tuple[Session, str] | None:
            session = session_rows.get(connection, tenant, session_id, session_rows.NEVER)
            if session.expires is None or session.expires > now:
                return None  # a turn has come meanwhile
            window = window_rows.delete(connection, session_id)
            for left in session_deletion.delete(connection, session_id)[0]:
                while session_deletion.clear_some(connection, left, LARGEST_INT64).turns:
                    pass
            return session, window

        dropped = self._change(tenant, drop)
        if dropped is None:
            return
        session, window = dropped
        self.windows.remove(window)
        with self.records.read() as connection:
            used = session_rows.is_used(connection, tenant, session.bank)
        if session.has_own_bank and not used:
            with suppress(ServiceError):  # its worker has not made it, or it is gone
                self.changes.delete(tenant, session.bank)
        self.metrics.sessions_expired.inc()

    def totals(self) -> SessionTotals:
        """Add up what all sessions hold; see `SessionRecords.totals`."""
        now = self.records.clock.now_us()
        with self.records.read() as connection:
            return session_rows.totals(connection, now)

    def _changed(self, tenant: str, session_id: str, change: Callable[[Session, int], Session]) -> Session:
        """Replace a session by what a rule makes of it now."""

        def run(connection: Connection, now: int) -> Session:
            return _saved(connection, change(session_rows.get(connection, tenant, session_id, now), now))

        return self._change(tenant, run)

    def _change(self, tenant: str, operation: Callable[[Connection, int], T]) -> T:
        """Run an operation in a transaction, with the time of it. It is durable whatever the setting says of chunks:
        an epoch that was given must never be given again, and a turn that was answered must not be lost."""

        def run(connection: Connection) -> T:
            return operation(connection, self.records.clock.now_us())

        return self.records.writer.submit(run, tenant=tenant, durable=True).result()


def _saved(connection: Connection, session: Session) -> Session:
    """Write the row of a session, and return it with its last stretch up to its last turn."""
    session_rows.save(connection, session)
    *others, own = session.stretches
    return replace(session, stretches=(*others, replace(own, last=session.head)))


def _place(connection: Connection, session: Session, turn: int) -> Place:
    """Find where a turn of a session ends. Errors: TURN_NOT_FOUND."""
    if turn == 0:
        return Place("", 0, 0)
    stretch = next((each for each in session.stretches if turn <= each.last), None)
    place = None if stretch is None or turn < 0 else turn_rows.place(connection, stretch.branch, turn)
    if place is None:
        raise turn_not_found(session.session_id, turn)
    return place


def _behind(connection: Connection, session: Session, place: Place) -> Session:
    """Return a session that goes on behind a place of its line, on a branch of its own, which is inserted. Errors:
    INVALID_FIELD where it would have too many stretches."""
    branch = rules.new_branch()
    line = rules.line_behind(session.stretches, place.number, place.tokens, branch)
    new = Branch(branch, session.session_id, session.tenant, place.branch or None, place.number, place.tokens)
    session_rows.add_branch(connection, new)
    return replace(session, branch=branch, head=place.number, tokens=place.tokens, stretches=line)


def _replayed(connection: Connection, session: Session, follows: int, made: Sequence[Prepared]) -> list[Turn] | None:
    """Return the turns that were appended before with the keys of these; None where all keys are free. Errors:
    KEY_REUSED where any of them is another turn, or is elsewhere."""
    known = [turn_rows.keyed(connection, session.tenant, each.turn.key) if each.turn.key else None for each in made]
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
    return list(islice(turn_rows.of_line(connection, session.stretches, follows, token_ids=False), len(made)))
