"""The local windows of sessions: a row in the database, and bytes beside it. This file owns that a window is only
answered where every byte is as it was kept, and that bytes which no row names are removed."""

import logging
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from sqlalchemy import Connection

from memory_service.domain import sessions as rules
from memory_service.domain.clock import Clock
from memory_service.domain.errors import ServiceError, turn_conflict
from memory_service.domain.payload import Buffer
from memory_service.domain.sessions import Window
from memory_service.storage.base import Reservation, Source, Space
from memory_service.storage.quotas import Quotas
from memory_service.storage.sessions.rows import Rows
from memory_service.storage.transactions import Transactions

_log = logging.getLogger(__name__)


class NewBytes(Protocol):
    """The bytes of a window, which come in. Until they are `settled`, they are not removed."""

    size: int

    @property
    def name(self) -> str:
        """Return the name by which the bytes are found again."""

    @property
    def checksum(self) -> int:
        """Return the xxh3-64 of what has come so far."""

    def add(self, data: Buffer) -> None:
        """Append bytes to the window. Errors: OSError."""

    def store(self) -> None:
        """Let all that has come be found by its name. Errors: OSError."""

    def settled(self, *, kept: bool) -> None:
        """Let go of the bytes, which are removed unless they are `kept`. A second call does nothing."""


class OldBytes(Source, Protocol):
    """The bytes of a window that was kept."""

    def has(self, size: int, checksum: int) -> bool:
        """Tell whether there are so many bytes, of this xxh3-64. Errors: OSError."""


class WindowFiles(Protocol):
    """The place of the bytes of windows. Threads share it."""

    def begin(self, session_id: str) -> NewBytes:
        """Begin a new window of a session. Errors: OSError."""

    def open(self, name: str) -> OldBytes:
        """Open the bytes of this name. Errors: FileNotFoundError, OSError."""

    def remove(self, name: str) -> None:
        """Remove the bytes of this name; those that are gone already are fine. Errors: OSError."""

    def found(self) -> list[str]:
        """Return the names of what is there, but for what is being written, or may be."""

    def give_up(self, sessions: Container[str]) -> None:
        """Remove what is being written of some sessions, none of which is kept any more. Errors: OSError."""

    def being_written(self) -> set[str]:
        """Return the ids of the sessions of which a window is being written."""


