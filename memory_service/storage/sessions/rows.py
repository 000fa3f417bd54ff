"""What the rules of sessions ask of an engine's statements. An engine has a module of functions for each protocol here;
a function that changes rows runs in a transaction that changes, one that only reads also in one that reads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection

from memory_service.domain.sessions import Session, Stretch, Turn, Window
from memory_service.storage.base import SessionTotals
from memory_service.storage.sessions.session_row import Branch
from memory_service.storage.sessions.turn_row import Gone, Keyed, Place, Prepared


class SessionRows(Protocol):
    """The rows of sessions and of their branches."""

    def save(self, connection: Connection, session: Session) -> None:
        """Insert or replace the row of a session."""

    def delete(self, connection: Connection, session_id: str) -> None:
        """Delete the row of a session; the caller has seen to its branches."""

    def delete_all_of(self, connection: Connection, tenant: str) -> None:
        """Delete all sessions of a tenant, with all their turns and windows."""

    def get(self, connection: Connection, tenant: str, session_id: str, now: int) -> Session:
        """Read a session of a tenant with its stretches. Errors: SESSION_NOT_FOUND, also where it has expired;
        CHECKSUM_MISMATCH."""

    def named(self, connection: Connection, tenant: str, name: str, now: int) -> Session:
        """Read a session of a tenant by its name, with its stretches. Errors: as those of `get`."""

    def taken(self, connection: Connection, tenant: str, name: str) -> tuple[str, int | None] | None:
        """Return id and time of expiry of the session that has a name, also where it has expired; None for a name that
        is free."""

    def banks_of(self, connection: Connection, tenant: str) -> Iterator[str]:
        """Return the names of the banks in which sessions of a tenant have their chunks."""

    def newest(
        self,
        connection: Connection,
        tenant: str,
        before: tuple[int, str] | None,
        metadata: Mapping[str, str],
        now: int,
        banks: Sequence[str] | None = None,
    ) -> Iterator[Session]:
        """Read the sessions of a tenant that have these metadata, newest change first, without their stretches and
        without damaged ones. before: time of change and id of the last one of the page before. banks: those in which
        their chunks are; None for any."""

    def existing(self, connection: Connection, session_ids: Iterable[str]) -> set[str]:
        """Return those of some session ids of which there is a session, of any tenant."""

    def expired(self, connection: Connection, now: int, most: int) -> list[tuple[str, str]]:
        """Return tenant and id of sessions that have expired, at most `most`."""

    def count(self, connection: Connection, tenant: str) -> int:
        """Count the sessions of a tenant, expired ones that are not removed yet too."""

    def totals(self, connection: Connection, now: int) -> SessionTotals:
        """Count all sessions, those that a worker has, and the bytes of all turns."""

    def is_used(self, connection: Connection, tenant: str, bank: str, *, but: str = "") -> bool:
        """Tell whether any session of a tenant has its chunks in a bank. but: the id of a session that does not
        count."""

    def branch(self, connection: Connection, name: str) -> Branch | None:
        """Read the row of a branch; None where it is not there. Errors: CHECKSUM_MISMATCH."""

    def add_branch(self, connection: Connection, branch: Branch) -> None:
        """Insert the row of a branch."""

    def give_branch(self, connection: Connection, branch: Branch, session_id: str) -> None:
        """Let a branch be that of another session, because its own is gone."""

    def delete_branch(self, connection: Connection, name: str) -> None:
        """Delete the row of a branch; the caller has seen to its turns."""

    def add_bytes(self, connection: Connection, name: str, more: int) -> None:
        """Count bytes of turns in a branch; fewer where `more` is negative."""

    def branches_of(self, connection: Connection, session_id: str) -> dict[str, Branch]:
        """Return the branches of a session, also those from which it was rewound, by name. Errors:
        CHECKSUM_MISMATCH."""

    def children_of(self, connection: Connection, session_id: str) -> list[Branch]:
        """Return the branches, of whichever session, that go on behind one of a session. Errors: CHECKSUM_MISMATCH."""

    def line(self, connection: Connection, name: str, last: int, end: int | None = None) -> tuple[Stretch, ...]:
        """Return the stretches, first to last, by which one comes to the turn `last` of a branch. Errors:
        CHECKSUM_MISMATCH; SESSION_NOT_FOUND where a branch is not there any more."""

    def with_line(self, connection: Connection, session: Session) -> Session:
        """Return a session with its stretches. Errors: those of `line`."""


class TurnRows(Protocol):
    """The rows of turns."""

    def insert(self, connection: Connection, tenant: str, branch: str, made: Prepared, placed: Turn) -> None:
        """Insert a turn, whose number and key the caller knows to be free. placed: with its place, time and key."""

    def keyed(self, connection: Connection, tenant: str, key: str) -> Keyed | None:
        """Find the turn that has a key; None where it is free."""

    def place(self, connection: Connection, branch: str, number: int) -> Place | None:
        """Find where a turn of a branch ends; None where there is no such turn. Errors: CHECKSUM_MISMATCH."""

    def get(self, connection: Connection, tenant: str, key: str, *, token_ids: bool) -> Turn | None:
        """Read the turn that has a key; None where there is none. Errors: CHECKSUM_MISMATCH."""

    def of_stretch(
        self, connection: Connection, stretch: Stretch, after: int, session_id: str, *, token_ids: bool
    ) -> Iterator[Turn]:
        """Read the turns of a stretch behind the number `after`. session_id: that of its branch. Errors:
        CHECKSUM_MISMATCH."""

    def to_blank(self, connection: Connection, branch: str, first: int, last: int, most: int) -> list[dict[str, Any]]:
        """Read the columns `turn_row.TO_BLANK` of at most `most` turns of a branch that are not forgotten."""

    def blank(self, connection: Connection, row: Mapping[str, Any], key: str) -> None:
        """Leave of a turn its number, start and count of tokens, under another key. row: as `to_blank` has read it."""

    def clear_some(self, connection: Connection, branch: str, after: int, most: int) -> Gone:
        """Delete at most `most` turns of a branch behind the number `after`."""


class WindowRows(Protocol):
    """The rows of local windows, each of which names the file with its bytes."""

    def get(self, connection: Connection, session_id: str) -> tuple[Window, str] | None:
        """Read the window of a session, and the name of its file; None where there is none."""

    def save(self, connection: Connection, tenant: str, window: Window, file: str) -> None:
        """Insert or replace the window of a session."""

    def delete(self, connection: Connection, session_id: str, after: int = -1) -> str:
        """Delete the window of a session, if it is of a turn behind the number `after`; return the name of its file, ""
        for none."""

    def drop(self, connection: Connection, file: str) -> None:
        """Delete the window that has a file, if it is still that of its session."""

    def files(self, connection: Connection) -> set[str]:
        """Return the names of the files of all windows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The statements of an engine for its sessions."""

    sessions: SessionRows
    turns: TurnRows
    windows: WindowRows
