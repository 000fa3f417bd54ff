"""What can be done with banks and chunks: the rooms of the service, put together.

Methods block and are called from storage threads; those that change something commit through the writer.
"""

import errno
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import starmap

from sqlalchemy import Connection

from memory_service.domain import validate
from memory_service.domain.answer_size import most_bytes
from memory_service.domain.clock import Clock
from memory_service.domain.errors import ServiceError, StartError, invalid
from memory_service.domain.eviction import NOBODY
from memory_service.domain.model import Bank, Chunk, Eviction, Filter, Metadata, metadata_bytes
from memory_service.domain.payload import Buffer
from memory_service.observe.metrics import Metrics
from memory_service.operations.paging import page
from memory_service.operations.writing import Writes, check_quota
from memory_service.search import SearchIndexes
from memory_service.settings import Settings
from memory_service.storage.background import Janitor
from memory_service.storage.base import FlawedError, NotThereError, Written
from memory_service.storage.local import leftovers, mounts, quarantine
from memory_service.storage.local.evicting.capacity import Room
from memory_service.storage.local.evicting.expiry import INTERVAL_S, Expiry
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.files.disk_space import DiskSpace
from memory_service.storage.local.files.objects import FOLDER, Payloads
from memory_service.storage.local.files.staging import StagedFile
from memory_service.storage.local.known_banks import Directory, bank_bytes, bank_not_found, not_mounted
from memory_service.storage.local.leftovers import Unowned
from memory_service.storage.local.records import bank_rows, chunk_rows, gone_rows, vacuum
from memory_service.storage.local.records.records import Records
from memory_service.storage.local.records.vacuum import Vacuum
from memory_service.storage.local.records.writer import savepoint

_log = logging.getLogger(__name__)


