"""The engine of a data folder: opens it, owns it, and does in the background what a folder needs. This file owns the
order in which the parts begin and end.

Three threads work in the background. One runs tasks of a moment in their order, of which some take minutes (the files
of a deleted bank, the sweep after a start); one looks every second at what has expired or must be tried again; one
waits for the disk to take the small payload files.
"""

import errno
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import starmap
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from memory_service.domain.clock import Clock
from memory_service.domain.errors import StartError
from memory_service.domain.limits import Limits, Pauses
from memory_service.observe.metrics import Metrics
from memory_service.settings import Settings
from memory_service.storage.access.ended_keys import EndedKeys
from memory_service.storage.access.records import Access
from memory_service.storage.background import Janitor
from memory_service.storage.base import DerivedId, Sizes
from memory_service.storage.chunks.known_chunks import KnownChunks
from memory_service.storage.followers import Followers
from memory_service.storage.forgetting.order import Forgettings
from memory_service.storage.local import given_ids, leftovers, mounts
from memory_service.storage.local.adding import Adding
from memory_service.storage.local.bank_changes import BankChanges, Bounds
from memory_service.storage.local.evicting.background import Background
from memory_service.storage.local.evicting.capacity import Capacities
from memory_service.storage.local.evicting.expiry import Expiry
from memory_service.storage.local.evicting.ledgers import Ledgers
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.files import access, ballast, layout
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.files.folder import DataFolder
from memory_service.storage.local.files.layout import FOLDER
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.files.unsynced import Unsynced
from memory_service.storage.local.files.whole_disk import WholeDisks
from memory_service.storage.local.files.window_files import WindowFiles
from memory_service.storage.local.forgetting import LocalChunkForgetting
from memory_service.storage.local.known_banks import KnownBanks
from memory_service.storage.local.leftovers import Unowned
from memory_service.storage.local.records import access_rows, bank_rows, chunk_rows, forgetting_rows, schema
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.records.unused_bytes import UnusedBytes
from memory_service.storage.local.records.vacuum import Vacuum
from memory_service.storage.local.rows import FORGETTING_ROWS, QUOTAS, ROWS
from memory_service.storage.local.store import LocalStore
from memory_service.storage.local.syncing import Syncing
from memory_service.storage.sessions.ended import EndedSessions
from memory_service.storage.sessions.records import Sessions
from memory_service.storage.sessions.windows import SessionWindows

_log = logging.getLogger(__name__)


@contextmanager
def explaining(data: Path) -> Iterator[None]:
    """Let the block open parts of a data folder. Errors: StartError, which says in one line why that cannot be done."""
    try:
        yield
    except (OSError, DBAPIError, sqlite3.Error, UnicodeError) as error:
        raise StartError(f"cannot open {data}: {ballast.explained(data, error)}") from error


def upgrade(data: Path) -> tuple[str, str]:
    """Upgrade the records of a data folder that no service owns; return the schema that they had, and the one that they
    have now. Errors: StartError."""
    path = data / "metadata.db"
    if not path.is_file():
        raise StartError(f"{data} is not a data folder of kvbank: it has no {path.name}")
    folder = DataFolder(data)
    try:
        return schema.prepare(path, data, migrate=True), schema.revisions()[-1]
    finally:
        folder.release()


