"""The copy of a data folder while it is served. This file owns the order: first the records of one moment, then the
payloads that they name.

A chunk that is evicted or deleted between the two is left out of the copied records. A chunk that is damaged, or cannot
be read, is left out too, and the findings say so. Where something is forgotten while the copy is made, the copy is
removed: it would have that yet.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from memory_service.care import manifest, payload_check, record_check, writing
from memory_service.care.folder import Folder
from memory_service.care.kept import in_bucket
from memory_service.care.making import Making
from memory_service.care.payload_files import FilesMade, FilesRead
from memory_service.care.report import CareError, Findings, Progress, quiet
from memory_service.care.target import Target
from memory_service.care.transfer import Failure, Transfer
from memory_service.storage.local.files.folder import MANIFEST
from memory_service.storage.opening import extras_named


def backup(data: Path, place: str | Path, *, base: Path | None = None, progress: Progress = quiet) -> Findings:
    """Make `place`, a folder or s3://BUCKET/PREFIX, a backup of the data folder `data`; what is a problem there is left
    out, and in the findings.

    A run that was interrupted is taken up by the next one. A backup in a bucket is brought up to date by the next one.
    base: an older backup in a folder, whose files are linked instead of copied where they are the same. Errors:
    CareError, StartError, OSError.
    """
    if not in_bucket(place) and data.exists() and Path(place).resolve().is_relative_to(data.resolve()):
        raise CareError(f"{place} is inside of {data}")
    if base is not None:
        if in_bucket(place):
            raise CareError("--base is for backups in folders; one in a bucket takes what is there of the one before")
        manifest.read(base)
    with Folder(data) as live, _made(place, base, live.store_id()) as made:
        return _filled(live, made, progress)


@contextmanager
def _made(place: str | Path, base: Path | None, store_id: str) -> Iterator[Target]:
    """Begin a backup, or take one up. Errors: CareError, StartError, OSError."""
    if not in_bucket(place):
        with Making(Path(place)) as making:
            yield Target(making.partial, FilesMade(making.partial, base), making.finish)
        return
    with extras_named():
        from memory_service.care.bucket import making as in_a_bucket
    with in_a_bucket.made(str(place), store_id) as target:
        yield target


def _filled(live: Folder, made: Target, progress: Progress) -> Findings:
    """Fill a backup with what a folder has now, and finish it."""
    data, partial, findings = live.path, made.partial, Findings()
    forgotten, pending = live.forgettings()
    if pending:
        raise CareError(f"something is being forgotten in {data}; begin again when that is done")
    (partial / MANIFEST).unlink(missing_ok=True)
    writing.forget_database(partial)
    progress("records", 0, 1)
    live.copy_database(partial)
    writing.put_to_rest(partial)
    with Folder(partial) as copy:
        _check_records(copy, findings)
        progress("records", 1, 1)
        transfer = Transfer(FilesRead(data, live), made.payloads)
        failures = transfer.bring_all(copy, progress)
        store_id = copy.store_id()
    alive = live.alive([failure.chunk_id for failure in failures])
    lost = (failure for failure in failures if failure.chunk_id in alive and failure.kind == "payload_missing")
    payload_check.check_mounted(data, {failure.bank for failure in lost})
    for failure in failures:
        if failure.chunk_id in alive:
            failure.tell(findings)
    left_out = ((each.bank.bank_id, _counter(each, alive), each.chunk_id) for each in failures)
    writing.leave_out(partial, left_out)
    writing.put_to_rest(partial)
    with Folder(partial) as copy:
        made.payloads.tidy(copy)
    findings.totals = transfer.totals
    findings.totals["gone_meanwhile"] = len(failures) - len(alive)
    if live.forgettings()[0] - forgotten:
        raise CareError(f"something was forgotten in {data} meanwhile, and the copy has it yet; begin again")
    manifest.write(partial, schema=live.schema, store_id=store_id, findings=findings)
    made.finish()
    return findings


def _check_records(copy: Folder, findings: Findings) -> None:
    record_check.check(copy, findings, fast=False)
    if any(problem.kind == "database" for problem in findings.problems):
        raise CareError(f"the database is damaged ({findings.problems[0].detail}); see: kvbank check")


def _counter(failure: Failure, alive: Collection[int]) -> str:
    """Return the counter in which a chunk counts that is left out. A chunk that went while it was copied counts as
    deleted, whatever took it; one that is a problem counts by the kind of that."""
    return failure.counter if failure.chunk_id in alive else "chunks_deleted"
