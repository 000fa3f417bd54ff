"""What can be done with banks. Owns the order of a write (file, commit, index, answer), idempotency and eviction.

Methods block and are called from storage threads; those that change something commit through the writer.
"""

import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial

import xxhash
from sqlalchemy import Connection

from memory_service import records, validate
from memory_service.domain import Bank, Chunk, Eviction
from memory_service.errors import (
    ALREADY_EXISTS,
    INVALID_ARGUMENT,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    ServiceError,
    invalid,
)
from memory_service.eviction import Victim, overflows, plan
from memory_service.payloads import Payloads
from memory_service.records import Records, now_us
from memory_service.search import BankIndex, SearchIndexes
from memory_service.settings import Settings

MOST_VICTIMS = 1000
MOST_EXPLAINED = 10_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Written:
    """Answer to a write: `evicted` went with it; `replayed`: nothing was written now."""

    key: bytes
    chunk_id: int
    replayed: bool = False
    gone: bool = False
    evicted: tuple[int, ...] = ()


class Banks:
    """The banks of a data folder; see `memory_service.recall` for reading them."""

    def __init__(self, settings: Settings) -> None:
        """Errors: StartError for a schema that is not the present one."""
        durable = settings.durability == "fsync"
        self._settings = settings
        self.payloads = Payloads(settings.data, durable=durable)
        self.records = Records(settings.data, durable=durable, migrate=settings.migrate)
        self._indexes = SearchIndexes()
        with self.records.read() as connection:
            self._by_name = {bank.name: bank for bank in records.banks(connection)}
        self._janitor = ThreadPoolExecutor(1, "kvbank-janitor")
        self._later(self._sweep)

    def close(self) -> None:
        """Commit what is pending, checkpoint, finish the clean-up."""
        self.records.close()
        self._janitor.shutdown()

    # Banks

    def create(self, new: Bank) -> tuple[Bank, bool]:
        """The bank, and whether it is new; an existing one when name and specs agree.

        Errors: INVALID_FIELD, BANK_EXISTS.
        """
        validate.bank(new)
        new = replace(new, uid=secrets.token_hex(8), created=now_us())
        bank = self.records.writer.submit(partial(_create, new), self._remember).result()
        return bank, bank.uid == new.uid

    def named(self, name: str) -> Bank:
        """The bank, with the usage of some earlier time. Errors: BANK_NOT_FOUND."""
        bank = self._by_name.get(name)
        if bank is None:
            raise _bank_not_found(name)
        return bank

    def get(self, name: str) -> Bank:
        """The bank as it is now. Errors: BANK_NOT_FOUND."""
        with self.records.read() as connection:
            bank = records.bank(connection, self.named(name).bank_id)
        if bank is None:
            raise _bank_not_found(name)
        return bank

    def after(self, name: str, limit: int) -> list[Bank]:
        """By name, from the first one after `name`."""
        with self.records.read() as connection:
            return records.banks(connection, name, limit)

    def update(self, name: str, changes: Mapping[str, object]) -> Bank:
        """Replace some of capacity, policy, metadata. Errors: INVALID_FIELD, BANK_NOT_FOUND."""
        bank_id = self.named(name).bank_id

        def change(connection: Connection) -> Bank:
            bank = records.bank(connection, bank_id)
            if bank is None:
                raise _bank_not_found(name)
            bank = replace(bank, **changes)  # type: ignore[arg-type]
            validate.bank(bank)
            records.update_bank(connection, bank)
            return bank

        return self.records.writer.submit(change, self._remember).result()

    def delete(self, name: str) -> None:
        """The bank with all its chunks. Errors: BANK_NOT_FOUND."""
        bank = self.named(name)

        def remove(connection: Connection) -> None:
            # Another call may have deleted it, and a third made a bank of this name, since it was looked up.
            if not records.delete_bank(connection, bank.bank_id):
                raise _bank_not_found(name)

        def applied(_none: None) -> None:
            del self._by_name[name]
            self._indexes.drop(bank.bank_id)
            self._later(self.payloads.drop_bank, bank.uid)

        self.records.writer.submit(remove, applied).result()

    # Writing

    def admit(self, name: str, reader_digest: str, embedder_digest: str, chunk: Chunk) -> Bank:
        """Check a chunk before its bytes are taken; touches no disk. Errors: those of a write that need no bytes."""
        bank = self.named(name)
        validate.reader(bank, reader_digest)
        validate.embedder(bank, embedder_digest)
        validate.chunk(bank, chunk, self._settings.max_chunk_bytes)
        return bank

    def write(self, bank: Bank, chunk_id: int, chunk: Chunk, data: bytes | bytearray) -> "Future[Written]":
        """Store an admitted chunk; the future resolves when it is durable and can be found.

        `data`: the payload's tensors in descriptor order, with the checksums (seed 0) that the descriptor states.
        Errors: CHECKSUM_IN_TRANSIT, TENSOR_MISMATCH, DISK_FULL; by the future also KEY_REUSED, BANK_FULL, TOO_LARGE.
        """
        self._check_bytes(chunk, data)
        self._check_space(len(data))
        digest = _request_digest(chunk)
        chunk = replace(chunk, chunk_id=chunk_id, bank=bank.name, created=now_us())
        if chunk.payload is not None:
            chunk = replace(chunk, payload=self.payloads.write(bank.uid, chunk_id, chunk.payload, data))
        future = self.records.writer.submit(
            partial(self._commit, bank, chunk, digest), partial(self._committed, bank, chunk)
        )

        def forget_file(done: "Future[tuple[Written, list[Victim]]]") -> None:
            if chunk.payload is not None and (done.exception() or done.result()[0].replayed):
                self._later(self.payloads.unlink, bank.uid, [chunk_id])

        future.add_done_callback(forget_file)
        return _first(future)

    @staticmethod
    def _check_bytes(chunk: Chunk, data: bytes | bytearray) -> None:
        view, begin = memoryview(data), 0
        for tensor in chunk.payload.tensors if chunk.payload else ():
            part = view[begin : begin + tensor.length]
            if xxhash.xxh3_64_intdigest(part) != tensor.checksum:
                text = f"the bytes of tensor {tensor.name} do not match the checksum that was sent with them"
                raise ServiceError(INVALID_ARGUMENT, "CHECKSUM_IN_TRANSIT", text, tensor=tensor.name)
            if tensor.name.startswith("pos."):
                validate.positions(tensor, part, chunk.original_length)
            begin += tensor.length

    def _check_space(self, size: int) -> None:
        """Keep `min_free` back, so that deletes and checkpoints still work."""
        stat = os.statvfs(self._settings.data)
        free, kept = stat.f_bavail * stat.f_frsize, self._settings.min_free
        if free - size < kept:
            text = f"{free} bytes are free, {kept} are kept back"
            raise ServiceError(RESOURCE_EXHAUSTED, "DISK_FULL", text, free=free, min_free=kept)

    def _commit(self, bank: Bank, chunk: Chunk, digest: bytes, connection: Connection) -> tuple[Written, list[Victim]]:
        """Row, evictions and usage in one transaction; also the victims that are left for later."""
        if found := records.find_key(connection, bank.bank_id, chunk.key):
            chunk_id, first_digest, gone = found
            if first_digest != digest:
                text = f"idempotency key {chunk.key.hex()} was used for other content (chunk {chunk_id})"
                raise ServiceError(ALREADY_EXISTS, "KEY_REUSED", text, key=chunk.key.hex(), chunk_id=chunk_id)
            return Written(chunk.key, chunk_id, replayed=True, gone=gone), []
        now, later = self._make_room(bank, chunk, connection)
        if not records.insert_chunk(connection, bank.bank_id, chunk, digest):
            raise _bank_not_found(bank.name)
        return Written(chunk.key, chunk.chunk_id, evicted=tuple(now)), later

    def _make_room(self, bank: Bank, chunk: Chunk, connection: Connection) -> tuple[list[int], list[Victim]]:
        """Evict what the chunk needs, at most MOST_VICTIMS where that is enough; the rest of the plan comes later."""
        bank = self._by_name.get(bank.name, bank)
        if bank.capacity is None or (usage := records.usage(connection, bank.bank_id)) is None:
            return [], []
        size = chunk.payload.length if chunk.payload else 0
        need = {"chunks": 1, "tokens": chunk.stored_length, "bytes": size}[bank.capacity.unit]
        used = int(getattr(usage, bank.capacity.unit))
        if not overflows(bank.capacity, used, need):
            return [], []
        victims = plan(records.candidates(connection, bank.bank_id, bank.capacity), bank.capacity, bank.policy, need)
        excess, cut = used + need - bank.capacity.limit, 0
        while cut < len(victims) and (cut < MOST_VICTIMS or excess > 0):
            excess -= victims[cut].size
            cut += 1
        return _evict(connection, bank.bank_id, victims[:cut]), victims[cut:]

    def _committed(self, bank: Bank, chunk: Chunk, result: tuple[Written, list[Victim]]) -> None:
        written, later = result
        if written.replayed:
            return
        self._indexes.add(bank.bank_id, chunk.chunk_id, chunk.embedding)
        self._forget(bank, written.evicted)
        self._evict_later(bank, later)

    def _evict_later(self, bank: Bank, victims: Sequence[Victim]) -> None:
        """Go on to the target in transactions of their own, between those of others."""
        if not victims:
            return
        batch, rest = victims[:MOST_VICTIMS], victims[MOST_VICTIMS:]

        def applied(gone: list[int]) -> None:
            self._forget(bank, gone)
            self._evict_later(bank, rest)

        self.records.writer.submit(lambda connection: _evict(connection, bank.bank_id, batch), applied)

    def _forget(self, bank: Bank, chunk_ids: Sequence[int]) -> None:
        """After the commit: out of the index, then the files, in the background."""
        if chunk_ids:
            self._indexes.remove(bank.bank_id, chunk_ids)
            self._later(self.payloads.unlink, bank.uid, chunk_ids)

    # Chunks

    def delete_chunks(self, name: str, chunk_ids: Sequence[int]) -> int:
        """How many existed. Errors: BANK_NOT_FOUND, INVALID_FIELD."""
        bank = self.named(name)
        _check_ids(chunk_ids)
        remove = partial(records.remove, bank_id=bank.bank_id, chunk_ids=chunk_ids, counter="chunks_deleted")
        return len(self.records.writer.submit(remove, partial(self._forget, bank)).result())

    def quarantine(self, bank: Bank, chunk_id: int) -> None:
        """Take a damaged chunk out of service and keep its file aside."""
        remove = partial(records.remove, bank_id=bank.bank_id, chunk_ids=[chunk_id], counter="chunks_quarantined")
        self.records.writer.submit(remove, partial(self._indexes.remove, bank.bank_id)).result()
        self.payloads.quarantine(bank.uid, chunk_id)
        _log.error("chunk %d of bank %s is damaged and quarantined", chunk_id, bank.name)

    def get_chunk(self, name: str, chunk_id: int, *, embedding: bool) -> Chunk:
        """Metadata of a chunk. Errors: BANK_NOT_FOUND, CHUNK_NOT_FOUND."""
        bank = self.named(name)
        self.records.flush_counts()
        with self.records.read() as connection:
            chunk = records.chunk(connection, bank, chunk_id, embedding=embedding)
        if chunk is None:
            raise chunk_not_found(name, chunk_id)
        return chunk

    def list_chunks(
        self, name: str, after: int, limit: int, *, embedding: bool, budget: int
    ) -> tuple[list[Chunk], bool]:
        """Ascending by id, from the first one after `after`, of about `budget` bytes; whether there are more."""
        bank = self.named(name)
        self.records.flush_counts()
        page: list[Chunk] = []
        with self.records.read() as connection:
            for chunk in records.page(connection, bank, after, limit + 1, embedding=embedding):
                if len(page) == limit or budget < 0:
                    return page, True
                page.append(chunk)
                budget -= len(chunk.text) * 4 + 2 * len(chunk.token_ids) + len(chunk.embedding) + 2000
        return page, False

    def update_chunk(self, name: str, chunk_id: int, metadata: Mapping[str, str]) -> Chunk:
        """Replace the metadata. Errors: BANK_NOT_FOUND, CHUNK_NOT_FOUND, INVALID_FIELD."""
        bank_id = self.named(name).bank_id
        validate.metadata("metadata", metadata)
        change = partial(records.update_chunk, bank_id=bank_id, chunk_id=chunk_id, metadata=metadata)
        if not self.records.writer.submit(change).result():
            raise chunk_not_found(name, chunk_id)
        return self.get_chunk(name, chunk_id, embedding=False)

    # Evictions

    def explain_eviction(self, name: str, need: int) -> tuple[list[Eviction], str]:
        """What a write of `need` would evict, in order (at most MOST_EXPLAINED of it), and a sentence about it."""
        bank = self.get(name)
        if bank.capacity is None:
            return [], ""
        self.records.flush_counts()
        with self.records.read() as connection:
            chunks = records.candidates(connection, bank.bank_id, bank.capacity)
            try:
                victims = plan(chunks, bank.capacity, bank.policy, need)
            except ServiceError as refusal:
                return [], refusal.message
            reasons = {victim.chunk_id: victim.reason for victim in victims[:MOST_EXPLAINED]}
            rows = {row.chunk_id: row for row in records.eviction_rows(connection, bank.bank_id, list(reasons))}
        if not victims:
            return [], ""
        parts = ", ".join(f"{count} {reason}" for reason, count in Counter(victim.reason for victim in victims).items())
        used = f"{sum(chunk.size for chunk in chunks)} of {bank.capacity.limit} {bank.capacity.unit}"
        text = f"{len(victims)} of {len(chunks)} chunks would go ({parts}): {used} used, {need} asked for"
        return [records.eviction(rows[chunk_id], reason, None) for chunk_id, reason in reasons.items()], text

    def list_evictions(self, name: str, before: int, limit: int) -> list[tuple[int, Eviction]]:
        """(sequence, eviction), newest first. Errors: BANK_NOT_FOUND."""
        with self.records.read() as connection:
            return records.evictions(connection, self.named(name).bank_id, before, limit)

    # The index and the folder

    def index(self, bank: Bank) -> BankIndex:
        """The bank's index, loaded from the records on first use."""

        def load() -> BankIndex:
            # Again, because a call before this one in the queue may have loaded it.
            if (index := self._indexes.get(bank.bank_id)) is not None:
                return index
            with self.records.read() as connection:
                return self._indexes.load(bank.bank_id, *records.embeddings(connection, bank))

        index = self._indexes.get(bank.bank_id)
        return self.records.writer.between(load).result() if index is None else index

    def _remember(self, bank: Bank) -> None:
        self._by_name[bank.name] = bank

    def _sweep(self) -> None:
        def known() -> dict[str, set[int]]:
            with self.records.read() as connection:
                return records.payload_ids(connection)

        if removed := self.payloads.sweep(known, self.records.ids.first):
            _log.warning("removed %d files that no chunk owns", removed)

    def _later(self, task: Callable[..., None], *arguments: object) -> None:
        """Clean up in the background; what fails is logged, and left to the sweep of the next start."""

        def run() -> None:
            try:
                task(*arguments)
            except Exception:
                _log.exception("the clean-up of the data folder failed")

        self._janitor.submit(run)


