"""The copy of a data folder while it is served. This file owns the order: first the records of one moment, then the
payloads that they name.

A chunk that is evicted or deleted between the two is left out of the copied records. A chunk that is damaged, or cannot
be read, is left out too, and the findings say so. Where something is forgotten while the copy is made, the copy is
removed: it would have that yet.
"""

from collections.abc import Collection
from pathlib import Path

from memory_service.care import manifest, payload_check, record_check, writing
from memory_service.care.folder import Folder
from memory_service.care.making import Making
from memory_service.care.report import CareError, Findings, Progress, quiet
from memory_service.care.transfer import Failure, Transfer
from memory_service.storage.local.files.folder import MANIFEST


def backup(data: Path, place: Path, *, base: Path | None = None, progress: Progress = quiet) -> Findings:
    """Make the folder `place`, a backup of the data folder `data`; what is a problem there is left out, and in the
    findings.

    base: an older backup, whose files are linked instead of copied where they are the same. A run that was interrupted
    is taken up by the next one. Errors: CareError, OSError.
    """
    if data.exists() and place.resolve().is_relative_to(data.resolve()):
        raise CareError(f"{place} is inside of {data}")
    if base is not None:
        manifest.read(base)
    with Folder(data) as live, Making(place) as making:
        partial, findings = making.partial, Findings()
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
            transfer = Transfer(data, partial, base)
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
            transfer.tidy(copy)
        findings.totals = transfer.totals
        findings.totals["gone_meanwhile"] = len(failures) - len(alive)
        if live.forgettings()[0] - forgotten:
            raise CareError(f"something was forgotten in {data} meanwhile, and the copy has it yet; begin again")
        manifest.write(partial, schema=live.schema, store_id=store_id, findings=findings)
        making.finish()
    return findings


def _check_records(copy: Folder, findings: Findings) -> None:
    record_check.check(copy, findings, fast=False)
    if any(problem.kind == "database" for problem in findings.problems):
        raise CareError(f"the database is damaged ({findings.problems[0].detail}); see: kvbank check")


def _counter(failure: Failure, alive: Collection[int]) -> str:
    """Return the counter in which a chunk counts that is left out. A chunk that went while it was copied counts as
    deleted, whatever took it; one that is a problem counts by the kind of that."""
    return failure.counter if failure.chunk_id in alive else "chunks_deleted"