class Banks:
    """The banks of a data folder; see `memory_service.operations.reading` for reading them."""

    def __init__(self, settings: Settings, metrics: Metrics, clock: Clock | None = None) -> None:
        """`clock`: where a test hands in its own.

        Errors: StartError for a schema that is not the present one, or a bank that cannot be read.
        """
        durable = settings.durability == "fsync"
        self._settings = settings
        self.metrics = metrics
        self.payloads = Payloads(settings.data, durable=durable)
        # Each of these has a thread, which ends where one of the others cannot be had.
        with ExitStack() as begun:
            self.records = Records(
                settings.data, durable=durable, migrate=settings.migrate, metrics=metrics, clock=clock
            )
            begun.callback(self.records.close)
            self._directory, gone = self._read_banks()
            self.indexes = SearchIndexes(self.records, settings)
            begun.callback(self.indexes.close)
            self._janitor = Janitor("kvbank-janitor", metrics.troubles)
            begun.callback(self._janitor.close)
            # Apart, because the files of a deleted bank, or of a sweep, may take minutes.
            self._timer = Janitor("kvbank-expiry", metrics.troubles)
            begun.callback(self._timer.close)
            self._removal = Removal(self.records, self.payloads, self.indexes, self._janitor, metrics)
            self._room = Room(self.records, self._directory, self._removal, metrics.troubles)
            begun.callback(self._room.close)
            self._writes = Writes(
                DiskSpace(settings.data, settings.min_free),
                self._directory,
                self.records,
                self.payloads,
                self.indexes,
                self._room,
                self._janitor,
                metrics,
            )
            self._room.open()
            self.vacuum = Vacuum(self.records, settings.data)
            self._mark_folders()
            begun.pop_all()
        for bank_id, uid in gone:
            self._removal.clear(bank_id, uid)
        self._janitor.later(self._sweep)
        self._timer.every(INTERVAL_S, self.records.follow_wall_clock)
        self._timer.every(INTERVAL_S, self._room.try_again)
        self._timer.every(vacuum.INTERVAL_S, self.vacuum.run)
        self._timer.every(INTERVAL_S, Expiry(self.records, self._directory, self._removal).run)

    def _read_banks(self) -> tuple[Directory, list[tuple[int, str]]]:
        """Read the banks, and ids and uids of those that are being deleted. Errors: StartError for a damaged one."""
        with self.records.read() as connection:
            try:
                return Directory(bank_rows.after(connection)), bank_rows.gone(connection)
            except (ValueError, KeyError, TypeError) as error:
                data = self._settings.data
                raise StartError(f"the records of {data} have a damaged bank; see: kvbank check {data}") from error

    def probe(self) -> None:
        """Check that the storage answers: a row can be read, and the folder of the payloads is there.

        Errors: OSError, DBAPIError, sqlite3.Error.
        """
        with self.records.read() as connection:
            bank_rows.totals(connection)
        if not self.payloads.mounted():
            raise FileNotFoundError(errno.ENOENT, "no disk of payloads is mounted", str(self._settings.data / FOLDER))

    def close(self) -> None:
        """Commit what is pending, checkpoint, finish the clean-up."""
        self._room.close()
        self._timer.close()
        self._janitor.rest()
        self.indexes.close()
        self.records.close()
        self._janitor.close()

    # Banks

    def create(self, new: Bank) -> tuple[Bank, bool]:
        """The bank, and whether it is new; an existing one when name and specs agree.

        Errors: INVALID_FIELD, BANK_EXISTS, TOO_LARGE, DISK_FULL.
        """
        validate.bank(new)
        new = replace(new, uid=secrets.token_hex(8), created=self.records.clock.now_us())

        def make(connection: Connection, *, ready: bool) -> Bank | None:
            """None for a bank that would be new, and is not `ready`: it has no folder yet."""
            if (found := _found(connection, new)) is not None:
                return found
            _check_bound("banks", self._settings.max_banks, bank_rows.count(connection) + 1)
            self._check_bytes(bank_bytes(new))
            self._writes.space.for_records().give()
            return replace(new, bank_id=bank_rows.insert(connection, new)) if ready else None

        bank = self.records.writer.submit(partial(make, ready=not new.kv.layers), self._changed).result()
        if bank is None:
            bank = self._with_folder(new, partial(make, ready=True))
        return bank, bank.uid == new.uid

    def _with_folder(self, new: Bank, make: Callable[[Connection], Bank | None]) -> Bank:
        """The folder of its payloads first: a bank that has none is one whose disk is missing."""
        try:
            self.payloads.begin_bank(new.uid)
        except NotThereError as error:
            raise not_mounted(new.name) from error
        bank: Bank | None = None
        try:
            bank = self.records.writer.submit(make, self._changed).result()
        finally:
            if bank is None or bank.uid != new.uid:
                self._janitor.later(self.payloads.drop_bank, new.uid)
        assert bank is not None
        return bank

    def _check_bytes(self, more: int) -> None:
        """Refuse a bank with which all banks would take too much memory. Errors: TOO_LARGE."""
        if more > 0:
            what = "bytes of specs and metadata of all banks"
            _check_bound(what, self._settings.max_bank_bytes, self._directory.bytes + more)

    def named(self, name: str) -> Bank:
        """The bank, with the usage of some earlier time. Errors: BANK_NOT_FOUND."""
        return self._directory.named(name)

    def get(self, name: str) -> Bank:
        """The bank as it is now. Errors: BANK_NOT_FOUND."""
        with self.records.read() as connection:
            bank = bank_rows.get(connection, self.named(name).bank_id)
        if bank is None:
            raise bank_not_found(name)
        return bank

    def known(self) -> list[Bank]:
        """Every bank, with the usage of some earlier time."""
        return self._directory.all()

    def after(self, name: str, limit: int) -> tuple[list[Bank], bool]:
        """Return a page of banks by name, from the first one after `name`, and whether there are more."""
        with self.records.read() as connection:
            return page(bank_rows.after(connection, name), limit, bank_bytes)

    def update(self, name: str, changes: Mapping[str, object]) -> Bank:
        """Replace some of capacity, policy, metadata, quota, expiry, index.

        Errors: INVALID_FIELD, BANK_NOT_FOUND, TOO_LARGE, DISK_FULL (not for capacity and policy, which make room).
        """
        bank_id = self.named(name).bank_id

        def change(connection: Connection) -> Bank:
            bank = bank_rows.get(connection, bank_id)
            if bank is None:
                raise bank_not_found(name)
            changed = replace(bank, **changes)  # type: ignore[arg-type]
            validate.bank(changed)
            self._check_bytes(bank_bytes(changed) - bank_bytes(bank))
            if not changes.keys() <= {"capacity", "policy"}:
                self._writes.space.for_records().give()
            bank_rows.update(connection, changed)
            if (changed.capacity, changed.policy) != (bank.capacity, bank.policy):
                # A plan under way was made for the old ones.
                gone_rows.save_plan(connection, bank_id, NOBODY)
                self.records.ledgers.drop(bank_id)
            return changed

        # A write behind it goes by what it says: one that knew the old capacity would make a plan for that.
        return self.records.writer.submit(change, self._changed, last=True).result()

    def delete(self, name: str) -> None:
        """The bank with all its chunks; it is gone at once, what it takes on the disk soon. Errors: BANK_NOT_FOUND."""
        bank = self.named(name)

        def remove(connection: Connection) -> None:
            # Another call may have deleted it, and a third made a bank of this name, since it was looked up.
            if not bank_rows.delete(connection, bank.bank_id):
                raise bank_not_found(name)

        def applied(_none: None) -> None:
            self._directory.remove(bank)
            self._room.forget(bank)
            self._removal.bank_deleted(bank)

        self.records.writer.submit(remove, applied).result()

    # Writing

    def admit(self, name: str, reader_digest: str, embedder_digest: str, chunk: Chunk) -> Bank:
        """Check a chunk before its bytes are taken; touches no disk. Errors: those of a write that need no bytes."""
        bank = self.named(name)
        validate.reader(bank, reader_digest)
        validate.embedder(bank, embedder_digest)
        validate.chunk(bank, chunk, self._settings.max_chunk_bytes)
        return bank

    def waited_for(self, bank: Bank, chunk: Chunk) -> "Future[None] | None":
        """What is to be waited for before the bytes of an admitted chunk are taken; see `Room.waited_for`."""
        return self._room.waited_for(bank.bank_id, chunk)

    def write(self, bank: Bank, chunk_id: int, chunk: Chunk, data: Buffer | StagedFile) -> "Future[Written]":
        """Store an admitted chunk; see `memory_service.operations.writing`."""
        return self._writes.begin(bank, chunk_id, chunk, data)

    # Chunks

    def delete_chunks(self, name: str, chunk_ids: Sequence[int]) -> int:
        """Delete chunks, and return how many existed. Errors: BANK_NOT_FOUND, INVALID_FIELD."""
        bank = self.named(name)
        _check_ids(chunk_ids)
        return len(self._removal.remove(bank, chunk_ids, "chunks_deleted").result())

    def pin_chunks(self, name: str, chunk_ids: Sequence[int], pinned: bool) -> int:
        """Protect chunks from eviction, or no longer, and return how many exist. Errors: BANK_NOT_FOUND,
        INVALID_FIELD."""
        bank_id = self.named(name).bank_id
        _check_ids(chunk_ids)

        def pin(connection: Connection) -> int:
            found = chunk_rows.pin(connection, bank_id, chunk_ids, pinned, self.records.counts.unwritten())
            self.records.ledgers.change(bank_id, lambda ledger: ledger.pin(found, pinned))
            return len(found)

        return self.records.writer.submit(pin).result()

    def quarantine(self, bank: Bank, chunk_id: int, why: str = "stored bytes are damaged") -> None:
        """Take a damaged chunk out of service; its file and what its records said are kept aside.

        Errors: STORAGE_ERROR when no file of the bank is there: then it is the disk that is missing, not the chunk.
        """
        if bank.kv.layers and not self.payloads.present(bank.uid):
            raise not_mounted(bank.name)
        with self.records.read() as connection:
            quarantine.set_aside(connection, self._settings.data, bank.uid, {chunk_id: why})
        if self._removal.remove(bank, [chunk_id], "chunks_quarantined", keep_files=True).result():
            _log.error("chunk %d of bank %s is damaged and quarantined", chunk_id, bank.name)

    @contextmanager
    def without_flawed(self) -> Iterator[None]:
        """Take rows that the block meets and that cannot be used out of service, so that the next call does without
        them. Errors: CHECKSUM_MISMATCH for this call."""
        try:
            yield
        except FlawedError as error:
            for chunk_id, why in error.flaws.items():
                self.quarantine(error.bank, chunk_id, why)
            raise damaged_chunk(min(error.flaws)) from error

    def get_chunk(self, name: str, chunk_id: int, *, embedding: bool) -> Chunk:
        """Metadata of a chunk. Errors: BANK_NOT_FOUND, CHUNK_NOT_FOUND."""
        bank = self.named(name)
        self.records.show_counts()
        unwritten = self.records.counts.unwritten()
        with self.without_flawed(), self.records.read() as connection:
            chunk = chunk_rows.get(connection, bank, chunk_id, unwritten, embedding=embedding)
        if chunk is None:
            raise chunk_not_found(name, chunk_id)
        return chunk

    def list_chunks(
        self, name: str, after: int, limit: int, filter_: Filter, *, embedding: bool
    ) -> tuple[list[Chunk], bool]:
        """Return a page of chunks ascending by id, from the first one after `after`, and whether there are more."""
        bank = self.named(name)
        self.records.show_counts()
        unwritten = self.records.counts.unwritten()
        with self.without_flawed(), self.records.read() as connection:
            found = chunk_rows.page(connection, bank, after, filter_, unwritten, embedding=embedding)
            return page(found, limit, most_bytes)

    def update_chunk(self, name: str, chunk_id: int, metadata: Metadata) -> Chunk:
        """Replace the metadata.

        Errors: BANK_NOT_FOUND, CHUNK_NOT_FOUND, INVALID_FIELD, DISK_FULL, QUOTA_EXCEEDED, BANK_FULL.
        """
        bank_id = self.named(name).bank_id
        validate.metadata("metadata", metadata)
        self._writes.space.for_records().give()

        def change(connection: Connection) -> bool:
            bank = self._directory.current(bank_id)
            with savepoint(connection):  # a refusal takes the metadata back
                grown = chunk_rows.update(connection, bank_id, chunk_id, metadata, self.records.counts.unwritten())
                usage = bank_rows.usage(connection, bank_id)
                if grown is None or usage is None or bank is None:
                    return False
                if grown > 0:
                    check_quota(bank, "bytes", usage.bytes - grown, grown)
                self._room.grown(bank, usage, chunk_id, grown)
            return True

        if not self.records.writer.submit(change, lambda _: self._room.settle_down(bank_id)).result():
            raise chunk_not_found(name, chunk_id)
        return self.get_chunk(name, chunk_id, embedding=False)

    # Evictions

    @property
    def stalled_evictions(self) -> int:
        """Return the banks whose eviction could not be written, and is tried again."""
        return self._room.stalled

    def explain_eviction(self, name: str, need: int) -> tuple[list[Eviction], str]:
        """What a write of `need` would evict, in order and a sentence about it. Errors: BANK_NOT_FOUND."""
        self.records.show_counts()
        return self._room.explain(self.get(name), need)

    def list_evictions(self, name: str, before: int, limit: int) -> tuple[list[tuple[int, Eviction]], bool]:
        """A page of (sequence, eviction), newest first; whether there are more. Errors: BANK_NOT_FOUND."""
        bank_id = self.named(name).bank_id
        with self.records.read() as connection:
            found = gone_rows.evictions(connection, bank_id, before)
            return page(found, limit, lambda eviction: metadata_bytes(eviction[1].metadata))

    # The index and the folder

    def _changed(self, bank: Bank | None) -> None:
        if bank is None:
            return
        self._directory.put(bank)
        self.indexes.changed(bank)
        self._room.measure(bank)

    def _mark_folders(self) -> None:
        with self.records.read() as connection:
            mounts.mark(self.payloads, connection, self._directory.all(), new_here=self.records.new_here)

    def _sweep(self) -> None:
        def known() -> dict[str, set[int] | None]:
            with self.records.read() as connection:
                return chunk_rows.payload_ids(connection)

        found = starmap(Unowned, self.payloads.unowned(known, self.records.ids.first))
        removed, aside = leftovers.tidy(self._settings.data, found, self.records.read)
        for folder in self.payloads.remove_empty(known):
            _log.error("%s has payloads of a bank that the records do not know; it is left alone", folder)
        if removed:
            _log.warning("removed %d files of chunks that are gone, or whose write was repeated", removed)
        if aside:
            text = "%d files that no record names are in %s/; what is whole is given back by: kvbank repair %s"
            _log.warning(text, aside, quarantine.FOLDER, self._settings.data)


