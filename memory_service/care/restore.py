"""The restoring of a backup. This file owns the rule that nothing of a backup is served before all of it is
verified."""

from pathlib import Path

import xxhash

from kvbank.files import private
from memory_service.care import manifest, record_check, writing
from memory_service.care.folder import DATABASE, Folder
from memory_service.care.making import Making
from memory_service.care.report import CareError, Findings, Progress, quiet
from memory_service.care.transfer import Transfer
from memory_service.storage.local.records import schema


def restore(
    backup: Path, data: Path, *, skip_damaged: bool = False, migrate: bool = False, progress: Progress = quiet
) -> tuple[str, Findings]:
    """Make the data folder `data` of a backup, with the same chunks and ids, and return its new store id.

    skip_damaged: whether to leave out what is damaged; else a backup with problems is not restored, and the store id is
    empty. migrate: whether to upgrade records of an older schema. Errors: CareError, OSError.
    """
    content = manifest.read(backup)
    _check_schema(backup, data, str(content["schema"]), migrate=migrate)
    if data.resolve().is_relative_to(backup.resolve()):
        raise CareError(f"{data} is inside of {backup}")
    with Making(data, empty_is_free=True) as making:
        partial, findings = making.partial, Findings()
        writing.forget_database(partial)
        _copy_database(backup, partial, str(content["database"]["xxh3_64"]))
        if content["schema"] != schema.revisions()[-1]:
            schema.upgrade(partial / DATABASE)
            writing.put_to_rest(partial)
        with Folder(partial) as copy:
            record_check.check(copy, findings, fast=False)
            if any(problem.kind == "database" for problem in findings.problems):
                raise CareError(f"the database of {backup} is damaged ({findings.problems[0].detail})")
            transfer = Transfer(backup, partial)
            failures = transfer.bring_all(copy, progress)
            for failure in failures:
                failure.tell(findings)
            findings.totals = transfer.totals
            transfer.tidy(copy)
        if findings.problems and not skip_damaged:
            making.discard()
            return "", findings
        writing.leave_out(partial, ((each.bank.bank_id, each.counter, each.chunk_id) for each in failures))
        store_id = writing.renew_identity(partial)
        making.finish()
    return store_id, findings


def _check_schema(backup: Path, data: Path, found: str, *, migrate: bool) -> None:
    known = schema.revisions()
    if found not in known:
        raise CareError(f"{backup} was made by a newer kvbank (schema {found}, this one knows {known[-1]})")
    if found != known[-1] and not migrate:
        command = f"kvbank restore --migrate {backup} {data}"
        raise CareError(f"{backup} has the older schema {found}; restore and upgrade it with: {command}")


def _copy_database(backup: Path, partial: Path, expected: str) -> None:
    hasher = xxhash.xxh3_64()
    with open(backup / DATABASE, "rb") as source, open(partial / DATABASE, "wb", opener=private.opener) as target:
        while part := source.read(1 << 20):
            hasher.update(part)
            target.write(part)
    if hasher.hexdigest() != expected:
        raise CareError(f"the database of {backup} does not match its checksum")
