"""The local windows of sessions in a data folder: a row in the database and a file each. This file owns that a window
is only answered where every byte is as it was kept, and that files which no row names are removed."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection

from memory_service.domain import sessions as rules
from memory_service.domain.errors import ServiceError, turn_conflict
from memory_service.domain.payload import Buffer
from memory_service.domain.sessions import Window
from memory_service.storage.base import Reservation
from memory_service.storage.local import quotas
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.files.window_files import NewWindow, OldWindow, WindowFiles
from memory_service.storage.local.records import session_rows, window_rows
from memory_service.storage.local.records.records import Records

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalWindows:
    """Implements `memory_service.storage.base.Windows` for a data folder. later: runs a task in the background."""

    records: Records
    space: DiskSpace
    files: WindowFiles
    later: Callable[[Callable[[], object]], None]

    def begin(self, tenant: str, window: Window, epoch: int) -> "LocalNewWindow":
        """Begin to keep a window; see `Windows.begin`."""
        with self.records.read() as connection:
            branch = self.check(connection, tenant, window, epoch)
        # The sums of a tenant are those of the writer's connection.
        self.records.writer.submit(partial(self.before, tenant=tenant, window=window), tenant=tenant).result()
        reserved = self.space.for_payload(window.size)
        try:
            return LocalNewWindow(self, tenant, window, epoch, branch, reserved, self.files.begin(window.session_id))
        except BaseException:
            reserved.give()
            raise

    def check(self, connection: Connection, tenant: str, window: Window, epoch: int, before: str = "") -> str:
        """Refuse a window that is not one of the session now, and return the branch of its turn. before: the branch of
        it at an earlier look. Errors: those of `Windows.begin`, but for DISK_FULL and QUOTA_EXCEEDED."""
        now = self.records.clock.now_us()
        session = session_rows.get(connection, tenant, window.session_id, now)
        rules.check_lease(session, epoch, now)
        if not 0 <= window.turn <= session.head:
            raise turn_conflict(window.session_id, window.turn, session.head)
        branch = next(each.branch for each in session.stretches if window.turn <= each.last)
        if before not in ("", branch):
            text = f"session {window.session_id!r} was rewound: its turn {window.turn} is another one now"
            raise ServiceError("TURN_CONFLICT", text, session=window.session_id, head=session.head)
        return branch

    def before(self, connection: Connection, tenant: str, window: Window) -> tuple[bool, str]:
        """Return whether a window is to be kept, which one of an older turn is not, and the name of the file that its
        session has until then, "" for none. Errors: QUOTA_EXCEEDED for one that the tenant has no room for."""
        found = window_rows.get(connection, window.session_id)
        if found is None:
            quotas.check_session_bytes(connection, tenant, window.size)
            return True, ""
        old, file = found
        if old.turn > window.turn:
            return False, ""
        quotas.check_session_bytes(connection, tenant, window.size - old.size)
        return True, file

    def open(self, tenant: str, session_id: str) -> tuple[Window, OldWindow] | None:
        """Open the window of a session; see `Windows.open`."""
        with self.records.read() as connection:
            session_rows.get(connection, tenant, session_id, self.records.clock.now_us())
            found = window_rows.get(connection, session_id)
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
        self.records.writer.submit(partial(window_rows.drop, file=file)).result()
        self.remove(file)
        return None

    def remove(self, *files: str) -> None:
        """Remove files of windows, in the background; "" stands for none."""
        for file in filter(None, files):
            self.later(partial(self.files.remove, file))

    def sweep(self) -> None:
        """Remove the files that no row names."""
        found = self.files.found()
        with self.records.read() as connection:
            known = window_rows.files(connection)
        for file in found:
            if file not in known:
                self.files.remove(file)

    def give_up_gone(self) -> None:
        """Remove the files that are being written of sessions that are gone."""
        writing = self.files.being_written()
        with self.records.read() as connection:
            self.files.give_up(writing - session_rows.existing(connection, writing))


class LocalNewWindow:
    """Implements `memory_service.storage.base.NewWindow` for a data folder."""

    def __init__(
        self,
        windows: LocalWindows,
        tenant: str,
        window: Window,
        epoch: int,
        branch: str,
        reserved: Reservation,
        file: NewWindow,
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

        def save(connection: Connection) -> tuple[bool, str]:
            self._windows.check(connection, self._tenant, window, self._epoch, self._branch)
            kept, before = self._windows.before(connection, self._tenant, window)
            if kept:
                window_rows.save(connection, self._tenant, window, self._file.name)
            return kept, before

        kept, before = self._windows.records.writer.submit(save, tenant=self._tenant).result()
        self._file.settled(kept=kept)
        self._windows.remove(before)

    def close(self) -> None:
        """Let go of what was not kept; see `NewWindow.close`."""
        self._file.settled(kept=False)
        self._reserved.give()
