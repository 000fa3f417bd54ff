"""The order in which something is forgotten: what is to go is written down, rows go, objects go, what the database
keeps of rows is cleared, and the receipt is done. This file owns that order, and that one thing is forgotten at a time,
to its end, also where its caller has gone."""

import hashlib
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import xxhash
from sqlalchemy import Connection

from memory_service.domain.clock import Clock
from memory_service.domain.errors import ServiceError
from memory_service.domain.forgetting import Receipt
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, Filter
from memory_service.storage.forgetting import tenant as tenant_rules
from memory_service.storage.forgetting import turns as turn_rules
from memory_service.storage.forgetting.chunks import ChunkForgetting
from memory_service.storage.forgetting.noted import Noted
from memory_service.storage.forgetting.parts import Forgotten, Part, Span
from memory_service.storage.forgetting.receipt_row import Pending, of_tenant
from memory_service.storage.forgetting.rows import ForgettingRows
from memory_service.storage.sessions import deletion
from memory_service.storage.sessions.deletion import Left
from memory_service.storage.sessions.windows import SessionWindows
from memory_service.storage.transactions import Transactions

_log = logging.getLogger(__name__)
# Makes, in a transaction, what is to be done, as JSON can hold it; returns it, and what has gone in the transaction.
Begun = tuple[Mapping[str, Any], Mapping[str, Any]]
Begin = Callable[[Connection, int], Begun]


