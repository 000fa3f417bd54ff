"""The transfer of payloads from where they are to a backup, or out of one. This file owns the rule that each payload is
verified on its way, or where it is already."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from memory_service.care import entries
from memory_service.care.entries import BankEntry, Entry
from memory_service.care.folder import Folder
from memory_service.care.report import Findings, Kind, Progress
from memory_service.storage.base import DamagedError


class Origin(Protocol):
    """A place that payloads are read from, by several threads."""

    def read(self, entry: Entry) -> bytes:
        """Return the payload of a chunk as it is kept, verified. Errors: DamagedError, OSError."""

    def trouble(self, entry: Entry, error: DamagedError | OSError) -> tuple[Kind, str]:
        """Say what is wrong with a payload that could not be read. Errors: OSError where that does not concern this
        payload alone, mostly the same."""


class Destination(Protocol):
    """A place that payloads are brought to, by so many threads."""

    threads: int

    def expect(self, page: Sequence[Entry]) -> None:
        """Learn what is about to be brought; it comes in the order of bank uids, and in a bank in that of chunk ids."""

    def there(self, entry: Entry) -> str:
        """Say how the payload of a chunk came to its place where it is there by now, "" where it is to be put."""

    def put(self, entry: Entry, data: bytes) -> None:
        """Put a payload, verified, in its place."""

    def tidy(self, named: Folder) -> None:
        """Remove what an interrupted run brought and the records of a folder do not name."""


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
    """Brings payloads from `origin` to `destination`."""

    def __init__(self, origin: Origin, destination: Destination) -> None:
        self._origin, self._destination = origin, destination
        self.totals: Counter[str] = Counter()

    def bring_all(self, named: Folder, progress: Progress) -> list[Failure]:
        """Bring every payload that the records of a folder name, and return those that could not be brought. Errors:
        OSError of the destination, or of an origin that cannot be reached."""
        banks, failures = sorted(entries.banks(named), key=lambda bank: bank.uid), list[Failure]()
        done, total = 0, sum(bank.chunks for bank in banks)
        self.totals.update(banks=len(banks))
        with ThreadPoolExecutor(self._destination.threads) as threads:
            for bank in banks:
                for page in entries.pages(named, bank, whole=True):
                    self._destination.expect([entry for entry in page if entry.payload and not entry.flaw])
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
        """Bring the payload of a chunk, and say how it came to its place; None for a chunk without one."""
        if entry.flaw:
            return Failure(entry.bank, entry.chunk_id, "record", entry.flaw)
        if entry.payload is None:
            return None
        if how := self._destination.there(entry):
            return how
        try:
            data = self._origin.read(entry)
        except (DamagedError, OSError) as error:
            return Failure(entry.bank, entry.chunk_id, *self._origin.trouble(entry, error))
        self._destination.put(entry, data)
        return "copied"