def chunk_not_found(name: str, chunk_id: int) -> ServiceError:
    """CHUNK_NOT_FOUND."""
    return ServiceError(NOT_FOUND, "CHUNK_NOT_FOUND", f"bank {name} has no chunk {chunk_id}", chunk_id=chunk_id)


def _bank_not_found(name: str) -> ServiceError:
    return ServiceError(NOT_FOUND, "BANK_NOT_FOUND", f"there is no bank {name!r}", bank=name)


def _create(new: Bank, connection: Connection) -> Bank:
    found = records.bank_named(connection, new.name)
    if found is None:
        return replace(new, bank_id=records.insert_bank(connection, new))
    if (found.kv, found.embedding) != (new.kv, new.embedding):
        text = f"there is a bank {new.name!r} with another spec"
        raise ServiceError(
            ALREADY_EXISTS,
            "BANK_EXISTS",
            text,
            bank_digest=found.kv.reader_digest,
            request_digest=new.kv.reader_digest,
        )
    return found


def _evict(connection: Connection, bank_id: int, victims: Sequence[Victim]) -> list[int]:
    """Log and remove; those that still existed."""
    gone: list[int] = []
    for begin in range(0, len(victims), MOST_VICTIMS):
        batch = {victim.chunk_id: victim.reason for victim in victims[begin : begin + MOST_VICTIMS]}
        records.log_evictions(connection, bank_id, batch)
        gone += records.remove(connection, bank_id, list(batch), "chunks_evicted")
    return gone


