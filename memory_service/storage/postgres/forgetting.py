"""How chunks are forgotten: their rows with their keys, then their objects, what is told of them otherwise, and what
services keep of them on their disks. A step that a kill has cut off is found again: rows that are left by what chose
them, objects by the clean-up of the bucket."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import psycopg
from sqlalchemy import Connection

from memory_service.domain.errors import not_mounted
from memory_service.domain.forgetting import MOST_NAMED, ForgottenChunk
from memory_service.domain.model import Bank, Filter
from memory_service.storage.followers import Followers
from memory_service.storage.forgetting.noted import Noted, checksum_of
from memory_service.storage.forgetting.parts import Chosen, Forgotten
from memory_service.storage.postgres import changing as changes
from memory_service.storage.postgres.database import Database, raw
from memory_service.storage.postgres.feed import Feed
from memory_service.storage.postgres.purging import Purging
from memory_service.storage.postgres.removal import Removal
from memory_service.storage.postgres.rows import bank_rows, chunk_rows, forgotten_chunks, purge_rows
from memory_service.storage.postgres.rows.change_rows import Changed
from memory_service.storage.postgres.rows.forgotten_chunks import Aside
from memory_service.storage.s3.objects import S3Objects

# Tells of a chunk that was taken out of service whether it goes.
Goes = Callable[[Aside], bool]
# The key of the lock (pg_advisory_lock) of the service that forgets, and how often others ask for it, in seconds.
_LOCK, _LOOK_S = 0x6B76_0004, 0.2
# What a receipt says of what no service can clear.
REMAINS = (
    "PostgreSQL keeps old versions of rows in its files until VACUUM FULL, and copies of them in its log (WAL), in its"
    " replicas and in backups; a bucket keeps old versions of objects where versioning is on. Those who run the"
    " database and the bucket clear these"
)


@dataclass(frozen=True, slots=True)
class PostgresChunkForgetting:
    """Implements `memory_service.storage.forgetting.chunks.ChunkForgetting` for a database and a bucket."""

    database: Database
    objects: S3Objects
    removal: Removal
    feed: Feed
    followers: Followers
    purging: Purging

    @contextmanager
    def alone(self, check_resting: Callable[[], None]) -> Iterator[None]:
        """Keep other services from forgetting in the same store during the block. check_resting: raises where this
        service is to end."""
        with self.database.lent() as connection:
            driver = raw(connection)
            while not driver.execute("SELECT pg_try_advisory_lock(%s)", (_LOCK,)).fetchall()[0][0]:
                check_resting()
                time.sleep(_LOOK_S)
            try:
                yield
            finally:
                with suppress(psycopg.Error):  # a connection that is lost has lost its lock
                    driver.execute("SELECT pg_advisory_unlock(%s)", (_LOCK,))

    def bank(self, bank_id: int) -> Bank | None:
        """Return a bank by its id; None where it is gone."""
        with self.database.read(to_the_end=True) as connection:
            return bank_rows.get(connection, bank_id)

    def named_bank(self, tenant: str, name: str) -> Bank | None:
        """Return a bank of a tenant; None where there is none."""
        with self.database.read(to_the_end=True) as connection:
            return bank_rows.named(connection, tenant, name)

    def check(self, bank: Bank) -> None:
        """Refuse to forget chunks whose objects cannot be reached. Errors: STORAGE_ERROR."""
        if bank.kv.layers and not self.objects.there(bank.uid):
            raise not_mounted(bank.name)

    def matching(self, bank: Bank, where: Filter) -> list[int]:
        """Find the chunks of a bank that a filter lets pass; see `ChunkForgetting.matching`. Errors: FlawedError."""
        with self.database.read() as connection:
            ids = chunk_rows.matching_ids(connection, bank, where).tolist()
            gone = forgotten_chunks.gone_matching(connection, bank.bank_id, bank.uid, where)
        return sorted({*ids, *gone})

    def parts(self, noted: Noted, bank: Bank, forgotten: Forgotten) -> None:
        """Forget the chunks of a bank that are of forgotten parts of branches, or had attended to them."""

        def choose(connection: Connection) -> tuple[Chosen, list[int]]:
            # Those who have locked the bank before have committed then, and those who do later see what is forgotten.
            bank_rows.locked(connection, bank.bank_id)
            chosen = forgotten_chunks.chosen(connection, forgotten, bank.bank_id)
            return chosen, forgotten_chunks.logged(connection, forgotten, bank.bank_id)

        chosen, logged = self.database.change(choose)
        self._remove(noted, bank, chosen, tokens=False)
        # Those that were found may have been evicted before they were removed.
        self._forget_rest(noted, bank, [*logged, *chosen.of_them], _goes(forgotten))

    def in_deleted_banks(self, noted: Noted, forgotten: Forgotten) -> None:
        """Forget what is kept aside of such chunks of banks that were deleted before."""
        with self.database.read(to_the_end=True) as connection:
            uids = forgotten_chunks.deleted_banks_aside(connection)
        for uid in uids:
            self._forget_aside(noted, uid, _goes(forgotten))

    def named(self, noted: Noted, bank: Bank, ids: Sequence[int]) -> None:
        """Forget chunks of a bank by their ids, those that are gone already too."""
        wanted = set(ids)
        self._remove(noted, bank, Chosen(list(ids), []), tokens=True)
        self._forget_rest(noted, bank, ids, lambda each: each.chunk_id in wanted)

    def drop(self, noted: Noted, bank_id: int, uid: str) -> None:
        """Forget a bank with all that it has; it may be deleted already. Errors: STORAGE_ERROR."""
        if (bank := self.bank(bank_id)) is not None:
            self.check(bank)
        if (gone := self.database.change(partial(self._delete, noted, bank_id), durable=True)) is not None:
            self.removal.bank_deleted(gone)
        self.removal.pauses.reach("rows forgotten")
        self.removal.clear(bank_id, uid)
        self._forget_aside(noted, uid, lambda _: True)
        self.objects.delete_bank(uid)
        self.database.change(lambda connection: purge_rows.add(connection, bank_id, uid, self.removal.now()))
        noted.add(snapshots=self.purging.run())

    def _delete(self, noted: Noted, bank_id: int, connection: Connection) -> Bank | None:
        """Delete the row of a bank, and count what it has."""
        if bank_rows.locked(connection, bank_id) is None or (bank := bank_rows.get(connection, bank_id)) is None:
            return None
        named = forgotten_chunks.payloads_of(connection, bank_id, MOST_NAMED)
        chunks = [ForgottenChunk(bank.name, chunk_id, checksum_of(payload)) for chunk_id, payload in named]
        count = bank.usage.chunks
        objects = count if bank.kv.layers else 0
        aside = len(forgotten_chunks.forget_aside(connection, bank.uid, lambda _: True))
        noted.count(connection, chunks=chunks, size=bank.usage.bytes, banks=1, rows=count, objects=objects)
        noted.count(connection, quarantine=aside)
        bank_rows.delete(connection, bank)
        return bank

    def _remove(self, noted: Noted, bank: Bank, chosen: Chosen, *, tokens: bool) -> None:
        """Remove rows and objects of chunks. tokens: whether those of the chunks count."""
        self.check(bank)
        ids, step = [*chosen.of_them, *chosen.attended], self.removal.limits.step_rows
        attended = frozenset(chosen.attended)
        for begin in range(0, len(ids), step):
            self._remove_some(noted, bank, ids[begin : begin + step], attended, tokens)
        self.removal.pauses.reach("rows forgotten")
        if bank.kv.layers:
            self.objects.delete(bank.uid, ids)

    def _remove_some(
        self, noted: Noted, bank: Bank, chunk_ids: Sequence[int], attended: frozenset[int], tokens: bool
    ) -> None:
        now = self.removal.now()

        def operation(connection: Connection) -> tuple[changes.Changing, Changed | None] | None:
            changing = changes.begin(connection, bank)
            if changing is None:
                return None
            self.feed.begins(changing)
            removed, payloads = forgotten_chunks.forget(connection, bank.bank_id, chunk_ids)
            changing.removed(removed, "chunks_deleted")
            noted.count_chunks(bank, attended, tokens, connection, removed, payloads)
            return changing, changing.write(now)

        if (done := self.database.change(operation, durable=True)) is not None:
            self.feed.committed(*done)

    def _forget_rest(self, noted: Noted, bank: Bank, logged: Sequence[int], goes: Goes) -> None:
        """Forget what is left of chunks beside rows and objects. logged: ids of chunks that are gone."""
        step = self.removal.limits.step_rows
        for begin in range(0, len(logged), step):
            some = logged[begin : begin + step]

            def forget(connection: Connection, some: Sequence[int] = some) -> None:
                noted.count(connection, log=forgotten_chunks.forget_logged(connection, bank.bank_id, some))

            noted.step(forget)
        self._forget_aside(noted, bank.uid, goes)
        add = partial(purge_rows.add, bank_id=bank.bank_id, uid=bank.uid, now=self.removal.now())
        self.database.change(add)
        noted.add(snapshots=self.purging.run())

    def _forget_aside(self, noted: Noted, uid: str, goes: Goes) -> None:
        """Forget chunks of a bank that were taken out of service, with their objects."""

        def forget(connection: Connection) -> list[int]:
            ids = forgotten_chunks.forget_aside(connection, uid, goes)
            noted.count(connection, quarantine=len(ids))
            return ids

        self.objects.delete(uid, noted.step(forget))

    def settle(self, check_resting: Callable[[], None]) -> None:
        """Wait until objects of chunks and banks that are gone already are deleted. check_resting: raises where this is
        to end."""
        check_resting()
        self.removal.clear_all()
        self.removal.janitor.settle()

    def clear(self, noted: Noted) -> None:
        """Have the objects go of what others have removed meanwhile, such as chunks that were evicted."""
        self.removal.janitor.settle()

    def clean(self) -> None:
        """Wait until the other services have dropped what they keep of what was forgotten. Errors: NOT_SERVING."""
        self.purging.everywhere()


def _goes(forgotten: Forgotten) -> Goes:
    """Return what tells of a chunk that was taken out of service whether it goes; one whose row cannot be read does."""

    def goes(each: Aside) -> bool:
        try:
            return forgotten.why_of_row(each.row) is not None
        except (ValueError, TypeError, KeyError, AttributeError):
            return True

    return goes