class LocalEngine:
    """Implements `memory_service.storage.base.Engine` for a data folder, which it owns until `close`."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        derived_id: DerivedId,
        clock: Clock | None,
        limits: Limits,
        pauses: Pauses,
    ) -> None:
        """Open a data folder, which is made where there is none. clock: None for that of the machine. Errors:
        StartError."""
        self._settings = settings
        self._limits, self._pauses = limits, pauses
        self._resting = False
        self.cache = settings.folder / "indexes"
        durable = settings.durability == "fsync"
        # What has been opened ends where one of the others cannot be had; so does what has a thread.
        with ExitStack() as opened:
            folder = DataFolder(settings.folder)
            opened.callback(folder.release)
            with explaining(settings.folder):
                ballast.drop_if_needed(settings.folder)
                access.tighten(settings.folder)
                self._disks = WholeDisks()
                opened.callback(self._disks.close)
                self._unsynced = Unsynced(limits.unsynced_bytes, self._disks)
                held = self._unsynced if durable else None
                self.objects = LocalObjects(settings.folder, durable=durable, unsynced=held)
                self.space = DiskSpace(settings.folder, settings.min_free)
                self._ledgers = Ledgers()
                derived = partial(derived_id, self.cache)
                self.records = Records(
                    settings.folder,
                    self._ledgers,
                    durable=durable,
                    metrics=metrics,
                    migrate=settings.migrate,
                    clock=clock,
                    settle_ids=partial(given_ids.settle, data=settings.folder, derived_id=derived),
                    pauses=pauses,
                )
                opened.callback(self.records.close)
                self._known, self._gone = self._read_banks()
                self._janitor = Janitor("kvbank-janitor", metrics.troubles)
                opened.callback(self._janitor.close)
                self._timer = Janitor("kvbank-expiry", metrics.troubles)
                opened.callback(self._timer.close)
                self._syncer = Janitor("kvbank-syncing", metrics.troubles)
                opened.callback(self._syncer.close)
                self._join(metrics)
                opened.callback(self.evictions.close)
            opened.pop_all()
        self._folder = folder

    def _join(self, metrics: Metrics) -> None:
        """Make the parts that work on the records, and the store that joins them."""
        limits, pauses = self._limits, self._pauses
        self._followers = Followers()
        self._removal = Removal(
            self.records, self._ledgers, self.objects, self._followers, self._janitor, metrics, limits, pauses
        )
        self.evictions = Background(
            self.records, self._known, self._ledgers, self._removal, metrics.troubles, limits, pauses
        )
        self._capacities = Capacities(self.evictions)
        self.expiry = Expiry(self.records, self._known, self._removal, pauses)
        self._vacuum = Vacuum(self.records, self._settings.folder, limits)
        self._syncing = Syncing(self.records, self.objects, self._unsynced, self._disks, limits)
        changes = self._made_changes()
        self.store = self._made_store(changes, metrics)
        files, clock = WindowFiles(self._settings.folder), self.records.clock
        self.windows = SessionWindows(self.records, clock, ROWS, QUOTAS, self.space, files, self.later)
        self.access = Access(
            records=self.records,
            clock=clock,
            rows=access_rows,
            quotas=QUOTAS,
            space=self.space,
            banks=changes,
            windows=self.windows,
            is_going=forgetting_rows.is_tenant_going,
        )
        self._ended_keys = EndedKeys(self.access, limits)
        self.sessions = Sessions(
            records=self.records,
            clock=clock,
            rows=ROWS,
            quotas=QUOTAS,
            space=self.space,
            banks=changes,
            windows=self.windows,
            metrics=metrics,
            most=self._settings.max_sessions,
        )
        self._ended_sessions = EndedSessions(self.sessions, limits.step_rows)
        data = self._settings.folder
        self.unused = UnusedBytes(self.records.writer, data / "metadata.db")
        chunks = LocalChunkForgetting(
            data=data,
            objects=self.objects,
            changes=changes,
            removal=self._removal,
            followers=self._followers,
            limits=limits,
            pauses=pauses,
            janitor=self._janitor,
            vacuum=self._vacuum,
            unused=self.unused,
        )
        self.forgetting = Forgettings(self.records, clock, FORGETTING_ROWS, self.windows, chunks, limits, pauses)

    def _made_changes(self) -> BankChanges:
        return BankChanges(
            bounds=Bounds(self._settings.max_banks, self._settings.max_bank_bytes),
            records=self.records,
            known=self._known,
            payloads=self.objects,
            space=self.space,
            followers=self._followers,
            removal=self._removal,
            ledgers=self._ledgers,
            capacities=self._capacities,
            later=self.later,
        )

    def _made_store(self, changes: BankChanges, metrics: Metrics) -> LocalStore:
        self._followers.append(known_chunks := KnownChunks())
        return LocalStore(
            data=self._settings.folder,
            records=self.records,
            known=self._known,
            space=self.space,
            followers=self._followers,
            removal=self._removal,
            ledgers=self._ledgers,
            capacities=self._capacities,
            adding=Adding(
                self.records, self._known, self._capacities, self._removal, self._followers, self._unsynced, metrics
            ),
            changes=changes,
            known_chunks=known_chunks,
            syncing=self._syncing,
        )

    def _read_banks(self) -> tuple[KnownBanks, list[tuple[int, str]]]:
        """Read the banks, and ids and uids of those that are being deleted. Errors: StartError for a damaged one."""
        with self.records.read() as connection:
            try:
                return KnownBanks(bank_rows.of_all(connection)), bank_rows.gone(connection)
            except (ValueError, KeyError, TypeError) as error:
                data = self._settings.folder
                raise StartError(f"the records of {data} have a damaged bank; see: kvbank check {data}") from error

    def begin(self) -> None:
        """Begin what the engine does by itself; see `Engine.begin`. Errors: StartError."""
        data = self._settings.folder
        with explaining(data):
            self._capacities.open()
            with self.records.read() as connection:
                mounts.mark(self.objects, connection, self._known.all(), new_here=self.records.new_here)
            self._syncing.resume()  # before anything looks at files
            ballast.take(data, self._settings.min_free)
        for bank_id, uid in self._gone:
            self._removal.clear(bank_id, uid)
        self.later(self._sweep)
        self.later(self.windows.sweep)
        self.forgetting.resume()
        every = self._limits.expiry_s
        self._timer.every(every, self.records.follow_wall_clock)
        self._timer.every(every, self.evictions.try_again)
        self._syncer.every(self._limits.sync_s, self._syncing.run)
        self._timer.every(self._limits.vacuum_s, self._vacuum.run)
        self._timer.every(self._limits.keys_tidied_s, self._ended_keys.tidy)
        if not self._pauses.leaves_out("expiry"):
            self._timer.every(every, self.expiry.run)
            self._timer.every(every, self._ended_sessions.run)

    def later(self, task: Callable[[], object]) -> None:
        """Run a task in the background, once; what it raises is logged."""
        self._janitor.later(task)

    def probe(self) -> None:
        """Check that a row can be read, and the folder of the payloads is there. Errors: OSError, DBAPIError,
        sqlite3.Error."""
        with self.records.read() as connection:
            bank_rows.totals(connection)
        if not self.objects.folders.mounted():
            raise FileNotFoundError(errno.ENOENT, "no disk of payloads is mounted", str(self._settings.folder / FOLDER))

    def sizes(self) -> Sizes:
        """Measure the database with its log, and what is free in it."""
        return self._vacuum.sizes()

    def give_back(self) -> None:
        """Give all pages of the database that are free now back to the disk. Errors: Cancelled."""
        self._vacuum.give_back()

    def rest(self) -> None:
        """End what the engine does by itself; see `Engine.rest`."""
        self._resting = True
        self.forgetting.close()
        self.evictions.close()
        self._timer.close()
        self._syncer.later(self._syncing.run)
        self._syncer.close()
        self._janitor.rest()

    def close(self) -> None:
        """Commit what is pending, checkpoint, finish the clean-up, and let another process own the folder. An engine
        that could not be begun, and so does not rest yet, is brought to rest first."""
        if not self._resting:
            self.rest()
        self.records.close()
        self.unused.close()
        self._janitor.close()
        self._disks.close()
        self._folder.release()

    def _sweep(self) -> None:
        """Look for payloads that no row names; see `leftovers`."""

        def known() -> dict[str, set[int] | None]:
            with self.records.read() as connection:
                return chunk_rows.payload_ids(connection)

        found = starmap(Unowned, self.objects.folders.unowned(known, self.records.ids.first))
        removed, aside = leftovers.tidy(self._settings.folder, found, self.records.read)
        for folder in self.objects.folders.remove_empty(known):
            _log.error("%s has payloads of a bank that the records do not know; it is left alone", folder)
        if removed:
            _log.warning("removed %d files of chunks that are gone, or whose write was repeated", removed)
        if aside:
            text = "%d files that no record names are in %s/; what is whole is given back by: kvbank repair %s"
            _log.warning(text, aside, layout.QUARANTINE, self._settings.folder)
