"""What can be done with sessions, over any engine. This file owns who may: a session of another tenant, or one whose
bank the caller may not name, is for it as one that is not there.

Methods block and are called from storage threads.
"""

from collections.abc import Callable, Mapping, Sequence

from memory_service.domain import session_checks as checks
from memory_service.domain import sessions as rules
from memory_service.domain.access import EVERY_BANK, Caller
from memory_service.domain.errors import ServiceError, session_not_found, turn_not_found
from memory_service.domain.sessions import Lease, Session, Turn, Window
from memory_service.operations.paging import page
from memory_service.storage.base import Engine, NewWindow, SessionView, Source

# What a session, or a turn, takes in a message beside its words.
_ROUGHLY = 400
# What a figure of usage, and an item of a turn, take in a message beside their words.
_FIGURE, _ITEM = 16, 16


class Sessions:
    """The sessions of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._store, self._records, self._windows = engine.store, engine.sessions, engine.windows

    # Sessions

    def create(self, caller: Caller, new: Session) -> Session:
        """Make a session of the caller's tenant, without turns. new: of what the caller says; without a bank it gets
        the name of one of its own. The banks that it reads are names that need not be there, since each may go, and an
        imported session may come before its banks. Errors: INVALID_FIELD, PERMISSION_DENIED, BANK_NOT_FOUND,
        SESSION_EXISTS, QUOTA_EXCEEDED, DISK_FULL."""
        checks.session(new)
        if new.bank != rules.own_bank(new.session_id):
            self._store.bank(caller.tenant, new.bank)
        caller.check_may_use([new.bank, *new.reads])
        return self._records.create(new)

    def get(self, caller: Caller, session_id: str) -> Session:
        """Return a session by its id. Errors: SESSION_NOT_FOUND."""
        return self._seen(caller, session_id, lambda view: view.session(caller.tenant, session_id))

    def is_gone(self, caller: Caller, session_id: str) -> bool:
        """Tell whether the tenant has no such session, not even one that the caller may not see."""
        return self._finds_nothing(caller.tenant, lambda view: view.session(caller.tenant, session_id))

    def is_turn_gone(self, caller: Caller, key: str) -> bool:
        """Tell whether the tenant has no turn of a key, not even one of a session that the caller may not see."""
        tenant = caller.tenant
        return self._finds_nothing(
            tenant, lambda view: view.session(tenant, view.turn(tenant, key, token_ids=False).session_id)
        )

    def named(self, caller: Caller, name: str) -> Session:
        """Return a session by its name. Errors: SESSION_NOT_FOUND."""
        return self._seen(caller, name, lambda view: view.named(caller.tenant, name))

    def newest(
        self, caller: Caller, before: tuple[int, str] | None, metadata: Mapping[str, str], limit: int
    ) -> tuple[list[Session], bool]:
        """Return a page of the sessions that a caller may see and that have all these metadata, newest change first,
        and whether there are more. before: time of change and id of the last one of the page before. Errors:
        INVALID_FIELD."""
        checks.pairs("metadata", metadata)
        with self._records.read(caller.tenant) as view:
            may_use = None if caller.banks == EVERY_BANK else caller.may_use
            return page(view.sessions(caller.tenant, before, metadata, may_use), limit, _message_bytes)

    def update(self, caller: Caller, session_id: str, changes: Mapping[str, object]) -> Session:
        """Replace some of name, metadata, settings, reads and ttl. Errors: SESSION_NOT_FOUND, SESSION_EXISTS,
        INVALID_FIELD, DISK_FULL."""
        self.get(caller, session_id)
        return self._records.update(caller.tenant, session_id, changes)

    def fork(self, caller: Caller, new: Session, session_id: str, turn: int | None) -> Session:
        """Make a session with the turns of another up to one of them; None: its last. new: its id, name and metadata.
        Errors: SESSION_NOT_FOUND, TURN_NOT_FOUND, SESSION_EXISTS, INVALID_FIELD, QUOTA_EXCEEDED, DISK_FULL."""
        checks.session(new)
        self.get(caller, session_id)
        return self._records.fork(caller.tenant, new, session_id, turn)

    def fork_at(self, caller: Caller, new: Session, key: str) -> Session:
        """Make a session with the turns up to the one that has a key. Errors: as those of `fork`."""
        checks.session(new)
        self.turn(caller, key, token_ids=False)
        return self._records.fork_at(caller.tenant, new, key)

    def rewind(self, caller: Caller, session_id: str, epoch: int, turn: int) -> Session:
        """Let a session go on behind an earlier turn; 0: none is left. Errors: SESSION_NOT_FOUND, LEASE_LOST,
        TURN_NOT_FOUND, INVALID_FIELD, DISK_FULL."""
        self.get(caller, session_id)
        return self._records.rewind(caller.tenant, session_id, epoch, turn)

    # Leases

    def lease_of(self, session: Session) -> Lease | None:
        """Return the lease that a session is under now; None where there is none."""
        return rules.current_lease(session, self._store.clock.now_us())

    def acquire(self, caller: Caller, session_id: str, holder: str, ttl: int) -> Session:
        """Give a session to a holder for `ttl` microseconds. Errors: INVALID_FIELD, SESSION_NOT_FOUND, LEASE_HELD."""
        checks.holder(holder)
        checks.lease_ttl(ttl)
        self.get(caller, session_id)
        return self._records.acquire(caller.tenant, session_id, holder, ttl)

    def renew(self, caller: Caller, session_id: str, epoch: int, ttl: int | None) -> Session:
        """Let a lease begin anew; ttl: None for the one that it has. Errors: INVALID_FIELD, SESSION_NOT_FOUND,
        LEASE_LOST."""
        if ttl is not None:
            checks.lease_ttl(ttl)
        self.get(caller, session_id)
        return self._records.renew(caller.tenant, session_id, epoch, ttl)

    def release(self, caller: Caller, session_id: str, epoch: int) -> None:
        """End the lease of a session. Errors: SESSION_NOT_FOUND, LEASE_LOST."""
        self.get(caller, session_id)
        self._records.release(caller.tenant, session_id, epoch)

    # Turns

    def append(
        self, caller: Caller, session_id: str, epoch: int, follows: int, turns: Sequence[Turn]
    ) -> tuple[list[Turn], Session]:
        """Add turns behind the last one, all or none, durably. Errors: INVALID_FIELD, SESSION_NOT_FOUND, LEASE_LOST,
        TURN_CONFLICT, KEY_REUSED, QUOTA_EXCEEDED, DISK_FULL."""
        checks.turns(turns)
        self.get(caller, session_id)
        return self._records.append(caller.tenant, session_id, epoch, follows, turns)

    def turns(
        self, caller: Caller, session_id: str, after: int, limit: int, *, token_ids: bool
    ) -> tuple[list[Turn], bool]:
        """Return a page of the turns of a session from the first one behind `after`, and whether there are more.
        Errors: SESSION_NOT_FOUND, CHECKSUM_MISMATCH."""

        with self._records.read(caller.tenant) as view:
            session = _allowed(caller, view.session(caller.tenant, session_id), session_id)
            return page(view.turns(session, after, token_ids=token_ids), limit, _turn_bytes)

    def turns_to(self, caller: Caller, key: str, after: int, limit: int, *, token_ids: bool) -> tuple[list[Turn], bool]:
        """Return a page of the turns up to the one that has a key, from the first one behind `after`, and whether there
        are more. The session of that turn may have been rewound since. Errors: TURN_NOT_FOUND, CHECKSUM_MISMATCH."""
        with self._records.read(caller.tenant) as view:
            _turn(view, caller, key, token_ids=False)
            session = view.ended_at(caller.tenant, key)
            return page(view.turns(session, after, token_ids=token_ids), limit, _turn_bytes)

    def turn(self, caller: Caller, key: str, *, token_ids: bool) -> Turn:
        """Return a turn by its key, also one from which its session was rewound. Errors: TURN_NOT_FOUND,
        CHECKSUM_MISMATCH."""
        with self._records.read(caller.tenant) as view:
            return _turn(view, caller, key, token_ids=token_ids)

    # Windows

    def new_window(self, caller: Caller, window: Window, epoch: int) -> NewWindow:
        """Begin to keep the window of a session. Errors: INVALID_FIELD, SESSION_NOT_FOUND, LEASE_LOST, TURN_CONFLICT,
        DISK_FULL."""
        checks.window(window)
        self.get(caller, window.session_id)
        return self._windows.begin(caller.tenant, window, epoch)

    def window(self, caller: Caller, session_id: str) -> tuple[Window, Source] | None:
        """Open the window of a session; None where there is none. Errors: SESSION_NOT_FOUND."""
        self.get(caller, session_id)
        return self._windows.open(caller.tenant, session_id)

    def _finds_nothing(self, tenant: str, look: Callable[[SessionView], object]) -> bool:
        try:
            with self._records.read(tenant) as view:
                look(view)
        except ServiceError as error:
            return error.reason.endswith("_NOT_FOUND")
        return False

    def _seen(self, caller: Caller, said: str, read: Callable[[SessionView], Session]) -> Session:
        with self._records.read(caller.tenant) as view:
            return _allowed(caller, read(view), said)


def _allowed(caller: Caller, session: Session, said: str) -> Session:
    """Return a session that the caller may see. said: how the caller calls it. Errors: SESSION_NOT_FOUND."""
    if not caller.may_use(session.bank):
        raise session_not_found(said)
    return session


def _turn(view: SessionView, caller: Caller, key: str, *, token_ids: bool) -> Turn:
    """Return the turn of a key, of a session whose bank the caller may use. Errors: TURN_NOT_FOUND."""
    found = view.turn(caller.tenant, key, token_ids=token_ids)
    try:
        session = view.session(caller.tenant, found.session_id)
    except ServiceError as error:
        if error.reason != "SESSION_NOT_FOUND":
            raise
        raise turn_not_found("", key) from None
    if not caller.may_use(session.bank):
        raise turn_not_found("", key)
    return found


def _message_bytes(session: Session) -> int:
    words = [*session.reads, session.name, session.bank, session.reader_digest]
    size = sum(len(word.encode()) for word in words) + 32 * len(session.stretches)
    return size + checks.pairs_bytes(session.settings) + checks.pairs_bytes(session.metadata) + _ROUGHLY


def _turn_bytes(turn: Turn) -> int:
    named = checks.pairs_bytes(turn.metadata) + sum(len(name.encode()) + _FIGURE for name in turn.usage)
    return checks.items_bytes(turn.items) + _ITEM * len(turn.items) + len(turn.token_ids) + named + _ROUGHLY