def _request_digest(chunk: Chunk) -> bytes:
    """Of all that the caller said, tensors by their checksums: equal exactly for a repeated request."""
    payload = chunk.payload
    said = [
        (chunk.start, chunk.original_length, chunk.stored_length, chunk.text, sorted(chunk.metadata.items())),
        [astuple(replace(tensor, offset=0)) for tensor in payload.tensors] if payload else None,
        astuple(payload.producer) if payload else None,
        (len(chunk.token_ids), len(chunk.embedding)),
    ]
    digest = xxhash.xxh3_128(json.dumps(said).encode())
    digest.update(chunk.token_ids)
    digest.update(chunk.embedding)
    return digest.digest()


def _check_ids(chunk_ids: Sequence[int]) -> None:
    if not 1 <= len(chunk_ids) <= validate.MOST_IDS:
        raise invalid("chunk_ids", f"must have 1 to {validate.MOST_IDS} ids")


def _first(future: "Future[tuple[Written, list[Victim]]]") -> "Future[Written]":
    """The caller's part of a commit's result."""
    mine: Future[Written] = Future()
    mine.set_running_or_notify_cancel()

    def hand_over(done: "Future[tuple[Written, list[Victim]]]") -> None:
        if error := done.exception():
            mine.set_exception(error)
        else:
            mine.set_result(done.result()[0])

    future.add_done_callback(hand_over)
    return mine