@dataclass(frozen=True, slots=True)
class SessionWindows:
    """Implements `memory_service.storage.base.Windows` over rows and files. later: runs a task in the background."""

    records: Transactions
    clock: Clock
    rows: Rows
    quotas: Quotas
    space: Space
    files: WindowFiles
    later: Callable[[Callable[[], object]], None]

    def begin(self, tenant: str, window: Window, epoch: int) -> "NewWindow":
        """Begin to keep a window; see `Windows.begin`."""
        records = self.records.of(tenant)
        with records.read() as connection:
            branch = self.check(connection, tenant, window, epoch)
        # In a transaction that changes: what a tenant holds is known to those.
        records.change(partial(self.before, tenant=tenant, window=window), tenant=tenant)
        reserved = self.space.for_payload(window.size)
        try:
            return NewWindow(self, tenant, window, epoch, branch, reserved, self.files.begin(window.session_id))
        except BaseException:
            reserved.give()
            raise

    def check(self, connection: Connection, tenant: str, window: Window, epoch: int, before: str = "") -> str:
        """Refuse a window that is not one of the session now, and return the branch of its turn. before: the branch of
        it at an earlier look. Errors: those of `Windows.begin`, but for DISK_FULL and QUOTA_EXCEEDED."""
        now = self.clock.now_us()
        session = self.rows.sessions.get(connection, tenant, window.session_id, now)
        rules.check_lease(session, epoch, now)
        if not 0 <= window.turn <= session.head:
            raise turn_conflict(window.session_id, window.turn, session.head)
        branch = next(each.branch for each in session.stretches if window.turn <= each.last)
        if before not in ("", branch):
            text = f"session {window.session_id!r} was rewound: its turn {window.turn} is another one now"
            raise ServiceError("TURN_CONFLICT", text, session=window.session_id, head=session.head)
        return branch

    def before(self, connection: Connection, tenant: str, window: Window) -> tuple[bool, str]:
        """Return whether a window is to be kept, which one of an older turn is not, and the name of the bytes that its
        session has until then, "" for none. Errors: QUOTA_EXCEEDED for one that the tenant has no room for."""
        found = self.rows.windows.get(connection, window.session_id)
        if found is None:
            self.quotas.check_session_bytes(connection, tenant, window.size)
            return True, ""
        old, file = found
        if old.turn > window.turn:
            return False, ""
        self.quotas.check_session_bytes(connection, tenant, window.size - old.size)
        return True, file

    def open(self, tenant: str, session_id: str) -> tuple[Window, OldBytes] | None:
        """Open the window of a session; see `Windows.open`."""
        records = self.records.of(tenant)
        with records.read() as connection:
            self.rows.sessions.get(connection, tenant, session_id, self.clock.now_us())
            found = self.rows.windows.get(connection, session_id)
        if found is None:
            return None
        window, file = found
        with suppress(FileNotFoundError):
            source = self.files.open(file)
            try:
                if source.has(window.size, window.checksum):
                    return window, source
            except BaseException:
                source.close()
                raise
            source.close()
        _log.warning("the window of session %s is damaged, or gone; it is made again", session_id)
        records.change(partial(self.rows.windows.drop, file=file))
        self.remove(file)
        return None

    def remove(self, *files: str) -> None:
        """Remove bytes of windows, in the background; "" stands for none."""
        for file in filter(None, files):
            self.later(partial(self.files.remove, file))

    def sweep(self) -> None:
        """Remove the bytes that no row names."""
        found = self.files.found()
        with self.records.read() as connection:
            known = self.rows.windows.files(connection)
        for file in found:
            if file not in known:
                self.files.remove(file)

    def give_up_gone(self) -> None:
        """Remove the bytes that are being written of sessions that are gone."""
        writing = self.files.being_written()
        with self.records.read() as connection:
            self.files.give_up(writing - self.rows.sessions.existing(connection, writing))


class NewWindow:
    """Implements `memory_service.storage.base.NewWindow` over rows and files."""

    def __init__(
        self,
        windows: SessionWindows,
        tenant: str,
        window: Window,
        epoch: int,
        branch: str,
        reserved: Reservation,
        file: NewBytes,
    ) -> None:
        self._windows, self._file = windows, file
        self._tenant, self._window, self._epoch, self._reserved = tenant, window, epoch, reserved
        self._branch = branch

    def add(self, data: Buffer) -> None:
        """Append bytes to the window; see `NewWindow.add`."""
        if self._file.size + len(data) > self._window.size:
            raise ServiceError("INVALID_FIELD", "data: more bytes than the header says", field="data")
        self._file.add(data)

    def keep(self) -> None:
        """Let this be the window of its session; see `NewWindow.keep`."""
        window = self._window
        if self._file.size != window.size:
            text = f"data: {self._file.size} bytes have come, and the header says {window.size}"
            raise ServiceError("INVALID_FIELD", text, field="data")
        if self._file.checksum != window.checksum:
            text = "the bytes of the window are not those that its checksum names"
            raise ServiceError("CHECKSUM_IN_TRANSIT", text, tensor="window")
        self._file.store()

        def save(connection: Connection) -> tuple[bool, str]:
            self._windows.check(connection, self._tenant, window, self._epoch, self._branch)
            kept, before = self._windows.before(connection, self._tenant, window)
            if kept:
                self._windows.rows.windows.save(connection, self._tenant, window, self._file.name)
            return kept, before

        kept, before = self._windows.records.of(self._tenant).change(save, tenant=self._tenant)
        self._file.settled(kept=kept)
        self._windows.remove(before)

    def close(self) -> None:
        """Let go of what was not kept; see `NewWindow.close`."""
        self._file.settled(kept=False)
        self._reserved.give()
