"""The check of a store in a database with a bucket: rows with their checksums and with each other, payloads with rows.

This file owns that all rows are those of one moment, and that a row whose payload was missed is asked about again:
services may write and remove chunks meanwhile.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from memory_service.care import database_questions, payload_file
from memory_service.care.copying import flaws, tables
from memory_service.care.copying.database_end import DatabaseEnd, read
from memory_service.care.copying.ends import Object
from memory_service.care.copying.places import Place
from memory_service.care.copying.tables import Key, Row, Table
from memory_service.care.report import Findings, Kind, Problem, Progress, quiet
from memory_service.domain.limits import OBJECTS, ObjectLimits
from memory_service.domain.model import Bank, Payload
from memory_service.storage.base import DamagedError
from memory_service.storage.postgres.database import NOW
from memory_service.storage.s3 import layout

# Objects without a row that are looked for among the marks at once.
_PAGE = 1000
# Services look at all objects every `sweep_s`, and delete one whose mark is older than `orphan_s`.
_OVERDUE = f"SELECT object FROM marks WHERE object = ANY(%s) AND time < {NOW} - %s ORDER BY object"


def check(
    place: Place,
    *,
    fast: bool = False,
    sample: int = 0,
    progress: Progress = quiet,
    limits: ObjectLimits = OBJECTS,
) -> Findings:
    """Find every problem of a store, served or not.

    fast: whether to look only at the existence and size of payloads. sample: how many payloads are read at most, spread
    over all; 0 for all. limits: by which objects are read, and count as left over. Errors: CareError, StartError,
    OSError.
    """
    with read(place.data, place.objects, live=True, limits=limits) as store:
        checking = _Checking(store, fast, sample, progress, limits)
        checking.run()
    return checking.findings


def look_again(place: Place, chunks: Iterable[tuple[int, int]], limits: ObjectLimits = OBJECTS) -> list[Problem]:
    """Return what is wrong now with some chunks, of these bank and chunk ids, and with their payloads, which are all
    read. limits: as for `check`. Errors: CareError, StartError, OSError."""
    with read(place.data, place.objects, live=True, limits=limits) as store:
        checking = _Checking(store, False, 0, quiet, limits)
        checking.look_again(chunks)
    return [problem for problem in checking.findings.problems if problem.chunk_id is not None]


class _Checking:
    """One run of a check."""

    def __init__(self, store: DatabaseEnd, fast: bool, sample: int, progress: Progress, limits: ObjectLimits) -> None:
        self._store, self._progress = store, progress
        self._overdue = round((limits.orphan_s + 2 * limits.sweep_s) * 1e6)
        self._unnamed: list[str] = []
        self.findings = Findings()
        self._banks: dict[int, Bank] = {}
        count = store.count(tables.CHUNKS)
        self._every = 0 if fast else max(1, -(-count // sample) if sample else 1)

    def run(self) -> None:
        """Look at all rows and payloads."""
        for row in self._rows(tables.BANKS):
            self._look_at_bank(row)
        aside = {(row[0], row[1]) for row in self._store.rows(tables.QUARANTINE)}
        seen = self._look_at_chunks(aside)
        for uid in self._store.banks_listed():
            if uid not in seen:
                self._look_behind(_Objects(uid, self._store, aside))
        self._look_at_unnamed()
        database_questions.check(self._store.connection, self.findings)
        for table in (tables.BRANCHES, tables.TURNS, tables.SESSIONS):
            kind, flaw_of = flaws.BY_TABLE[table.name]
            for row in self._rows(table):
                if flaw := flaw_of(table.named(row)):
                    self.findings.add(kind, flaw)

    def look_again(self, chunks: Iterable[tuple[int, int]]) -> None:
        """Look at some chunks, of these bank and chunk ids, and at their payloads."""
        for row in self._rows(tables.BANKS):
            self._look_at_bank(row)
        for bank_id, chunk_id in chunks:
            for row in self._store.rows(tables.CHUNKS, (bank_id, chunk_id - 1), (bank_id, chunk_id)):
                if (bank := self._banks.get(bank_id)) is not None:
                    self._look_at_chunk(tables.CHUNKS.named(row), bank, None)

    def _rows(self, table: Table) -> Iterator[Row]:
        after: Key = ()
        done, total = 0, self._store.count(table)
        while page := self._store.rows(table, after, most=table.page):
            yield from page
            done += len(page)
            self.findings.totals[table.name] += len(page)
            self._progress(table.name, done, max(done, total))
            after = table.key(page[-1])

    def _look_at_bank(self, row: Row) -> None:
        named = tables.BANKS.named(row)
        try:
            bank = tables.bank_of(row)
        except (ValueError, KeyError, TypeError):
            self.findings.add("bank", "its specs cannot be read", bank=str(named["name"]))
        else:
            self._banks[bank.bank_id] = bank

    def _look_at_chunks(self, aside: Set[tuple[str, int]]) -> Set[str]:
        """Check all chunks and their payloads; return the uids of the banks whose objects were looked at. aside: bank
        uid and chunk id of what is out of service."""
        seen: set[str] = set()
        objects: _Objects | None = None
        for row in self._rows(tables.CHUNKS):
            named = tables.CHUNKS.named(row)
            if (bank := self._banks.get(named["bank_id"])) is None:
                continue
            if objects is None or objects.uid != bank.uid:
                self._look_behind(objects)
                objects = _Objects(bank.uid, self._store, aside)
                seen.add(bank.uid)
            size = objects.size(named["chunk_id"])
            self._look_at_unnamed(objects)
            self._look_at_chunk(named, bank, size)
        self._look_behind(objects)
        return seen

    def _look_at_chunk(self, named: Mapping[str, Any], bank: Bank, size: int | None) -> None:
        """Check the row of a chunk, and its payload. size: the bytes of its object; None where none is known."""
        payload, flaw = flaws.of_chunk(named, bank)
        if flaw:
            self._add("record", flaw, bank, named["chunk_id"])
        elif payload is not None:
            self._look_at_payload(bank, named["chunk_id"], payload, size)

    def _look_behind(self, objects: "_Objects | None") -> None:
        """Look at the objects of a bank that are behind its last chunk."""
        while objects is not None and objects.go_on(_PAGE):
            self._look_at_unnamed(objects)

    def _look_at_unnamed(self, objects: "_Objects | None" = None) -> None:
        """Count the objects of a bank that no row names, and name those that services should have deleted by now: in
        pages, and at the end, without a bank, what is left."""
        if objects is not None:
            self._unnamed += objects.without_row()
            if len(self._unnamed) < _PAGE:
                return
        self.findings.totals["objects_without_row"] += len(self._unnamed)
        for (key,) in self._store.ask(_OVERDUE, self._unnamed, self._overdue) if self._unnamed else ():
            self.findings.add("orphan_file", "no chunk owns it", path=key)
        self._unnamed.clear()

    def _look_at_payload(self, bank: Bank, chunk_id: int, payload: Payload, size: int | None) -> None:
        number = self.findings.totals["payloads"]
        self.findings.totals.update(payloads=1, payload_bytes=payload.length)
        if size is None and not self._is_there(bank, chunk_id):
            self._add("payload_missing", "its object is missing", bank, chunk_id)
        elif size not in (None, payload.file_length):
            text = f"its object has {size} bytes instead of {payload.file_length}"
            self._add("payload_damaged", text, bank, chunk_id)
        elif self._every and number % self._every == 0:
            self._read(bank, chunk_id, payload)

    def _is_there(self, bank: Bank, chunk_id: int) -> bool:
        """Look once more for an object, which may be younger than the page of the listing that it was missed in."""
        try:
            return bool(self._store.read(Object("payload", bank.uid, chunk_id)))
        except FileNotFoundError:
            return False

    def _read(self, bank: Bank, chunk_id: int, payload: Payload) -> None:
        self.findings.totals["read"] += 1
        try:
            data = self._store.read(Object("payload", bank.uid, chunk_id))
            payload_file.verify(data, bank.uid, chunk_id, payload)
        except FileNotFoundError:
            self._add("payload_missing", "its object is missing", bank, chunk_id)
        except DamagedError as error:
            self._add("payload_damaged", str(error), bank, chunk_id)

    def _add(self, kind: Kind, detail: str, bank: Bank, chunk_id: int) -> None:
        """Add a problem, unless the chunk has gone since."""
        if self._store.alive([chunk_id]):
            self.findings.add(kind, detail, bank=bank.title, chunk_id=chunk_id)


class _Objects:
    """The objects of a bank in the order of its chunks, as a listing tells them."""

    def __init__(self, uid: str, store: DatabaseEnd, aside: Set[tuple[str, int]]) -> None:
        """List the objects of a bank. aside: bank uid and chunk id of what is out of service."""
        self.uid = uid
        self._aside = aside
        self._listed = store.listed(uid)
        self._next = next(self._listed, None)
        self._without_row: list[str] = []

    def size(self, chunk_id: int) -> int | None:
        """Return the bytes of the object of a chunk; None where there is none. Chunks are asked for in their order."""
        size = None
        while self._next is not None and self._next[0] <= chunk_id:
            found, bytes_ = self._next
            if found == chunk_id:
                size = bytes_
            else:
                self._note(found)
            self._next = next(self._listed, None)
        return size

    def go_on(self, most: int) -> bool:
        """Go on behind the last chunk by so many objects at most, and return whether there were some."""
        for number in range(most):
            if self._next is None:
                return number > 0
            self._note(self._next[0])
            self._next = next(self._listed, None)
        return True

    def _note(self, chunk_id: int) -> None:
        if (self.uid, chunk_id) not in self._aside:
            self._without_row.append(layout.key(self.uid, chunk_id))

    def without_row(self) -> list[str]:
        """Return the keys of the objects that are of no chunk, since the last call."""
        found, self._without_row = self._without_row, []
        return found
