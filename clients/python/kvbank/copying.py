"""A bank is made again here: its chunks are copied, each in a new form, into a bank beside it, which then takes its
name in one step.

This file owns the rule that nothing is lost on the way: the old bank answers and is written to until the new one has
all that it has, and a run that was killed goes on where it was, because a copy has the idempotency key of its original.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Protocol

from kvbank import _models as m
from kvbank._client import Client
from kvbank._exceptions import AlreadyExists, BankNotFound, FailedPrecondition
from kvbank.wire.scalars import Scalar

# Chunks that one request may name.
MOST_IDS = 1000
# How often the bank may change between the last look at it and the switch.
_TRIES = 50

Progress = Callable[[int, int], object]


class Renewal(Protocol):
    """What a bank becomes.

    word: what may be new, such as "bank or embedder". suffix: with the name of the bank it is that of the bank beside.
    marks: metadata of the bank beside, which say of which bank it is made, and how, as far as its specs do not. kv,
    embedding: its specs. metadata: of the bank from the switch on. at_once: chunks that are copied at once, which are
    in memory meanwhile.
    """

    word: str
    suffix: str
    kv: m.KVSpec | None
    embedding: m.EmbeddingSpec
    at_once: int

    @property
    def marks(self) -> dict[str, Scalar]:
        """Return the metadata of the bank beside."""

    def metadata(self, old: m.Bank) -> dict[str, Scalar]:
        """Return the metadata of the bank from the switch on. old: the bank as it is now."""

    def renewed(self, chunks: list[m.Chunk], new: m.Bank) -> Iterable[tuple[m.Chunk, m.NewChunk]]:
        """Yield chunks with what they become in the bank `new` (see `anew`), without those that are gone meanwhile."""


def renew(client: Client, seen: m.Bank, renewal: Renewal, progress: Progress | None = None) -> m.Bank:
    """Make a bank again, and return it as it is then. It answers, and is written to, as it was until all is there.

    A call that was interrupted, or killed, is made again and goes on. Texts, metadata, pins, idempotency keys, times of
    expiry, order and settings stay; ids, times of writing and retrieval counts are new. progress: called with the
    chunks that are done, and all.
    Errors: FailedPrecondition for a bank with a chunk without text, or that is written to without a pause;
    AlreadyExists where a bank beside was begun for something else.
    """
    return _Copying(client, seen, renewal, _beside(client, seen, renewal), progress).run()


def anew(chunk: m.Chunk, vector: Any, tensors: Any, **changes: Any) -> m.NewChunk:
    """Return a chunk with another vector and other tensors, to be written once. changes: of its other fields.

    A time to live that is renewed by use begins anew; another one goes on.
    """
    expiry = chunk.expiry
    if expiry is not None and expiry.ttl is not None and not expiry.renew and chunk.expire_time is not None:
        left = chunk.expire_time - datetime.now(UTC)
        expiry = m.Expiry(max(left, timedelta(milliseconds=1)))
    names = ("start", "original_length", "token_ids", "text", "metadata", "producer", "pinned", "idempotency_key")
    fields = {name: getattr(chunk, name) for name in names}
    return m.NewChunk(vector, tensors, **{**fields, "expiry": expiry, "if_absent": True, **changes})


def _beside(client: Client, seen: m.Bank, renewal: Renewal) -> m.Bank:
    """Return the bank beside, made now or by an earlier run. Errors: AlreadyExists for one of another run."""
    name = seen.name + renewal.suffix
    try:
        found = client.get_bank(name)
    except BankNotFound:
        marks = renewal.marks
        found = client.create_bank(name, kv=renewal.kv, embedding=renewal.embedding, metadata=marks, exist_ok=True)
    if not renewal.marks.items() <= found.metadata.items() or not is_of(found, renewal.kv, renewal.embedding):
        text = f"bank {name!r} is there already, for another {renewal.word}: delete it, or go on with that one"
        raise AlreadyExists(text, reason="BANK_EXISTS", metadata={"bank": name})
    return found


def is_of(bank: m.Bank, kv: m.KVSpec | None, embedding: m.EmbeddingSpec) -> bool:
    """Tell whether a bank has K-V of this model, its layers and this dtype (None: no K-V) and is searched by this
    embedder."""
    readers = [None if spec is None else (spec.reader_digest, tuple(spec.layers), spec.dtype) for spec in (bank.kv, kv)]
    own = bank.embedding
    same = (own.embedder_digest, own.dimension) == (embedding.embedder_digest, embedding.dimension)
    return readers[0] == readers[1] and same


@dataclass(slots=True)
class _Copy:
    """What is known of a copy: the id of its chunk, and what may be changed of the original."""

    chunk_id: int
    metadata: dict[str, Scalar]
    pinned: bool


@dataclass(slots=True)
class _Copying:
    """One run of a copy, from the bank `old` to the bank `new` beside it."""

    client: Client
    old: m.Bank
    renewal: Renewal
    new: m.Bank
    progress: Progress | None

    def run(self) -> m.Bank:
        """Copy until the new bank has all of the old one, and switch."""
        chunks = self.client.list_chunks(self.new.name)
        copies = {chunk.idempotency_key: _copy_of(chunk) for chunk in chunks}
        for _ in range(_TRIES):
            seen = self.client.get_bank(self.old.name)
            if self._bring_up_to_date(seen, copies):
                continue  # copying takes long: look once more at what was changed meanwhile
            metadata = self.renewal.metadata(seen)
            try:
                return self.client.replace_bank(seen, self.client.get_bank(self.new.name), metadata=metadata)
            except FailedPrecondition as error:
                if error.reason != "BANK_CHANGED":
                    raise
        raise FailedPrecondition(f"bank {self.old.name!r} is written to without a pause: try again when it rests")

    def _bring_up_to_date(self, seen: m.Bank, copies: dict[bytes, _Copy]) -> bool:
        """Copy what is missing, delete what is gone, change what was changed; return whether something was copied."""
        gone, total, done, known = dict(copies), seen.usage.chunks, 0, len(copies)
        chunks = self.client.list_chunks(seen.name)
        size = self.renewal.at_once
        while batch := list(islice(chunks, MOST_IDS)):
            missing = []
            for chunk in batch:
                gone.pop(chunk.idempotency_key, None)
                if (copy := copies.get(chunk.idempotency_key)) is None:
                    missing.append(chunk)
                else:
                    self._change(chunk, copy)
            done += len(batch) - len(missing)
            for begin in range(0, len(missing), size):
                some = missing[begin : begin + size]
                for chunk, chunk_id in self._copied(some):
                    copies[chunk.idempotency_key] = replace(_copy_of(chunk), chunk_id=chunk_id)
                done += len(some)
                if self.progress is not None:
                    self.progress(min(done, total), total)
        copied = len(copies) > known
        for begin in range(0, len(gone), MOST_IDS):
            keys = list(gone)[begin : begin + MOST_IDS]
            self.client.delete_chunks(self.new.name, [copies.pop(key).chunk_id for key in keys])
        return copied

    def _change(self, chunk: m.Chunk, copy: _Copy) -> None:
        if copy.metadata != dict(chunk.metadata):
            self.client.update_chunk(self.new.name, copy.chunk_id, chunk.metadata)
            copy.metadata = dict(chunk.metadata)
        if copy.pinned != chunk.pinned:
            self.client.pin_chunks(self.new.name, [copy.chunk_id], chunk.pinned)
            copy.pinned = chunk.pinned

    def _copied(self, chunks: list[m.Chunk]) -> Iterator[tuple[m.Chunk, int]]:
        """Write copies of some chunks, and yield each chunk with the id of its copy; those that are gone are left out.
        Errors: FailedPrecondition for a chunk without text, after the bank beside was removed."""
        for chunk in chunks:
            if not chunk.text:
                self.client.delete_bank(self.new.name, missing_ok=True)
                text = f"bank {self.old.name!r} has no text for chunk {chunk.chunk_id}: it cannot be made anew"
                raise FailedPrecondition(text, metadata={"chunk_id": str(chunk.chunk_id)})
        pairs = list(self.renewal.renewed(chunks, self.new))
        written = self.client.write_many(
            self.new.name,
            [new for _, new in pairs],
            reader_digest=self.renewal.kv.reader_digest if self.renewal.kv else "",
            embedder_digest=self.renewal.embedding.embedder_digest,
        )
        for (chunk, _), result in zip(pairs, written, strict=True):
            yield chunk, result.chunk_id


def _copy_of(chunk: m.Chunk) -> _Copy:
    return _Copy(chunk.chunk_id, dict(chunk.metadata), chunk.pinned)
