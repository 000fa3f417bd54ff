"""The check of a data folder: records, payloads and indexes are compared with each other. This file owns the rules that
a check changes nothing, and names no problem that a running server would explain."""

from pathlib import Path

from memory_service.care import index_check, manifest, payload_check, record_check
from memory_service.care.folder import DATABASE, Folder
from memory_service.care.report import Findings, Progress, quiet
from memory_service.storage.local.files import access
from memory_service.storage.local.files.folder import MANIFEST


def check(path: Path, *, fast: bool = False, alone: bool = False, progress: Progress = quiet) -> Findings:
    """Find every problem of a data folder, served or not, or of a backup.

    fast: whether to look only at the existence and size of files and at the checksums of snapshots. alone: whether the
    caller holds the folder's lock. Errors: CareError, OSError.
    """
    findings = Findings()
    if (path / MANIFEST).exists():
        _check_manifest(path, findings)
    with Folder(path) as folder:
        _check_access(path, findings)
        progress("records", 0, 1)
        record_check.check(folder, findings, fast=fast)
        progress("records", 1, 1)
        if not any(problem.kind == "database" for problem in findings.problems):
            payload_check.check(folder, findings, fast=fast, alone=alone, progress=progress)
            index_check.check(folder, findings, fast=fast, alone=alone, progress=progress)
    return findings


def _check_access(path: Path, findings: Findings) -> None:
    found = list(access.open_to_others(path))
    if found:
        text = f"other users of this machine may open {len(found)} of its files and folders, first of all {found[0]}"
        findings.add("open_to_others", text)


def _check_manifest(path: Path, findings: Findings) -> None:
    content = manifest.read(path)
    if manifest.digest(path / DATABASE) != content["database"]["xxh3_64"]:
        findings.add("manifest", "the database does not match its checksum", path=DATABASE)
