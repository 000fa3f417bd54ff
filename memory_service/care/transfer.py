"""The transfer of payload files into a folder in the making. This file owns the rule that each file is verified as it
is put in place, whether it is copied, linked from an older backup, or was there from an interrupted run."""

import errno
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvbank.files import durable, private
from memory_service.care import entries, payload_file
from memory_service.care.entries import BankEntry, Entry
from memory_service.care.folder import Folder
from memory_service.care.payload_check import THREADS, orphans
from memory_service.care.report import Findings, Kind, Progress
from memory_service.storage.base import DamagedError
from memory_service.storage.local.files import layout


@dataclass(frozen=True, slots=True)
class Failure:
    """A chunk whose payload could not be brought."""

    bank: BankEntry
    chunk_id: int
    kind: Kind
    detail: str

    @property
    def counter(self) -> str:
        """Return the counter of its bank in which the chunk counts where it is left out: what could not be read may be
        sound, and is not called damaged."""
        return "chunks_deleted" if self.kind == "payload_unreadable" else "chunks_quarantined"

    def tell(self, findings: Findings) -> None:
        """Add the failure to the findings, as a problem."""
        findings.add(self.kind, self.detail, bank=self.bank.title, chunk_id=self.chunk_id)


class Transfer:
    """Brings payload files from the folder `source`, or from `base` where that has the same file, to `target`."""

    def __init__(self, source: Path, target: Path, base: Path | None = None) -> None:
        self._source, self._target, self._base = source, target, base
        self.totals: Counter[str] = Counter()

    def bring_all(self, named: Folder, progress: Progress) -> list[Failure]:
        """Bring every payload that the records of a folder name, and return those that could not be brought. Errors:
        OSError of `target`."""
        banks, failures = entries.banks(named), list[Failure]()
        done, total = 0, sum(bank.chunks for bank in banks)
        self.totals.update(banks=len(banks))
        with ThreadPoolExecutor(THREADS) as threads:
            for bank in banks:
                for page in entries.pages(named, bank, whole=True):
                    outcomes = list(threads.map(self._bring, page))
                    failures += [outcome for outcome in outcomes if isinstance(outcome, Failure)]
                    self.totals.update(outcome for outcome in outcomes if isinstance(outcome, str))
                    self._count(
                        [e for e, outcome in zip(page, outcomes, strict=True) if not isinstance(outcome, Failure)]
                    )
                    done += len(page)
                    progress("payloads", done, max(done, total))
        return failures

    def _count(self, brought: list[Entry]) -> None:
        sizes = [entry.payload.length for entry in brought if entry.payload]
        self.totals.update(chunks=len(brought), payloads=len(sizes), payload_bytes=sum(sizes))

    def _bring(self, entry: Entry) -> str | Failure | None:
        """Bring the file of a chunk, and say how it came to its place; None for a chunk without a file."""
        if entry.flaw:
            return Failure(entry.bank, entry.chunk_id, "record", entry.flaw)
        if entry.payload is None:
            return None
        name = layout.name(entry.bank.uid, entry.chunk_id)
        target = self._target / name
        if _sound(target, entry):
            return "reused"
        target.unlink(missing_ok=True)
        private.make_folder(target.parent)
        if self._base is not None and _sound(self._base / name, entry) and _link(self._base / name, target):
            return "linked"
        source = self._source / name
        try:
            data = _read(source, entry)
        except (DamagedError, OSError) as error:
            return Failure(entry.bank, entry.chunk_id, *payload_file.trouble(source, error))
        # Its name becomes durable with the whole folder.
        durable.replace(target, [data], sync="bytes")
        return "copied"

    def tidy(self, named: Folder) -> None:
        """Remove what an interrupted run brought and the records do not name."""
        for name in orphans(named):
            remove(self._target / name)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path, entry: Entry) -> bytes:
    assert entry.payload is not None
    return payload_file.read(path, entry.bank.uid, entry.chunk_id, entry.payload)


def _sound(path: Path, entry: Entry) -> bool:
    try:
        _read(path, entry)
    except (DamagedError, OSError):
        return False
    return True


def _link(source: Path, target: Path) -> bool:
    """Link a file, durably; return False where the file systems differ, or have had enough links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EMLINK, errno.EPERM):
            return False
        raise
    private.close([target])  # as an earlier version may have made it
    # The older backup may be a copy that a person has just made, and that was not synced.
    durable.sync_file(target)
    return True
