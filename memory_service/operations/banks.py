"""What can be done with banks and chunks, over any engine; `memory_service.operations.writing` and `.reading` have the
two long ways, into a bank and out of it.

Methods block and are called from storage threads, but for those that say that they do not. A method that names a bank
is told whose: a bank of another tenant is for it as one that is not there.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack

from memory_service.domain import validate
from memory_service.domain.access import Caller
from memory_service.domain.answer_size import most_bytes
from memory_service.domain.errors import bank_not_found, chunk_not_found
from memory_service.domain.limits import NO_PAUSES, STANDARD, Limits, Pauses
from memory_service.domain.model import Bank, Chunk, Eviction, Filter, IndexStats, Metadata, bank_bytes, metadata_bytes
from memory_service.domain.payload import Buffer
from memory_service.observe.metrics import Metrics
from memory_service.operations.damage import Damage
from memory_service.operations.paging import page
from memory_service.operations.reading import Recall
from memory_service.operations.writing import Admitted, Writes
from memory_service.search import IndexOptions, SearchIndexes
from memory_service.settings import Settings
from memory_service.storage.base import Engine, Seen, Sizes, Staged, Totals, Written


class Banks:
    """The banks of an engine, and the index of each."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        metrics: Metrics,
        limits: Limits = STANDARD,
        pauses: Pauses = NO_PAUSES,
    ) -> None:
        """Begin to serve what an engine holds. The caller closes the engine, after these banks. Errors: those of
        `Engine.begin`."""
        self.engine = engine
        self.store = engine.store
        self.metrics = metrics
        self._writes = Writes(engine, metrics, settings.max_chunk_bytes, pauses)
        self.damage = Damage(engine.store, engine.objects)
        with ExitStack() as begun:
            options = IndexOptions(
                engine.cache,
                settings.ivf_from,
                settings.index_idle,
                settings.min_free,
                settings.durability == "fsync",
                limits.index,
            )
            self.indexes = SearchIndexes(engine.store, options, pauses=pauses)
            begun.callback(self.indexes.close)
            begun.callback(engine.rest)
            engine.store.follow(self.indexes)
            self.recall = Recall(engine, self.indexes, self.damage, metrics, settings.max_answer_bytes, limits, pauses)
            engine.begin()
            begun.pop_all()

    def close(self) -> None:
        """Finish what is under way, and keep the indexes in their files."""
        self.engine.rest()
        self.indexes.close()

    # What is served

    @property
    def store_id(self) -> str:
        """Return the identity of what is stored; it is another one after data were lost or put back."""
        return self.store.store_id

    def now_us(self) -> int:
        """Return the time by which chunks are stamped and expire, in microseconds since 1970."""
        return self.store.clock.now_us()

    def probe(self) -> None:
        """Ask the storage for something. Errors: those of a storage that does not answer."""
        self.engine.probe()

    def totals(self) -> Totals:
        """Add up what all banks hold."""
        return self.store.totals()

    def sizes(self) -> Sizes:
        """Measure the records on the disk."""
        return self.engine.sizes()

    def free_bytes(self) -> int | None:
        """Return the bytes that are left to the records; None where the engine cannot tell."""
        return self.engine.space.free()

    def compact(self) -> tuple[Sizes, Sizes]:
        """Give what is free in the records back to the disk, and return their sizes before and after. Errors:
        Cancelled."""
        before = self.engine.sizes()
        self.engine.give_back()
        return before, self.engine.sizes()

    def index_stats(self, bank: Bank) -> IndexStats:
        """Return the figures of the index of a bank now."""
        return self.indexes.stats(bank)

    # Banks

    def create(self, new: Bank) -> tuple[Bank, bool]:
        """Make a bank of the tenant that it names, and return it and whether it is new; an existing one is returned
        when name and specs agree.

        Errors: INVALID_FIELD, BANK_EXISTS, TENANT_NOT_FOUND, QUOTA_EXCEEDED, TOO_LARGE, DISK_FULL.
        """
        validate.bank(new)
        return self.store.create_bank(new)

    def named(self, tenant: str, name: str) -> Bank:
        """Return a bank of a tenant, with the usage of some earlier time. Errors: BANK_NOT_FOUND."""
        return self.store.bank(tenant, name)

    def get(self, tenant: str, name: str) -> Bank:
        """Return a bank of a tenant as it is now. Errors: BANK_NOT_FOUND."""
        with self.store.read(tenant) as view:
            bank = view.bank(self.named(tenant, name).bank_id)
        if bank is None:
            raise bank_not_found(name)
        return bank

    def known(self) -> list[Bank]:
        """Return every bank of every tenant, with the usage of some earlier time."""
        return self.store.known_banks()

    def after(self, caller: Caller, name: str, limit: int) -> tuple[list[Bank], bool]:
        """Return a page of the banks that a caller may name, by name, from the first one after `name`, and whether
        there are more."""
        with self.store.read(caller.tenant) as view:
            seen = (bank for bank in view.banks(caller.tenant, name) if caller.may_use(bank.name))
            return page(seen, limit, bank_bytes)

    def after_of_all(self, tenant: str, name: str, limit: int) -> tuple[list[Bank], bool]:
        """Return a page of the banks of all tenants by tenant and name, from the first one after these, and whether
        there are more."""
        with self.store.read() as view:
            return page(view.banks_of_all(tenant, name), limit, bank_bytes)

    def update(self, tenant: str, name: str, changes: Mapping[str, object]) -> Bank:
        """Replace some of capacity, policy, metadata, quota, expiry, index.

        Errors: INVALID_FIELD, BANK_NOT_FOUND, TOO_LARGE, DISK_FULL (not for capacity and policy, which make room).
        """
        return self.store.update_bank(tenant, name, changes)

    def delete(self, tenant: str, name: str) -> None:
        """Delete a bank with all its chunks; it is gone at once, what it takes on the disk soon. Errors:
        BANK_NOT_FOUND."""
        self.store.delete_bank(tenant, name)

    def replace(self, tenant: str, seen: Seen, by: str, by_uid: str, metadata: Metadata) -> Bank:
        """Delete a bank that is as it was seen, and give its name and settings to the bank `by`. Errors: BANK_CHANGED,
        BANK_NOT_FOUND, INVALID_FIELD, TOO_LARGE."""
        return self.store.replace_bank(tenant, seen, by, by_uid, metadata)

    # Writing

    def named_soon(self, tenant: str, name: str) -> "Bank | Future[Bank]":
        """Return a bank as `named` does, or a future of it; see `Store.bank_soon`. Never blocks. Errors:
        BANK_NOT_FOUND."""
        return self.store.bank_soon(tenant, name)

    def admit(self, bank: Bank, reader_digest: str, embedder_digest: str, chunk: Chunk) -> Admitted:
        """Check a chunk before its bytes are taken; this touches no disk. Errors: those of a write that need no
        bytes."""
        return self._writes.admit(bank, reader_digest, embedder_digest, chunk)

    def write(self, some: Sequence[tuple[Admitted, Buffer | Staged]]) -> "list[Future[Written]]":
        """Store chunks that were admitted; see `Writes.begin`."""
        return self._writes.begin(some)

    def waits(self, length: int) -> bool:
        """Tell whether a write of so many bytes of tensors waits for the storage; see `Objects.waits`."""
        return self.engine.objects.waits(length)

    # Chunks

    def delete_chunks(self, tenant: str, name: str, chunk_ids: Sequence[int]) -> int:
        """Delete chunks, and return how many existed. Errors: BANK_NOT_FOUND, INVALID_FIELD."""
        bank = self.named(tenant, name)
        validate.ids(chunk_ids)
        return len(self.store.remove(bank, chunk_ids).result())

    def pin_chunks(self, tenant: str, name: str, chunk_ids: Sequence[int], pinned: bool) -> int:
        """Protect chunks from eviction, or no longer, and return how many exist. Errors: BANK_NOT_FOUND,
        INVALID_FIELD."""
        bank = self.named(tenant, name)
        validate.ids(chunk_ids)
        return self.store.pin(bank, chunk_ids, pinned)

    def get_chunk(self, tenant: str, name: str, chunk_id: int, *, embedding: bool) -> Chunk:
        """Return a chunk without its K-V. Errors: BANK_NOT_FOUND, CHUNK_NOT_FOUND."""
        bank = self.named(tenant, name)
        self.store.show_counts()
        with self.damage.without_flawed(), self.store.read(tenant) as view:
            chunk = view.chunk(bank, chunk_id, embedding=embedding)
        if chunk is None:
            raise chunk_not_found(name, chunk_id)
        return chunk

    def list_chunks(
        self, tenant: str, name: str, after: int, limit: int, filter_: Filter, *, embedding: bool
    ) -> tuple[list[Chunk], bool]:
        """Return a page of chunks ascending by id, from the first one after `after`, and whether there are more."""
        bank = self.named(tenant, name)
        self.store.show_counts()
        with self.damage.without_flawed(), self.store.read(tenant) as view:
            return page(view.page(bank, after, filter_, embedding=embedding), limit, most_bytes)

    def update_chunk(self, tenant: str, name: str, chunk_id: int, metadata: Metadata) -> Chunk:
        """Replace the metadata of a chunk.

        Errors: BANK_NOT_FOUND, CHUNK_NOT_FOUND, INVALID_FIELD, DISK_FULL, QUOTA_EXCEEDED, BANK_FULL.
        """
        bank = self.named(tenant, name)
        validate.metadata("metadata", metadata)
        if not self.store.set_metadata(bank, chunk_id, metadata):
            raise chunk_not_found(name, chunk_id)
        return self.get_chunk(tenant, name, chunk_id, embedding=False)

    # Evictions

    def explain_eviction(self, tenant: str, name: str, need: int) -> tuple[list[Eviction], str]:
        """Return what a write of `need` would evict, in order, and a sentence about it. Errors: BANK_NOT_FOUND."""
        self.store.show_counts()
        return self.store.explain_eviction(self.get(tenant, name), need)

    def list_evictions(
        self, tenant: str, name: str, before: int, limit: int
    ) -> tuple[list[tuple[int, Eviction]], bool]:
        """Return a page of (sequence, eviction), newest first, and whether there are more. Errors: BANK_NOT_FOUND."""
        bank = self.named(tenant, name)
        with self.store.read(tenant) as view:
            return page(view.evictions(bank, before), limit, lambda eviction: metadata_bytes(eviction[1].metadata))
