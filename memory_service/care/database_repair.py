"""The repair of a store in a database with a bucket, while services go on. This file owns that a bank is changed in the
lock of its row, which services wait for, and that they learn of it as of a change of another service; and that nothing
damaged is thrown away: rows go to the table `quarantine`, and objects stay.

An object that no row names goes as services let it go: it is marked when it is older than a grace, and deleted when its
mark is, so that a write which is under way costs nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from sqlalchemy import Connection

from memory_service.care import database_questions, store_check
from memory_service.care.copying import database_end
from memory_service.care.copying.places import Place
from memory_service.care.database_questions import OF_FIGURES, OF_ROWS, Question
from memory_service.care.repair import Deed, Repaired
from memory_service.care.report import CareError, Findings, Kind, Problem, Progress, quiet
from memory_service.domain.limits import OBJECTS, ObjectLimits
from memory_service.storage.postgres import changing as changes
from memory_service.storage.postgres.changing import Changing
from memory_service.storage.postgres.database import NOW, Database, raw
from memory_service.storage.postgres.object_rows import ObjectRows
from memory_service.storage.postgres.rows import aside_rows, bank_rows, gone_rows
from memory_service.storage.postgres.schema import IDS_LOCK
from memory_service.storage.s3 import layout
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.orphans import Orphans

_DAMAGED: tuple[Kind, ...] = ("record", "payload_missing", "payload_damaged")
_LEFT: tuple[Kind, ...] = ("bank", "session", "turn")
_DEEDS: Mapping[Kind, Deed] = {"key": "removed", "orphan_row": "removed"}
_BATCH = 250
_QUOTAS = "UPDATE tenants SET quota = '{}' WHERE (name, quota) IN (SELECT * FROM unnest(%s::text[], %s::text[]))"


def repair(
    place: Place, *, dry_run: bool = False, progress: Progress = quiet, limits: ObjectLimits = OBJECTS
) -> Repaired:
    """Mend what `store_check` finds. limits: by which objects are read, and count as left over. Errors: CareError,
    StartError, OSError."""
    findings = store_check.check(place, progress=progress, limits=limits)
    with database_end.opened(place.data, place.objects, limits) as (database, bucket):
        look_again = partial(store_check.look_again, place, limits=limits)
        repairing = _Repair(database, bucket, findings.problems, look_again, dry_run)
        repairing.run()
    return repairing.repaired


class _Repair:
    """One run of a repair, step by step."""

    def __init__(
        self,
        database: Database,
        bucket: Bucket,
        problems: Sequence[Problem],
        look_again: Callable[[Iterable[tuple[int, int]]], Sequence[Problem]],
        dry_run: bool,
    ) -> None:
        self._database, self._bucket, self._look_again = database, bucket, look_again
        self._problems, self._dry_run = problems, dry_run
        self.repaired = Repaired()

    def run(self) -> None:
        """Mend all that can be mended, in the order of a folder's repair."""
        self._check_bucket()
        for question in OF_ROWS:
            self._mend(question)
        self._mend_quotas()
        self._quarantine(self._of(*_DAMAGED))
        for question in OF_FIGURES:
            self._mend(question)
        self._sweep()
        self.repaired.left += self._of(*_LEFT)
        if not self._dry_run:
            again = Findings()
            with self._database.read(to_the_end=True) as connection:
                database_questions.check(connection, again)
            self.repaired.left += again.problems

    def _of(self, *kinds: Kind) -> list[Problem]:
        return [problem for problem in self._problems if problem.kind in kinds]

    def _do(self, deed: Deed, problems: Sequence[Problem]) -> None:
        self.repaired.done += [(deed, problem) for problem in problems]

    def _check_bucket(self) -> None:
        """Refuse to go on where payloads are missing and the bucket has no payload at all. Errors: CareError."""
        missing = self._of("payload_missing")
        if missing and next(self._bucket.pages(layout.below()), None) is None:
            text = f"{self._bucket.location} has no payload at all; is it another bucket or prefix than before?"
            raise CareError(f"{text} If they are lost, serve the store and use: kvbank bank rm {missing[0].bank}")

    def _mend(self, question: Question) -> None:
        """Mend what a question finds now, bank by bank where it is of banks."""
        with self._database.read(to_the_end=True) as connection:
            found = list(database_questions.ask(connection, question))
        self._do(_DEEDS.get(question.kind, "corrected"), [problem for _, problem in found])
        if not self._dry_run:
            for bank_id in dict.fromkeys(bank_id for bank_id, _ in found):
                altered = [problem.chunk_id for each, problem in found if each == bank_id and problem.chunk_id]
                self._database.change(partial(_mend, question=question, bank_id=bank_id, altered=altered))

    def _mend_quotas(self) -> None:
        with self._database.read(to_the_end=True) as connection:
            found = database_questions.broken_quotas(connection)
        self._do("corrected", [Problem("tenant", database_questions.quota_said(name)) for name in found])
        if found and not self._dry_run:
            broken = [*found], [*found.values()]
            self._database.change(lambda connection: raw(connection).execute(_QUOTAS, broken))

    def _quarantine(self, problems: Sequence[Problem]) -> None:
        """Take those chunks out of service that are damaged still: the check of a large store takes long, and a service
        or a person may have mended some of them since."""
        if problems and not self._dry_run:
            owners = self._owners([problem.chunk_id for problem in problems if problem.chunk_id is not None])
            problems = self._look_again((bank, chunk_id) for bank, ids in owners.items() for chunk_id in ids)
            why = {problem.chunk_id: problem.detail for problem in problems if problem.chunk_id is not None}
            for bank, ids in owners.items():
                damaged = [chunk_id for chunk_id in ids if chunk_id in why]
                for begin in range(0, len(damaged), _BATCH):
                    some = {chunk_id: why[chunk_id] for chunk_id in damaged[begin : begin + _BATCH]}
                    self._database.change(partial(_set_aside, bank_id=bank, why=some))
        self._do("quarantined", problems)

    def _owners(self, chunk_ids: Sequence[int]) -> Mapping[int, list[int]]:
        """Return the ids of chunks by those of their banks. The rows say whose a chunk is: banks of several tenants may
        have one name."""
        found: dict[int, list[int]] = defaultdict(list)
        with self._database.read(to_the_end=True) as connection:
            statement = "SELECT bank_id, chunk_id FROM chunks WHERE chunk_id = ANY(%s) ORDER BY chunk_id"
            for bank_id, chunk_id in raw(connection).execute(statement, (list(chunk_ids),)):
                found[bank_id].append(chunk_id)
        return found

    def _sweep(self) -> None:
        """Mark and delete objects that no row names, by the rules of services."""
        orphans = self._of("orphan_file")
        if self._dry_run:
            self._do("removed", orphans)
            return
        with self._database.read(to_the_end=True) as connection:
            now = _now(connection)
        Orphans(self._bucket, ObjectRows(self._database, lambda *_: None), lambda: now).sweep()
        for problem in orphans:
            try:
                self._bucket.size(problem.path)
            except FileNotFoundError:
                self._do("removed", [problem])
            else:
                self.repaired.left.append(problem)


