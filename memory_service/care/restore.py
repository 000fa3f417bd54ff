"""The restoring of a backup. This file owns the rule that nothing of a backup is served before all of it is
verified."""

from pathlib import Path

from memory_service.care import kept, record_check, writing
from memory_service.care.folder import DATABASE, Folder
from memory_service.care.kept import Kept
from memory_service.care.making import Making
from memory_service.care.payload_files import FilesMade
from memory_service.care.report import CareError, Findings, Progress, quiet
from memory_service.care.transfer import Transfer
from memory_service.storage.local.records import schema


def restore(
    backup: str | Path, data: Path, *, skip_damaged: bool = False, migrate: bool = False, progress: Progress = quiet
) -> tuple[str, Findings]:
    """Make the data folder `data` of a backup, a folder or s3://BUCKET/PREFIX, with the same chunks and ids, and return
    its new store id.

    skip_damaged: whether to leave out what is damaged; else a backup with problems is not restored, and the store id is
    empty. migrate: whether to upgrade records of an older schema. A run that was interrupted is taken up by the next
    one. Errors: CareError, StartError, OSError.
    """
    with kept.opened(backup) as source:
        _check_schema(source, data, migrate=migrate)
        if not kept.in_bucket(backup) and data.resolve().is_relative_to(Path(backup).resolve()):
            raise CareError(f"{data} is inside of {backup}")
        with Making(data, empty_is_free=True) as making:
            return _restored(source, making, skip_damaged, progress)


def _restored(source: Kept, making: Making, skip_damaged: bool, progress: Progress) -> tuple[str, Findings]:
    """Fill a folder in the making, and finish it; return its store id, or "" where nothing is restored."""
    partial, findings = making.partial, Findings()
    writing.forget_database(partial)
    progress("records", 0, 1)
    source.fetch(partial)
    if source.content["schema"] != schema.revisions()[-1]:
        schema.upgrade(partial / DATABASE)
        writing.put_to_rest(partial)
    with Folder(partial) as copy:
        record_check.check(copy, findings, fast=False)
        if any(problem.kind == "database" for problem in findings.problems):
            raise CareError(f"the database of {source.title} is damaged ({findings.problems[0].detail})")
        progress("records", 1, 1)
        files = FilesMade(partial)
        transfer = Transfer(source.payloads, files)
        failures = transfer.bring_all(copy, progress)
        for failure in failures:
            failure.tell(findings)
        findings.totals = transfer.totals
        files.tidy(copy)
    if findings.problems and not skip_damaged:
        making.discard()
        return "", findings
    writing.leave_out(partial, ((each.bank.bank_id, each.counter, each.chunk_id) for each in failures))
    store_id = writing.renew_identity(partial)
    making.finish()
    return store_id, findings


def _check_schema(backup: Kept, data: Path, *, migrate: bool) -> None:
    known, found = schema.revisions(), str(backup.content["schema"])
    if found not in known:
        raise CareError(f"{backup.title} was made by a newer kvbank (schema {found}, this one knows {known[-1]})")
    if found != known[-1] and not migrate:
        command = f"kvbank restore --migrate {backup.title} {data}"
        raise CareError(f"{backup.title} has the older schema {found}; restore and upgrade it with: {command}")
