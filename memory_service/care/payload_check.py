"""The check of the payloads against the records, both ways, also while a server changes both.

A row never comes back, and its file is there before it and until after it: so a file that was missed or damaged is a
problem only if its row is still there when asked again. A file without a row may be on its way in or out as long as a
server runs; it is a problem when none does.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from memory_service.care import entries, payload_file
from memory_service.care.entries import BankEntry, Entry
from memory_service.care.folder import Folder, names, settled
from memory_service.care.report import CareError, Findings, Kind, Problem, Progress
from memory_service.domain.tenants import DEFAULT_TENANT
from memory_service.storage.base import DamagedError
from memory_service.storage.local import leftovers, quarantine
from memory_service.storage.local.files import layout, marks, staging
from memory_service.storage.local.files.folder import MANIFEST
from memory_service.storage.local.files.layout import SUFFIX
from memory_service.storage.local.quarantine import Note
from memory_service.storage.local.records import bank_rows
from memory_service.storage.local.records.chunk_ids import Reservations

THREADS = 4
Suspect = tuple[Entry, Kind, str]
_BANKS = "SELECT uid, 0 FROM banks UNION SELECT uid, 1 FROM gone_banks"
_IDS = "SELECT chunk_id FROM chunks JOIN banks USING (bank_id) WHERE uid = ?"


def check(folder: Folder, findings: Findings, *, fast: bool, alone: bool, progress: Progress) -> None:
    """Add the problems of the payloads to the findings. fast: whether to look only at the existence and size of files.
    alone: whether the caller holds the folder's lock."""
    banks = entries.banks(folder)
    done, total = 0, sum(bank.chunks for bank in banks)
    with ThreadPoolExecutor(THREADS) as threads:
        for bank in banks:
            for page in entries.pages(folder, bank, whole=not fast):
                files = [entry for entry in page if entry.payload is not None and not entry.flaw]
                unsynced = folder.unsynced([entry.chunk_id for entry in files])
                found = list(threads.map(partial(_problem, folder.path, unsynced, fast=fast), files))
                suspects: list[Suspect] = [(entry, "record", entry.flaw) for entry in page if entry.flaw]
                suspects += [(entry, *problem) for entry, problem in zip(files, found, strict=True) if problem]
                _judge(folder, findings, suspects)
                sizes = [entry.payload.length for entry in page if entry.payload]
                findings.totals.update(payloads=len(sizes), payload_bytes=sum(sizes))
                done += len(page)
                progress("payloads", done, max(done, total))
    for name in settled(folder, orphans, alone=alone):
        findings.add("orphan_file", "no chunk owns it", path=name)
    for title in without_mark(folder):
        findings.add("payload_mark", "the folder of its payloads has no mark; is a disk not mounted?", bank=title)
    _check_aside(folder, findings)


def without_mark(folder: Folder) -> list[str]:
    """Return the titles of the banks whose folders have no mark, where a server has marked all of them."""
    if not (folder.path / Reservations.NAME).exists() or (folder.path / MANIFEST).exists():
        return []
    try:
        with folder.read() as connection:
            banks = [bank for bank in bank_rows.of_all(connection) if bank.kv.layers]
    except (ValueError, KeyError, TypeError):
        return []  # a damaged bank, which is a problem of its own
    place = folder.path / layout.FOLDER
    missing = [bank for bank in banks if not marks.marked(place / bank.uid)]
    # One that is being made has its folder before its row; one that was deleted is no problem.
    with folder.read() as connection:
        return [bank.title for bank in missing if bank_rows.usage(connection, bank.bank_id) is not None]


def _check_aside(folder: Folder, findings: Findings) -> None:
    """Add what is in quarantine, and `repair` has not judged yet."""
    for note in quarantine.pending(folder.path):
        with folder.read() as connection:
            repeated = leftovers.is_repeated(connection, note.bank_uid, note.chunk_id, note.file)
        if not repeated:
            findings.problems.append(problem_of(folder.path, note))


def problem_of(data: Path, note: Note) -> Problem:
    """Say of a chunk in quarantine, which `repair` has not judged yet, why it was set aside."""
    path = str(note.file.relative_to(data))
    return Problem("set_aside", str(note.record.get("why", "")), chunk_id=note.chunk_id, path=path)


def _judge(folder: Folder, findings: Findings, suspects: list[Suspect]) -> None:
    alive = folder.alive([entry.chunk_id for entry, _, _ in suspects])
    for entry, kind, detail in suspects:
        if entry.chunk_id in alive:
            findings.add(kind, detail, bank=entry.bank.title, chunk_id=entry.chunk_id)


def _problem(data: Path, unsynced: Mapping[int, bytes], entry: Entry, *, fast: bool) -> tuple[Kind, str] | None:
    assert entry.payload is not None
    path = data / layout.name(entry.bank.uid, entry.chunk_id)
    try:
        if (file := unsynced.get(entry.chunk_id)) is not None:
            payload_file.verify(file, entry.bank.uid, entry.chunk_id, entry.payload)
        elif not fast:
            payload_file.read(path, entry.bank.uid, entry.chunk_id, entry.payload)
        else:
            payload_file.check_size(path, entry.payload)
    except (DamagedError, OSError) as error:
        return payload_file.trouble(path, error)
    return None


def check_mounted(data: Path, missing: Iterable[BankEntry]) -> None:
    """Refuse to go on where not only payloads of a bank are missing but its folder too: then it is likely the disk.
    Errors: CareError."""
    for bank in missing:
        place = data / layout.FOLDER / bank.uid
        if not (marks.marked(place) or (place.is_dir() and not (data / Reservations.NAME).exists())):
            text = f"the payloads of bank {bank.title} are not there; is a disk not mounted?"
            key = "" if bank.tenant == DEFAULT_TENANT else f" with a key of the tenant {bank.tenant}"
            raise CareError(f"{text} If they are lost, serve the folder and use{key}: kvbank bank rm {bank.name}")


def orphans(folder: Folder) -> Iterator[str]:
    """Yield the names, relative to the folder, of payload files, temporary and staged files and folders that no row
    names.

    Rows are read after the files were listed, so that what is written meanwhile is no orphan. Files whose names are not
    of the service's making are left alone.
    """
    listed = [bank for bank in layout.banks_in(folder.path) if not marks.displaced(bank)]
    with folder.read() as connection:
        gone = {uid: bool(gone) for uid, gone in connection.exec_driver_sql(_BANKS)}
    for bank in listed:
        unowned: Iterable[Path] = ()
        if bank.name not in gone:
            unowned = [path for _, path in layout.files_in(bank)]
            if not unowned and layout.only_ours(bank):
                unowned = [bank]
        elif not gone[bank.name]:  # the server goes on with a deletion when it starts
            unowned = _unowned(folder, bank)
        yield from (str(path.relative_to(folder.path)) for path in unowned)
    yield from (f"{staging.FOLDER}/{name}" for name in names(folder.path / staging.FOLDER))


def _unowned(folder: Folder, bank: Path) -> Iterator[Path]:
    files = list(layout.files_in(bank))
    with folder.read() as connection:
        ids = set(connection.exec_driver_sql(_IDS, (bank.name,)).scalars())
    for chunk_id, path in files:
        place = folder.path / layout.name(bank.name, chunk_id)
        if path.suffix != SUFFIX or path != place or chunk_id not in ids:
            yield path
