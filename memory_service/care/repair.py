"""The repair of a folder that no server owns. This file owns the rules that nothing damaged is thrown away (record and
file go to quarantine before the row is removed), and that nothing is given up which may be sound (a file that cannot be
read is left). Every step can be repeated, so that a kill between two of them does no harm."""

import filecmp
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import DatabaseError

from memory_service.care import entries, give_back, payload_check, record_check, writing
from memory_service.care.check import check
from memory_service.care.folder import Folder
from memory_service.care.give_back import Whole
from memory_service.care.payload_files import remove
from memory_service.care.report import CareError, Findings, Kind, Problem, Progress, quiet
from memory_service.storage.local import leftovers, mounts, quarantine
from memory_service.storage.local.files import access, layout
from memory_service.storage.local.files.bank_folders import Known
from memory_service.storage.local.files.folder import MANIFEST, DataFolder
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.leftovers import Unowned
from memory_service.storage.local.quarantine import Note
from memory_service.storage.local.records import bank_rows, chunk_rows

_OWNERS = "SELECT chunk_id, bank_id FROM chunks WHERE chunk_id IN (SELECT value FROM json_each(?))"
Deed = Literal["rebuilt", "corrected", "removed", "quarantined", "set aside", "given back"]
_LEFT: tuple[Kind, ...] = ("bank", "database", "payload_unreadable", "session", "turn")
_BATCH = 500
_EXPIRY = f"""
    UPDATE chunks SET expires = CASE
        WHEN ttl = 0 THEN NULL WHEN renew THEN max(created, coalesce(last_retrieved, 0)) + ttl ELSE created + ttl END
    WHERE {record_check.WRONG_EXPIRY}
"""
_USAGE = """
    UPDATE banks SET (chunks, tokens, bytes) = (
        SELECT count(*), coalesce(sum(stored_length), 0), coalesce(sum(size), 0)
        FROM chunks WHERE chunks.bank_id = banks.bank_id)
"""
_TURNS = """
    UPDATE branches SET bytes = (SELECT coalesce(sum(size), 0) FROM turns WHERE turns.branch = branches.branch)
"""
_WRITTEN = """
    UPDATE banks SET chunks_written = chunks + chunks_evicted + chunks_deleted + chunks_quarantined + chunks_expired
"""


@dataclass
class Repaired:
    """What was done (or would be) about which problem, and which remain."""

    done: list[tuple[Deed, Problem]] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)


def repair(data: Path, *, dry_run: bool = False, progress: Progress = quiet) -> Repaired:
    """Mend what `check` finds. Errors: CareError, StartError while another process owns the folder, OSError."""
    if (data / MANIFEST).exists():
        raise CareError(f"{data} is a backup, which is not mended; kvbank restore --skip-damaged leaves damage out")
    Folder(data).close()
    lock = DataFolder(data)
    try:
        return _Repair(data, dry_run, progress).run()
    finally:
        lock.release()


