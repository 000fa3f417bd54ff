"""A copy of a store. This file owns the order: the rows of a span are written when their objects are durable and read
back, so that the rows which are there say how far a copy has come; a run that was killed is made again, and passes over
what is equal. The banks come last, because their usage counts what was written."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import xxhash

from memory_service.care import payload_file
from memory_service.care.copying import flaws, tables
from memory_service.care.copying.ends import Exported, Imported, Object
from memory_service.care.copying.tables import Key, Row, Table
from memory_service.care.report import CareError, Findings, Kind, Progress, quiet
from memory_service.domain.model import Bank, Payload
from memory_service.storage.base import DamagedError

# Objects that are on their way at once, most of which wait for a bucket or a disk, and the bytes that they have
# together, unless one has more.
_THREADS, _ON_THE_WAY = 16, 128 * 1024 * 1024


def copy(
    source: Exported, target: Imported, *, skip_damaged: bool = False, progress: Progress = quiet
) -> tuple[bool, Findings]:
    """Copy a store, and return whether the copy is whole, with what was found on the way.

    skip_damaged: whether to leave out what is damaged; else the copy stays unfinished where something is. Errors:
    CareError, OSError, those of the databases; then the copy is unfinished too, and the next call goes on.
    """
    known, pending = source.forgettings()
    if pending:
        raise CareError(f"something is being forgotten in {source.title}; begin again when that is done")
    with ThreadPoolExecutor(_THREADS) as threads:
        copying = _Copying(source, target, threads, progress)
        copying.run()
    findings = copying.findings
    if findings.problems and not skip_damaged:
        return False, findings
    if source.forgettings()[0] - known:
        raise CareError(f"something was forgotten in {source.title} meanwhile, and the copy has it yet; begin again")
    target.finish(source.numbers())
    return True, findings


class _Judged(NamedTuple):
    """What came of a chunk: its payload, whether that was copied now, and why the chunk cannot be written, if so."""

    payload: Payload | None = None
    copied: bool = False
    damage: tuple[Kind, str] | None = None


# Two keys, the rows between them at the source, and those at the target.
_Span = tuple[tuple[Key, Key], list[Row], list[Row]]
# What comes of the chunks of a span, in parts that are on their way one after the other.
_Begun = Iterator[list[Future[_Judged]]]


@dataclass
class _Kept:
    """What was written of a bank: chunks, tokens, bytes; and what was left out, by the counter that says why."""

    usage: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


class _Copying:
    """One run of a copy."""

    def __init__(self, source: Exported, target: Imported, threads: ThreadPoolExecutor, progress: Progress) -> None:
        self._source, self._target = source, target
        self._threads, self._progress = threads, progress
        self.findings = Findings()
        self._banks = {bank.bank_id: bank for bank in self._read_banks()}
        self._kept: dict[int, _Kept] = {bank_id: _Kept() for bank_id in self._banks}

    def _read_banks(self) -> Iterator[Bank]:
        for row in self._source.rows(tables.BANKS):
            try:
                bank = tables.bank_of(row)
            except (ValueError, KeyError, TypeError) as error:
                raise CareError(f"a bank of {self._source.title} cannot be read; see: kvbank check") from error
            self._target.check(bank)
            yield bank

    def run(self) -> None:
        """Make the rows of all tables equal, with their objects."""
        for table in tables.ALL:
            self._bring(table)
        self.findings.totals["banks"] = len(self._banks)

    def _bring(self, table: Table) -> None:
        # What an earlier run has written, and is another row now, may have the name of a row that is to come. Of chunks
        # nothing has a name but the keys, which are written over.
        if table is not tables.CHUNKS and self._target.count(table):
            for _, page, had in self._spans(table):
                if gone := [row for row in had if row not in set(page)]:
                    self._target.replace(table, gone, [])
        done, total = 0, self._source.count(table)
        for span, page, had, wanted in self._wanted(table):
            if wanted != had:
                self._replace(table, span, had, wanted)
            done += len(page)
            self.findings.totals[table.name] += len(wanted)
            self._progress(table.name.replace("_", " "), done, max(done, total))

    def _wanted(self, table: Table) -> Iterator[tuple[tuple[Key, Key], list[Row], list[Row], list[Row]]]:
        """Yield spans as `_spans` does, with those of the rows that can be written, whose objects are at the target.

        The payloads of the next span are on their way when one is yielded: its rows are written meanwhile.
        """
        spans = self._spans(table)
        following = next(spans, None)
        begun = self._begin(table, following)
        while following is not None:
            span, page, had = following
            wanted = self._with_objects(table, page, had, begun)
            following = next(spans, None)
            begun = self._begin(table, following)
            yield span, page, had, wanted

    def _spans(self, table: Table) -> Iterator[_Span]:
        """Yield spans of keys, which are the whole table together, with the rows that both stores have there."""
        after: Key = ()
        while True:
            page = list(self._source.rows(table, after, most=table.page))
            upto = table.key(page[-1]) if len(page) == table.page else ()
            yield (after, upto), page, list(self._target.rows(table, after, upto))
            if not upto:
                return
            after = upto

    def _replace(self, table: Table, span: tuple[Key, Key], had: Sequence[Row], wanted: Sequence[Row]) -> None:
        self._target.replace(table, had, wanted)
        if self._target.rows(table, *span) != wanted:
            raise CareError(f"rows of {table.name} at {self._target.title} are not those that were written")
        left = {what for row in wanted if (what := self._object(table, row))}
        gone = {what for row in had if (what := self._object(table, row))} - left
        self._target.delete(sorted(gone))

    def _object(self, table: Table, row: Row) -> Object | None:
        """Name the object of a row; None where it has none."""
        named = table.named(row)
        if table is tables.CHUNKS and named["payload"] is not None and named["bank_id"] in self._banks:
            return Object("payload", self._banks[named["bank_id"]].uid, named["chunk_id"])
        if table is tables.WINDOWS:
            return Object("window", named["session_id"], checksum=named["checksum"])
        if table is tables.QUARANTINE:
            return Object("aside", named["uid"], named["chunk_id"])
        return None

    def _with_objects(self, table: Table, page: Sequence[Row], had: Sequence[Row], begun: _Begun) -> list[Row]:
        """Return those of the rows that can be written, when their objects are at the target. begun: what `_begin` has
        returned of them."""
        if table is tables.CHUNKS:
            return self._with_payloads(page, begun)
        if table is tables.WINDOWS:
            there = set(had)
            return [row for row in page if row in there or self._bring_window(table.named(row))]
        if table is tables.QUARANTINE:
            for row in set(page) - set(had):
                self._bring_aside(table.named(row))
            return list(page)
        if table is tables.BANKS:
            return [self._counted(row) for row in page]
        kind, flaw_of = flaws.BY_TABLE.get(table.name, (None, None))
        if kind is None or flaw_of is None:
            return list(page)
        sound = []
        for row in page:
            if flaw := flaw_of(table.named(row)):
                self.findings.add(kind, flaw)
            else:
                sound.append(row)
        return sound

    # Chunks

    def _begin(self, table: Table, span: _Span | None) -> _Begun:
        """Send the payloads of a span on their way, as many as may be at once, and return what comes of its chunks; the
        others are sent when those have been looked at."""
        if table is not tables.CHUNKS or span is None:
            return iter(())
        _, page, had = span
        there = {(row[_CHUNK_ID], row[_PAYLOAD]) for row in had}
        parts = (
            [self._threads.submit(self._judge, row, (row[_CHUNK_ID], row[_PAYLOAD]) in there) for row in some]
            for some in _apart(self._of_banks(page))
        )
        return chain([next(parts)], parts)

    def _of_banks(self, page: Sequence[Row]) -> list[Row]:
        """Leave out rows of no bank, which cannot be reached."""
        return [row for row in page if row[_BANK_ID] in self._banks]

    def _with_payloads(self, page: Sequence[Row], begun: _Begun) -> list[Row]:
        rows = self._of_banks(page)
        judged = [each.result() for part in begun for each in part]
        suspects = [row[_CHUNK_ID] for row, each in zip(rows, judged, strict=True) if each.damage]
        alive = self._source.alive(suspects) if suspects else set()
        wanted = []
        for row, each in zip(rows, judged, strict=True):
            if each.damage is None:
                self._keep(tables.CHUNKS.named(row), each)
                wanted.append(row)
            elif row[_CHUNK_ID] in alive:
                self._kept[row[_BANK_ID]].left_out["chunks_quarantined"] += 1
                self.findings.add(*each.damage, bank=self._banks[row[_BANK_ID]].title, chunk_id=row[_CHUNK_ID])
            else:
                self._kept[row[_BANK_ID]].left_out["chunks_deleted"] += 1
                self.findings.totals["gone_meanwhile"] += 1
        return wanted

    def _keep(self, row: Mapping[str, Any], judged: _Judged) -> None:
        usage = self._kept[row["bank_id"]].usage
        usage.update(chunks=1, tokens=row["stored_length"], bytes=row["size"])
        if judged.payload is not None:
            how = "copied" if judged.copied else "reused"
            self.findings.totals.update({"payloads": 1, "payload_bytes": judged.payload.length, how: 1})

    def _judge(self, row: Row, there: bool) -> _Judged:
        """Check a chunk, and bring its payload unless that is there."""
        bank = self._banks[row[_BANK_ID]]
        payload, flaw = flaws.of_chunk(tables.CHUNKS.named(row), bank)
        if flaw:
            return _Judged(damage=("record", flaw))
        if payload is None or there:
            return _Judged(payload)
        try:
            self._bring_payload(Object("payload", bank.uid, row[_CHUNK_ID]), payload)
        except FileNotFoundError:
            return _Judged(damage=("payload_missing", "its payload is missing"))
        except DamagedError as error:
            return _Judged(damage=("payload_damaged", str(error)))
        return _Judged(payload, copied=True)

    def _bring_payload(self, what: Object, payload: Payload) -> None:
        data = self._source.read(what)
        payload_file.verify(data, what.owner, what.chunk_id, payload)
        self._put(what, data)

    def _put(self, what: Object, data: bytes) -> None:
        self._target.put(what, data)
        if self._target.read(what) != data:
            raise CareError(f"a {what.kind} at {self._target.title} is not as it was written; is its disk sound?")

    # Windows and banks

    def _bring_window(self, row: Mapping[str, Any]) -> bool:
        """Bring the window of a session, and return whether it is whole: it is a cache."""
        what = Object("window", row["session_id"], checksum=row["checksum"])
        try:
            data = self._source.read(what)
        except (FileNotFoundError, DamagedError):
            return False
        if len(data) != row["size"] or f"{xxhash.xxh3_64_intdigest(data):016x}" != row["checksum"]:
            return False
        self._put(what, data)
        return True

    def _bring_aside(self, row: Mapping[str, Any]) -> None:
        """Bring what there is of the payload of a chunk that is out of service."""
        what = Object("aside", row["uid"], row["chunk_id"])
        with suppress(FileNotFoundError, DamagedError):
            self._put(what, self._source.read(what))

    def _counted(self, row: Row) -> Row:
        """Return the row of a bank, in whose usage chunks that were left out are not."""
        named = tables.BANKS.named(row)
        kept = self._kept[named["bank_id"]]
        if kept.left_out:
            named |= {name: kept.usage[name] for name in ("chunks", "tokens", "bytes")}
            named |= {name: named[name] + count for name, count in kept.left_out.items()}
        return tuple(named.values())


def _apart(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Yield rows of chunks in parts, none of whose payloads are more bytes than are on their way at once."""
    begin = total = 0
    for place, row in enumerate(rows):
        said = row[_PAYLOAD_BYTES]
        size = max(said, 0) if isinstance(said, int) else 0  # a damaged row is not judged yet
        total += size
        if total > _ON_THE_WAY and place > begin:
            yield rows[begin:place]
            begin, total = place, size
    yield rows[begin:]


_BANK_ID, _CHUNK_ID, _PAYLOAD, _PAYLOAD_BYTES = map(
    tables.CHUNKS.columns.index, ("bank_id", "chunk_id", "payload", "payload_bytes")
)