def _mend(connection: Connection, question: Question, bank_id: int | None, altered: Sequence[int]) -> None:
    """Mend what a question finds, in a bank or in none. altered: the chunks of the bank that it concerns."""
    driver = raw(connection)
    if bank_id is None:
        # The sequence would go back where a service sets it at the same time.
        driver.execute("SELECT pg_advisory_xact_lock(%s)", (IDS_LOCK,))
        for statement in question.mend:
            driver.execute(statement)
    elif (changing := _changing(connection, bank_id)) is not None:
        for statement in question.mend:
            driver.execute(statement, {"bank": bank_id})
        if altered:
            changing.tell("altered", altered)
        changing.write(_now(connection))


def _set_aside(connection: Connection, bank_id: int, why: Mapping[int, str]) -> None:
    """Take damaged chunks of a bank out of service, as a service does. why: a sentence for each chunk id."""
    if (changing := _changing(connection, bank_id)) is None:
        return
    now = _now(connection)
    aside_rows.keep(connection, changing.bank, why, now)
    changing.removed(gone_rows.remove(connection, bank_id, list(why), now), "chunks_quarantined")
    changing.write(now)


def _changing(connection: Connection, bank_id: int) -> Changing | None:
    """Lock a bank, to change it; None where it is not there (any more)."""
    bank = bank_rows.get(connection, bank_id)
    return None if bank is None else changes.begin(connection, bank)


def _now(connection: Connection) -> int:
    (now,) = raw(connection).execute(f"SELECT {NOW}").fetchone() or (0,)
    return int(now)