def damaged_chunk(chunk_id: int) -> ServiceError:
    """Make the error CHECKSUM_MISMATCH for a chunk that was quarantined."""
    text = f"stored bytes of chunk {chunk_id} are damaged; it is quarantined"
    return ServiceError("CHECKSUM_MISMATCH", text, chunk_id=chunk_id)


def chunk_not_found(name: str, chunk_id: int) -> ServiceError:
    """Make the error CHUNK_NOT_FOUND."""
    return ServiceError("CHUNK_NOT_FOUND", f"bank {name} has no chunk {chunk_id}", chunk_id=chunk_id)


def _found(connection: Connection, new: Bank) -> Bank | None:
    """The bank of this name, if there is one. Errors: BANK_EXISTS, when its specs are others."""
    found = bank_rows.named(connection, new.name)
    if found is None:
        return None
    # A hidden size that is not stated is whatever the bank's is.
    other_size = new.kv.hidden_size not in (0, found.kv.hidden_size)
    if other_size or (found.kv, found.embedding) != (new.kv, new.embedding):
        text = f"there is a bank {new.name!r} with another spec"
        raise ServiceError(
            "BANK_EXISTS",
            text,
            bank_digest=found.kv.reader_digest,
            request_digest=new.kv.reader_digest,
        )
    return found


def _check_bound(what: str, limit: int, size: int) -> None:
    if size > limit:
        text = f"there would be {size} {what}; this server takes {limit}"
        raise ServiceError("TOO_LARGE", text, limit=limit, size=size)


def _check_ids(chunk_ids: Sequence[int]) -> None:
    if not 1 <= len(chunk_ids) <= validate.MOST_IDS:
        raise invalid("chunk_ids", f"must have 1 to {validate.MOST_IDS} ids")
