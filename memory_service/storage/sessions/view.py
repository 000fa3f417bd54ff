"""What a store holds of sessions at one moment."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from memory_service.domain.errors import damaged_turn, turn_not_found
from memory_service.domain.sessions import Session, Stretch, Turn
from memory_service.storage.sessions.rows import Rows
from memory_service.storage.sessions.turn_row import Place


@dataclass(frozen=True, slots=True)
class SessionsView:
    """Implements `memory_service.storage.base.SessionView` over one read transaction. now: the moment of it."""

    rows: Rows
    connection: Connection
    now: int

    def session(self, tenant: str, session_id: str) -> Session:
        """Read a session of a tenant, with its stretches; see `SessionView.session`."""
        return self.rows.sessions.get(self.connection, tenant, session_id, self.now)

    def named(self, tenant: str, name: str) -> Session:
        """Read a session of a tenant by its name; see `SessionView.named`."""
        return self.rows.sessions.named(self.connection, tenant, name, self.now)

    def sessions(
        self,
        tenant: str,
        before: tuple[int, str] | None,
        metadata: Mapping[str, str],
        may_use: Callable[[str], bool] | None = None,
    ) -> Iterator[Session]:
        """Read the sessions of a tenant, newest change first; see `SessionView.sessions`."""
        rows, connection = self.rows.sessions, self.connection
        banks = None if may_use is None else list(filter(may_use, rows.banks_of(connection, tenant)))
        for session in rows.newest(connection, tenant, before, metadata, self.now, banks):
            yield rows.with_line(connection, session)

    def ended_at(self, tenant: str, key: str) -> Session:
        """Read the session of a turn as it was behind it; see `SessionView.ended_at`."""
        return ended_at(self.rows, self.connection, tenant, key, self.now)[0]

    def turns(self, session: Session, after: int, *, token_ids: bool) -> Iterator[Turn]:
        """Read the turns of a session; see `SessionView.turns`."""
        return turns_of(self.rows, self.connection, session.stretches, after, token_ids=token_ids)

    def turn(self, tenant: str, key: str, *, token_ids: bool) -> Turn:
        """Read a turn by its key; see `SessionView.turn`."""
        found = self.rows.turns.get(self.connection, tenant, key, token_ids=token_ids)
        if found is None:
            raise turn_not_found("", key)
        return found


def ended_at(rows: Rows, connection: Connection, tenant: str, key: str, now: int) -> tuple[Session, Place]:
    """Read the session of the turn of a key, with the line by which one comes to the turn, and the place of the turn.
    Errors: TURN_NOT_FOUND, SESSION_NOT_FOUND."""
    found = rows.turns.get(connection, tenant, key, token_ids=False)
    keyed = rows.turns.keyed(connection, tenant, key)
    if found is None or keyed is None:
        raise turn_not_found("", key)
    session = rows.sessions.get(connection, tenant, found.session_id, now)
    place = Place(keyed.branch, found.number, found.start + found.token_count)
    line = rows.sessions.line(connection, place.branch, place.number, place.tokens)
    return replace(session, stretches=line), place


def turns_of(
    rows: Rows, connection: Connection, line: Sequence[Stretch], after: int, *, token_ids: bool
) -> Iterator[Turn]:
    """Read the turns of some stretches, first to last, from the first one behind the number `after`. Errors:
    CHECKSUM_MISMATCH for a turn that is damaged or missing."""
    for stretch in line:
        if stretch.last <= after:
            continue
        owner = rows.sessions.branch(connection, stretch.branch)
        session_id = "" if owner is None else owner.session_id
        for turn in rows.turns.of_stretch(connection, stretch, after, session_id, token_ids=token_ids):
            if turn.number != after + 1:
                raise damaged_turn(session_id, after + 1)
            yield turn
            after = turn.number
        if after != stretch.last:
            raise damaged_turn(session_id, after + 1)
