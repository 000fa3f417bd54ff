"""The check of a backup in a bucket: its records, and the payloads that they name."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from memory_service.care import kept, record_check
from memory_service.care.bucket.payloads import ObjectsMade
from memory_service.care.entries import Entry
from memory_service.care.folder import Folder
from memory_service.care.kept import Kept
from memory_service.care.report import Findings, Kind, Progress, quiet
from memory_service.care.transfer import Destination, Origin, Transfer
from memory_service.storage.base import DamagedError
from memory_service.storage.s3.opening import open_bucket


def check(place: str, *, fast: bool = False, progress: Progress = quiet) -> Findings:
    """Find every problem of the backup at s3://BUCKET/PREFIX. fast: whether to look only at the existence and size of
    payloads, as the list of the bucket tells them. Errors: CareError, StartError, OSError."""
    with kept.opened(place) as backup:
        if not fast:
            return _check(backup, backup.payloads, _Nowhere(), progress)
        bucket = open_bucket(place)
        try:
            return _check(backup, _Unread(backup.payloads), ObjectsMade(bucket), progress)
        finally:
            bucket.close()


def _check(backup: Kept, payloads: Origin, looked_at: Destination, progress: Progress) -> Findings:
    findings = Findings()
    with TemporaryDirectory(prefix="kvbank-check-") as place:
        backup.fetch(Path(place))
        with Folder(Path(place), upgrade=f"kvbank restore --migrate {backup.title} DATA") as copy:
            record_check.check(copy, findings, fast=False)
            if any(problem.kind == "database" for problem in findings.problems):
                return findings
            transfer = Transfer(payloads, looked_at)
            for failure in transfer.bring_all(copy, progress):
                failure.tell(findings)
    findings.totals.update({name: transfer.totals[name] for name in ("payloads", "payload_bytes")})
    return findings


class _Nowhere:
    """Implements `memory_service.care.transfer.Destination` for payloads that are only read."""

    threads = 16

    def expect(self, page: Sequence[Entry]) -> None:
        """Do nothing, since each payload is read."""

    def there(self, entry: Entry) -> str:
        """Return "", so that each payload is read."""
        return ""

    def put(self, entry: Entry, data: bytes) -> None:
        """Drop what was read."""

    def tidy(self, named: Folder) -> None:
        """Do nothing, since nothing was brought."""


class _Unread:
    """Implements `memory_service.care.transfer.Origin` for payloads that the list of the bucket should have."""

    def __init__(self, payloads: Origin) -> None:
        """Read none of these payloads."""
        self._payloads = payloads

    def read(self, entry: Entry) -> bytes:
        """Refuse what the list does not have. Errors: FileNotFoundError."""
        raise FileNotFoundError

    def trouble(self, entry: Entry, error: DamagedError | OSError) -> tuple[Kind, str]:
        """Say that the list does not have it."""
        kind, _ = self._payloads.trouble(entry, error)
        return kind, "its object is missing, or has another size"
