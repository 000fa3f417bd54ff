"""How chunks are forgotten: their rows, then their files, what quarantine and the log of evictions have of them, and
last the files of the index. A step that a kill has cut off is found again: rows that are left by what chose them, files
without rows in quarantine, to which the start moves them."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from kvbank.files import durable
from memory_service.domain.errors import ServiceError, not_mounted
from memory_service.domain.forgetting import MOST_NAMED, ForgottenChunk
from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Bank, Filter
from memory_service.storage.background import Janitor
from memory_service.storage.followers import Followers
from memory_service.storage.forgetting.noted import Noted, checksum_of
from memory_service.storage.forgetting.parts import Chosen, Forgotten
from memory_service.storage.local import quarantine
from memory_service.storage.local.bank_changes import BankChanges
from memory_service.storage.local.evicting.removal import Removal
from memory_service.storage.local.files import layout
from memory_service.storage.local.files.objects import LocalObjects
from memory_service.storage.local.records import bank_rows, chunk_parts, chunk_rows, gone_rows
from memory_service.storage.local.records.unused_bytes import UnusedBytes
from memory_service.storage.local.records.vacuum import Vacuum

# How often it is looked, in seconds, whether the engine is brought to rest.
_LOOK_S = 0.2
# Tells of a chunk in quarantine, by its id and its row (None where that is not known), whether it goes.
Goes = Callable[[int, Mapping[str, Any] | None], bool]


@dataclass(frozen=True, slots=True)
class LocalChunkForgetting:
    """Implements `memory_service.storage.forgetting.chunks.ChunkForgetting` for a data folder. janitor: works in the
    background, such as to look for files that no row names."""

    data: Path
    objects: LocalObjects
    changes: BankChanges
    removal: Removal
    followers: Followers
    limits: Limits
    pauses: Pauses
    janitor: Janitor
    vacuum: Vacuum
    unused: UnusedBytes

    def alone(self, check_resting: Callable[[], None]) -> AbstractContextManager[object]:
        """Return a block of no effect, because a folder has one service."""
        return nullcontext()

    def bank(self, bank_id: int) -> Bank | None:
        """Return a bank by its id; None where it is gone."""
        return self.changes.known.current(bank_id)

    def named_bank(self, tenant: str, name: str) -> Bank | None:
        """Return a bank of a tenant; None where there is none."""
        with suppress(ServiceError):
            return self.changes.known.named(tenant, name)
        return None

    def check(self, bank: Bank) -> None:
        """Refuse to forget chunks whose files cannot be reached. Errors: STORAGE_ERROR."""
        if bank.kv.layers and not self.objects.there(bank.uid):
            raise not_mounted(bank.name)

    def matching(self, bank: Bank, where: Filter) -> list[int]:
        """Find the chunks of a bank that a filter lets pass, also evicted ones of which the log tells, and those in
        quarantine; of these also what cannot be read. Errors: FlawedError."""
        with self.changes.records.read() as connection:
            ids = chunk_rows.matching_ids(connection, bank, where).tolist()
            logged = gone_rows.logged_rows(connection, bank.bank_id)
        aside = dict(quarantine.rows(self.data, bank.uid))
        known = [row for row in aside.values() if row is not None]
        gone = chunk_rows.matching_rows([*known, *logged], where)
        return sorted({*ids, *gone, *(chunk_id for chunk_id, row in aside.items() if row is None)})

    def parts(self, noted: Noted, bank: Bank, forgotten: Forgotten) -> None:
        """Forget the chunks of a bank that are of forgotten parts of branches, or had attended to them."""
        with noted.records.read(to_the_end=True) as connection:
            chosen = chunk_parts.chosen(connection, forgotten, bank.bank_id)
            logged = chunk_parts.logged(connection, forgotten, bank.bank_id)
        self._remove(noted, bank, chosen, tokens=False)
        # Those that were found may have been evicted before they were removed.
        self._forget_rest(noted, bank, [*logged, *chosen.of_them], _goes(forgotten, unknown=True))

    def in_deleted_banks(self, noted: Noted, forgotten: Forgotten) -> None:
        """Forget what quarantine has of such chunks of banks that were deleted before."""
        known = {bank.uid for bank in self.changes.known.all()}
        for uid in set(quarantine.bank_uids(self.data)) - known:
            noted.add(quarantine=quarantine.forget(self.data, uid, _goes(forgotten, unknown=False)))

    def named(self, noted: Noted, bank: Bank, ids: Sequence[int]) -> None:
        """Forget chunks of a bank by their ids, those that are gone already too."""
        wanted = set(ids)
        self._remove(noted, bank, Chosen(list(ids), []), tokens=True)
        self._forget_rest(noted, bank, ids, lambda chunk_id, _: chunk_id in wanted)

    def drop(self, noted: Noted, bank_id: int, uid: str) -> None:
        """Forget a bank with all that it has; it may be deleted already. Errors: STORAGE_ERROR."""
        if (bank := self.changes.known.current(bank_id)) is not None:
            self.check(bank)
            with suppress(ServiceError):  # somebody has deleted it meanwhile
                self.changes.delete(bank.tenant, bank.name, partial(self._count_all, noted, bank))
        self.pauses.reach("rows forgotten")
        self.removal.cleared(bank_id, uid).result()
        aside = quarantine.forget(self.data, uid, lambda *_: True)
        noted.add(quarantine=aside, snapshots=self.followers.purge(None))

    def _count_all(self, noted: Noted, bank: Bank, connection: Connection) -> None:
        """Count what a bank has, which the transaction deletes."""
        if (usage := bank_rows.usage(connection, bank.bank_id)) is None:  # somebody has deleted it meanwhile
            return
        named = gone_rows.payloads_of(connection, bank.bank_id, MOST_NAMED)
        chunks = [ForgottenChunk(bank.name, chunk_id, checksum_of(payload)) for chunk_id, payload in named]
        went = {"rows": usage.chunks, "objects": usage.chunks if bank.kv.layers else 0}
        went |= {"quarantine": len(quarantine.chunks_of(self.data, bank.uid))}
        noted.count(connection, chunks=chunks, size=usage.bytes, banks=1, **went)

    def settle(self, check_resting: Callable[[], None]) -> None:
        """Wait until files of chunks and banks that are gone already, and those that no row names, are in their places.
        check_resting: raises where this is to end."""
        while wait(self.removal.clearings(), timeout=_LOOK_S).not_done:
            check_resting()
        self.janitor.settle()

    def clean(self) -> None:
        """Clear the room in the database that nothing uses. Errors: those of `UnusedBytes.clear`."""
        with self.vacuum.paused():
            self.unused.clear()

    def clear(self, noted: Noted) -> None:
        """Remove all payloads that clients of this machine have staged, whatever these have, upon which the clients
        send them over the stream; and have the files go of what others have removed meanwhile, such as chunks that were
        evicted."""
        with suppress(FileNotFoundError):
            files = [
                Path(entry) for entry in os.scandir(self.objects.staging) if not entry.is_dir(follow_symlinks=False)
            ]
            for file in files:
                file.unlink(missing_ok=True)
            noted.add(staging=len(files))
        self.janitor.settle()

    def _remove(self, noted: Noted, bank: Bank, chosen: Chosen, *, tokens: bool) -> None:
        """Remove rows and files of chunks. tokens: whether those of the chunks count."""
        self.check(bank)
        ids, step = [*chosen.of_them, *chosen.attended], self.limits.step_rows
        count = partial(noted.count_chunks, bank, frozenset(chosen.attended), tokens)
        for begin in range(0, len(ids), step):
            self.removal.forget(bank, ids[begin : begin + step], count).result()
        self.pauses.reach("rows forgotten")
        if bank.kv.layers:
            self.objects.delete(bank.uid, ids)
            for folder in {(self.data / layout.name(bank.uid, chunk_id)).parent for chunk_id in ids}:
                if folder.is_dir():
                    durable.sync_folder(folder)

    def _forget_rest(self, noted: Noted, bank: Bank, logged: Sequence[int], goes: Goes) -> None:
        """Forget what is left of chunks beside rows and files. logged: ids of chunks that are gone."""
        step = self.limits.step_rows
        for begin in range(0, len(logged), step):
            some = partial(gone_rows.forget_logged, bank_id=bank.bank_id, chunk_ids=logged[begin : begin + step])
            noted.step(lambda connection, some=some: noted.count(connection, log=some(connection)))  # type: ignore[misc]
        aside = quarantine.forget(self.data, bank.uid, goes)
        noted.add(quarantine=aside, snapshots=self.followers.purge(bank))


def _goes(forgotten: Forgotten, *, unknown: bool) -> Goes:
    """Return what tells of a chunk in quarantine whether it goes. unknown: whether those go of which nothing says what
    they have."""

    def goes(_: int, row: Mapping[str, Any] | None) -> bool:
        try:
            return unknown if row is None else forgotten.why_of_row(row) is not None
        except (ValueError, TypeError, KeyError, AttributeError):
            return unknown

    return goes