class _Repair:
    """One run of a repair, step by step."""

    def __init__(self, data: Path, dry_run: bool, progress: Progress) -> None:
        self._data, self._dry_run, self._progress = data, dry_run, progress
        self._repaired = Repaired()

    def run(self) -> Repaired:
        problems = self._check()
        if any(problem.kind == "database" for problem in problems):
            self._do("rebuilt", self._rebuild, problems, "database")
            if self._dry_run:
                return self._repaired  # a check of the rest means nothing before that
            problems = self._check()
        self._check_disk(problems)
        # Keys before rows are removed, whose keys are spent then; usage after them.
        self._do("corrected", self._execute(record_check.RESTORE_KEYS), problems, "key_missing")
        self._do("removed", self._execute(record_check.FREE_KEYS), problems, "key")
        tenants = self._execute(record_check.RESTORE_TENANTS, record_check.RESTORE_QUOTAS)
        self._do("corrected", tenants, problems, "tenant")
        self._do("removed", self._remove_orphan_rows, problems, "orphan_row")
        self._do("quarantined", self._quarantine, problems, "record", "payload_missing", "payload_damaged")
        self._do("corrected", self._execute(_EXPIRY), problems, "expiry")
        self._do("corrected", self._execute(record_check.RESERVE), problems, "id")
        self._do("corrected", self._execute(_USAGE, _WRITTEN, _TURNS), problems, "usage")
        self._do("corrected", self._close_to_others, problems, "open_to_others")
        self._do("corrected", self._mark, problems, "payload_mark")
        self._do("removed", self._remove_files, problems, "orphan_index", "index_damaged")
        self._give_back()
        self._tidy([problem for problem in problems if problem.kind == "orphan_file"])
        self._repaired.left += [problem for problem in problems if problem.kind in _LEFT]
        if not self._dry_run:
            self._look_again()
        return self._repaired

    def _check(self) -> list[Problem]:
        return check(self._data, alone=True, progress=self._progress).problems

    def _check_disk(self, problems: list[Problem]) -> None:
        """Refuse to go on where the disk of the payloads is not mounted. Errors: CareError."""
        missing = self._by_bank([problem for problem in problems if problem.kind == "payload_missing"])
        with Folder(self._data) as folder:
            banks = [bank for bank in entries.banks(folder) if bank.bank_id in missing]
        payload_check.check_mounted(self._data, banks)

    def _do(
        self, deed: Deed, action: Callable[[Sequence[Problem]], None], problems: list[Problem], *kinds: Kind
    ) -> None:
        chosen = [problem for problem in problems if problem.kind in kinds]
        if chosen and not self._dry_run:
            action(chosen)
        self._repaired.done += [(deed, problem) for problem in chosen]

    def _look_again(self) -> None:
        """Find what is left, by another check of the records; that of the payloads would find nothing new."""
        findings = Findings()
        with Folder(self._data) as folder:
            record_check.check(folder, findings, fast=True)
        unreadable = [problem for problem in self._repaired.left if problem.kind == "payload_unreadable"]
        self._repaired.left = [*findings.problems, *unreadable]

    def _rebuild(self, problems: Sequence[Problem]) -> None:
        """Rebuild the indexes of the database. Errors: CareError where it is damaged otherwise, which cannot be
        mended."""
        findings = Findings()
        try:
            self._execute("REINDEX")([])
            with Folder(self._data) as folder:
                record_check.check(folder, findings, fast=False)
        except DatabaseError as error:
            findings.add("database", str(error.orig))
        for problem in findings.problems:
            if problem.kind != "database":
                continue
            text = f"the database of {self._data} is damaged beyond repair ({problem.detail})"
            raise CareError(f"{text}; put a backup in place: kvbank restore BACKUP DATA")

    def _execute(self, *statements: str) -> Callable[[Sequence[Problem]], None]:
        def execute(_problems: Sequence[Problem]) -> None:
            with writing.transaction(self._data) as connection:
                for statement in statements:
                    connection.exec_driver_sql(statement)

        return execute

    def _remove_orphan_rows(self, _problems: Sequence[Problem]) -> None:
        with writing.transaction(self._data) as connection:
            connection.exec_driver_sql(record_check.DISOWN_KEYS)
            for table, condition in record_check.ORPHANS.items():
                connection.exec_driver_sql(f"DELETE FROM {table} WHERE {condition}")

    def _quarantine(self, problems: Sequence[Problem]) -> None:
        with Folder(self._data) as folder:
            uids = {bank.bank_id: bank.uid for bank in entries.banks(folder)}
        for bank_id, why in self._by_bank(problems).items():
            ids = sorted(why)
            for begin in range(0, len(ids), _BATCH):
                batch = {chunk_id: why[chunk_id] for chunk_id in ids[begin : begin + _BATCH]}
                with writing.transaction(self._data) as connection:
                    quarantine.set_aside(connection, self._data, uids[bank_id], batch)
                    writing.remove(connection, bank_id, list(batch), "chunks_quarantined")

    def _by_bank(self, problems: Sequence[Problem]) -> dict[int, dict[int, str]]:
        """Return what is wrong with chunks that are in the records, by bank id and chunk id. The records say whose a
        chunk is: banks of several tenants may have one name."""
        why = {problem.chunk_id: problem.detail for problem in problems if problem.chunk_id is not None}
        found: dict[int, dict[int, str]] = defaultdict(dict)
        with Folder(self._data) as folder, folder.read() as connection:
            for chunk_id, bank_id in connection.exec_driver_sql(_OWNERS, (json.dumps(list(why)),)):
                found[bank_id][chunk_id] = why[chunk_id]
        return found

    def _close_to_others(self, _problems: Sequence[Problem]) -> None:
        access.tighten(self._data)

    def _remove_files(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            remove(self._data / problem.path)

    def _mark(self, _problems: Sequence[Problem]) -> None:
        """Mark the folders of banks whose files are there, or that never had any."""
        files = LocalObjects(self._data, durable=True)
        with Folder(self._data) as folder, folder.read() as connection:
            missing = mounts.mark(files, connection, bank_rows.of_all(connection), new_here=True)
            for bank in missing if files.folders.mounted() else ():
                if not chunk_rows.some_payload_ids(connection, bank.bank_id, 1):
                    files.folders.mark(bank.uid)

    def _tidy(self, problems: Sequence[Problem]) -> None:
        """Remove files that no chunk owns where the records explain them, and give back or set aside the others."""
        with Folder(self._data) as folder:
            for problem in problems:
                file = layout.unowned_file(self._data / problem.path)
                if file is None or self._is_copy(*file) or self._is_explained(folder, Unowned(*file)):
                    self._repaired.done.append(("removed", problem))
                    if not self._dry_run:
                        remove(self._data / problem.path)
                else:
                    self._judge(folder, quarantine.note_of(self._data, *file), problem)
            if problems and not self._dry_run:
                self._remove_empty(folder)

    def _is_explained(self, folder: Folder, file: Unowned) -> bool:
        with folder.read() as connection:
            return bool(leftovers.explanations(connection, self._data, [file]))

    def _is_copy(self, bank_uid: str, chunk_id: int, path: Path) -> bool:
        """Tell whether a file lies in a wrong folder, and the same bytes in the right one."""
        right = self._data / layout.name(bank_uid, chunk_id)
        return right != path and right.is_file() and filecmp.cmp(right, path, shallow=False)

    def _remove_empty(self, folder: Folder) -> None:
        def known() -> Known:
            with folder.read() as connection:
                return chunk_rows.payload_ids(connection)

        LocalObjects(self._data, durable=True).folders.remove_empty(known)

    def _give_back(self) -> None:
        """Give back what a start has set aside, as far as it is whole."""
        with Folder(self._data) as folder:
            for note in list(quarantine.pending(self._data)):
                self._judge(folder, note, payload_check.problem_of(self._data, note))

    def _judge(self, folder: Folder, note: Note, problem: Problem) -> None:
        try:
            with folder.read() as connection:
                verdict = give_back.judge(connection, note)
        except OSError as error:
            text = f"its file cannot be read: {error.strerror}"
            self._repaired.left.append(Problem("payload_unreadable", text, path=problem.path))
            return
        if verdict is None:
            deed: Deed = "removed"
        elif isinstance(verdict, str):
            deed, problem = "set aside", replace(problem, detail=f"it stays in quarantine: {verdict}")
        else:
            deed = "given back"
        self._repaired.done.append((deed, problem))
        if not self._dry_run:
            if problem.kind == "orphan_file":
                note = quarantine.set_file_aside(self._data, *note[:2], note.file, leftovers.UNNAMED)
            self._carry_out(note, verdict)

    def _carry_out(self, note: Note, verdict: Whole | str | None) -> None:
        if isinstance(verdict, str):
            quarantine.judged(note, verdict)
            return
        if verdict is not None:
            with writing.transaction(self._data) as connection:
                give_back.give_back(connection, self._data, note, verdict)
        quarantine.discard(note)