class Forgettings:
    """Implements `memory_service.storage.base.Forgetting` over rows, windows and chunks."""

    def __init__(
        self,
        records: Transactions,
        clock: Clock,
        rows: ForgettingRows,
        windows: SessionWindows,
        chunks: ChunkForgetting,
        limits: Limits,
        pauses: Pauses,
        remains: str = "",
    ) -> None:
        """Make what forgets, which has nothing to do yet. remains: what receipts say of what no service can clear."""
        self._records, self._clock, self._rows = records, clock, rows
        self._windows, self._chunks = windows, chunks
        self._limits, self._pauses = limits, pauses
        self._remains = remains
        self._resting = threading.Event()
        self._thread = ThreadPoolExecutor(1, "kvbank-forgetting")

    # What can be forgotten

    def turns(self, tenant: str, session_id: str, first: int, last: int, key_id: str) -> Receipt:
        """Forget turns of a session; see `Forgetting.turns`."""

        def begin(connection: Connection, now: int) -> Begun:
            session = self._rows.sessions.sessions.get(connection, tenant, session_id, now)
            self._check_bank(tenant, session.bank)
            spans = turn_rules.spans_of(self._rows, connection, session, first, last)
            return {"kind": "turns", "bank": session.bank, "spans": spans}, {}

        which = f"turn {first}" if first == last else f"turns {first} to {last}"
        return self._forget(
            tenant, f"turns {session_id} {first} {last}", f"{which} of session {session_id}", key_id, begin
        )

    def turn(self, tenant: str, key: str, key_id: str) -> Receipt:
        """Forget the turn that has a key; see `Forgetting.turn`."""

        def begin(connection: Connection, now: int) -> Begun:
            spans, bank = turn_rules.spans_of_key(self._rows, connection, tenant, key, now)
            self._check_bank(tenant, bank)
            return {"kind": "turns", "bank": bank, "spans": spans}, {}

        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return self._forget(tenant, f"turn {digest}", "a turn by its key", key_id, begin)

    def session(self, tenant: str, session_id: str, key_id: str) -> Receipt:
        """Forget a session with its chunks; see `Forgetting.session`."""

        def begin(connection: Connection, now: int) -> Begun:
            session = self._rows.sessions.sessions.get(connection, tenant, session_id, now)
            self._check_bank(tenant, session.bank)
            left, kept = deletion.delete(self._rows.sessions, connection, session_id)
            window = self._rows.sessions.windows.delete(connection, session_id)
            for each in left:
                self._rows.turns.note_gone(connection, each.branch, each.begin, now)
            bank = self._chunks.named_bank(tenant, session.bank)
            place = None if bank is None else (bank.bank_id, bank.uid)
            said = {"session": session_id, "bank": place, "own": session.has_own_bank, "window": window, "left": left}
            return {"kind": "session", **said}, {"sessions": 1, "windows": bool(window), "kept": kept}

        return self._forget(tenant, f"session {session_id}", f"session {session_id}", key_id, begin)

    def chunks(self, bank: Bank, where: Filter, key_id: str) -> Receipt:
        """Forget the chunks of a bank that a filter lets pass; see `Forgetting.chunks`."""
        self._chunks.check(bank)
        ids = self._chunks.matching(bank, where)

        def begin(*_: object) -> Begun:
            return {"kind": "chunks", "bank": bank.bank_id, "uid": bank.uid, "ids": ids}, {}

        digest = xxhash.xxh3_128_hexdigest(repr(where).encode())
        subject = f"chunks {bank.uid} {digest}"
        return self._forget(bank.tenant, subject, f"chunks of bank {bank.name} by a filter", key_id, begin)

    def tenant(self, name: str, key_id: str) -> Receipt:
        """Forget a tenant with all that it has; see `Forgetting.tenant`."""

        def begin(connection: Connection, now: int) -> Begun:
            banks = self._rows.tenants.banks_of(connection, name)
            for bank in filter(None, map(self._chunks.bank, (bank_id for bank_id, _ in banks))):
                self._chunks.check(bank)
            gone = tenant_rules.delete(self._rows, connection, name, now)
            went = {"keys": gone.keys, "sessions": gone.sessions, "windows": len(gone.windows)}
            return {"kind": "tenant", "name": name, "banks": banks, "windows": gone.windows}, went

        return self._forget("", of_tenant(name), f"tenant {name}", key_id, begin, changes=name)

    # The order

    def resume(self) -> None:
        """Begin to finish what a stop has interrupted."""
        with self._records.read() as connection:
            if self._rows.receipts.pending(connection):
                self._thread.submit(self._resume)

    def _resume(self) -> None:
        with self._chunks.alone(self._check_resting):
            self._finish_pending()

    def close(self) -> None:
        """Begin nothing more, and return when what is under way has come to the end of its step; the next start goes on
        with it."""
        self._resting.set()
        self._thread.shutdown(wait=True)

    def _forget(
        self, tenant: str, subject: str, target: str, key_id: str, begin: Begin, *, changes: str = ""
    ) -> Receipt:
        """Forget what `begin` finds, in the thread that forgets. subject: names what was asked for. target: says so to
        people. changes: the tenant whose rows `begin` changes, where it is not the one whose receipt it is."""
        try:
            run = partial(self._run, changes=changes or tenant)
            receipt = self._thread.submit(run, tenant, subject, target, key_id, begin).result()
        except RuntimeError as error:
            if not self._resting.is_set():
                raise
            raise _at_rest() from error
        return replace(receipt, remains=self._remains)

    def _run(self, tenant: str, subject: str, target: str, key_id: str, begin: Begin, *, changes: str) -> Receipt:
        with self._chunks.alone(self._check_resting):
            return self._run_alone(tenant, subject, target, key_id, begin, changes=changes)

    def _run_alone(self, tenant: str, subject: str, target: str, key_id: str, begin: Begin, *, changes: str) -> Receipt:
        failed = self._finish_pending().get((tenant, subject))

        def note(connection: Connection) -> Pending:
            now = self._clock.now_us()
            work, went = begin(connection, now)
            receipt = Receipt(secrets.token_hex(16), now, key_id, target).plus(**went)
            return self._rows.receipts.insert(connection, tenant, subject, receipt, work)

        try:
            pending = self._records.change(note, tenant=changes, durable=True)
        except ServiceError as refusal:
            with self._records.read(to_the_end=True) as connection:
                earlier = self._rows.receipts.earlier(connection, tenant, subject)
            if earlier is not None and refusal.reason.endswith("NOT_FOUND"):
                return earlier
            raise failed or refusal from None
        noted = Noted(self._records, self._rows.receipts, pending)
        self._go_on(noted)
        return self._receipt(noted, subject)

    def _receipt(self, noted: Noted, subject: str) -> Receipt:
        """Return the receipt of what went; that of before where nothing has gone this time."""
        receipt = noted.receipt()
        if not receipt.is_empty:
            return receipt
        with self._records.read(to_the_end=True) as connection:
            earlier = self._rows.receipts.earlier(connection, noted.tenant, subject, but=receipt.receipt_id)
        if earlier is None:
            return receipt
        noted.step(partial(self._rows.receipts.drop, receipt_id=receipt.receipt_id))
        return earlier

    def _finish_pending(self) -> dict[tuple[str, str], Exception]:
        """Finish what was interrupted, and return the errors of what cannot be finished now, by tenant and subject."""
        with self._records.read(to_the_end=True) as connection:
            found = self._rows.receipts.pending(connection)
        failed = dict[tuple[str, str], Exception]()
        for pending in found:
            try:
                self._go_on(Noted(self._records, self._rows.receipts, pending))
            except Exception as error:
                _log.warning("forgetting %s is not finished: %s", pending.receipt_id, error)
                failed[pending.tenant, pending.subject] = error
        return failed

    def _go_on(self, noted: Noted) -> None:
        """Forget what is written down, from wherever it stands."""
        self._pauses.reach("forgetting begun")
        self._chunks.settle(self._check_resting)
        self._steps[noted.work["kind"]](noted)
        self._chunks.clear(noted)
        self._pauses.reach("files forgotten")
        self._check_resting()
        self._chunks.clean()
        self._pauses.reach("all forgotten")
        noted.done()

    @property
    def _steps(self) -> Mapping[str, Callable[[Noted], None]]:
        return {
            "turns": self._turns,
            "session": self._session,
            "chunks": self._named_chunks,
            "tenant": self._tenant,
        }

    def _check_resting(self) -> None:
        """Stop between two steps where the engine is brought to rest. Errors: NOT_SERVING."""
        if self._resting.is_set():
            raise _at_rest()

    def _check_bank(self, tenant: str, name: str) -> None:
        if (bank := self._chunks.named_bank(tenant, name)) is not None:
            self._chunks.check(bank)

    # Turns

    def _turns(self, noted: Noted) -> None:
        spans = [Span(*span) for span in noted.work["spans"]]
        for span in spans:
            noted.until_none(partial(turn_rules.blank_some, self._rows, span=span, most=self._limits.step_rows))
        if noted.receipt().turns:
            self._fence(noted, spans)
        with self._records.read(to_the_end=True) as connection:
            behind = [part for span in spans for part in turn_rules.behind(self._rows, connection, span)]
        forgotten = Forgotten([Part(span.branch, span.begin, span.end) for span in spans], behind)
        if (bank := self._chunks.named_bank(noted.tenant, noted.work["bank"])) is not None:
            self._chunks.parts(noted, bank, forgotten)
        self._chunks.in_deleted_banks(noted, forgotten)

    def _fence(self, noted: Noted, spans: list[Span]) -> None:
        """Take lease and window from every session that has some of the turns."""

        def fence(connection: Connection) -> dict[str, str]:
            files = turn_rules.fence(self._rows, connection, spans)
            noted.count(connection, windows=sum(map(bool, files.values())))
            return files

        files = noted.step(fence)
        for file in filter(None, files.values()):
            self._windows.files.remove(file)
        self._windows.files.give_up(files)

    # Sessions

    def _session(self, noted: Noted) -> None:
        work, left = noted.work, [Left(*each) for each in noted.work["left"]]
        if work["window"]:
            self._windows.files.remove(work["window"])
        self._windows.files.give_up([work["session"]])
        for each in left:
            noted.until_none(partial(deletion.clear_some, self._rows.sessions, left=each, most=self._limits.step_rows))
        forgotten = Forgotten([Part(each.branch, each.begin) for each in left])
        self._chunks.in_deleted_banks(noted, forgotten)
        if work["bank"] is None:
            return
        bank_id, uid = work["bank"]
        bank = self._chunks.bank(bank_id)
        with self._records.read(to_the_end=True) as connection:
            used = bank is not None and self._rows.sessions.sessions.is_used(connection, noted.tenant, bank.name)
        if bank is not None and (used or not work["own"]):
            self._chunks.parts(noted, bank, forgotten)
        else:
            self._chunks.drop(noted, bank_id, uid)

    # Chunks and tenants

    def _named_chunks(self, noted: Noted) -> None:
        if (bank := self._chunks.bank(noted.work["bank"])) is not None:
            self._chunks.named(noted, bank, noted.ids())
        else:  # deleted meanwhile
            self._chunks.drop(noted, noted.work["bank"], noted.work["uid"])

    def _tenant(self, noted: Noted) -> None:
        for bank_id, uid in noted.work["banks"]:
            self._chunks.drop(noted, bank_id, uid)
        name, most = noted.work["name"], self._limits.step_rows
        noted.until_none(partial(self._rows.tenants.clear_some_turns, tenant=name, most=most))
        noted.step(partial(self._rows.tenants.clear_branches, tenant=name))
        for file in noted.work.get("windows", ()):  # an earlier version has not written them down
            self._windows.files.remove(file)
        self._windows.sweep()
        self._windows.give_up_gone()


def _at_rest() -> ServiceError:
    return ServiceError(
        "NOT_SERVING", "the service is shutting down; what is being forgotten is finished by its next start"
    )
