"""A bank gets another embedder here: its chunks are copied with new vectors into a bank beside it, which then takes its
name in one step.

This file owns the rule that nothing is lost on the way: the old bank answers and is written to until the new one has
all that it has, and a run that was killed goes on where it was, because a copy has the idempotency key of its original.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice

from kvbank import _models as m
from kvbank._client import Client
from kvbank._exceptions import AlreadyExists, BankNotFound, ChunkNotFound, FailedPrecondition
from kvbank._texts.memory import MOST_IDS
from kvbank._texts.texts import EMBEDDER, named
from kvbank.embed import AnyEmbedder, Embedder, embedded, embedder
from kvbank.wire.scalars import Scalar

SUFFIX = "~reembed"
# In the metadata of the new bank while it is made: the uid of the bank that it is made of.
_OF = "reembed_of"
# Chunks that are copied at once: of texts, and of K-V, which are in memory meanwhile.
_TEXTS, _TENSORS = 64, 8
# How often the bank may change between the last look at it and the switch.
_TRIES = 50

Progress = Callable[[int, int], object]


@dataclass(slots=True)
class _Copy:
    """What is known of a copy: the id of its chunk, and what may be changed of the original."""

    chunk_id: int
    metadata: dict[str, Scalar]
    pinned: bool


def reembed(client: Client, bank: str, embed: AnyEmbedder, *, progress: Progress | None = None) -> m.Bank:
    """Give a bank another embedder, and return the bank as it is then; where it has that embedder, nothing is done.

    The bank is searched and written to by the old embedder meanwhile. A call that was interrupted, or killed, is made
    again and goes on. Texts, token ids, K-V, metadata, pins, idempotency keys, times of expiry, order and settings
    stay; ids, times of writing and retrieval counts are new. Until the end there are two banks, which take twice the
    room. Writes and deletions of the meantime are never lost; a change of metadata, or a pin, is where it comes between
    the last look at the bank, which reads it once, and the switch.
    progress: called with the chunks that are done, and all.
    Errors: FailedPrecondition for a bank with a chunk without text, which cannot be embedded anew, or that is written
    to without a pause; AlreadyExists where the bank was begun for another embedder.
    """
    made = embedder(embed)
    seen = client.get_bank(bank)
    if _is_of(seen, made):
        return seen
    return _Reembedding(client, seen, made, _beside(client, seen, made), progress).run(named(embed))


def _is_of(bank: m.Bank, made: Embedder) -> bool:
    return (bank.embedding.embedder_digest, bank.embedding.dimension) == (made.digest, made.dimension)


def _beside(client: Client, seen: m.Bank, made: Embedder) -> m.Bank:
    """Return the bank beside, made now or by an earlier run. Errors: AlreadyExists for one of another run."""
    name = seen.name + SUFFIX
    try:
        found = client.get_bank(name)
    except BankNotFound:
        spec = m.EmbeddingSpec(made.digest, made.dimension)
        found = client.create_bank(name, kv=seen.kv, embedding=spec, metadata={_OF: seen.uid}, exist_ok=True)
    if found.metadata.get(_OF) != seen.uid or not _is_of(found, made):
        text = f"bank {name!r} is there already, for another bank or embedder: delete it, or go on with that one"
        raise AlreadyExists(text, reason="BANK_EXISTS", metadata={"bank": name})
    return found


@dataclass(slots=True)
class _Reembedding:
    """One run of a copy, from the bank `old` to the bank `new` beside it."""

    client: Client
    old: m.Bank
    made: Embedder
    new: m.Bank
    progress: Progress | None

    def run(self, about: dict[str, Scalar]) -> m.Bank:
        """Copy until the new bank has all of the old one, and switch. about: metadata that name the embedder."""
        chunks = self.client.list_chunks(self.new.name)
        copies = {chunk.idempotency_key: _copy_of(chunk) for chunk in chunks}
        for _ in range(_TRIES):
            seen = self.client.get_bank(self.old.name)
            if self._bring_up_to_date(seen, copies):
                continue  # copying takes long: look once more at what was changed meanwhile
            metadata = {key: value for key, value in seen.metadata.items() if key != EMBEDDER} | about
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
        size = _TEXTS if seen.kv is None else _TENSORS
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
                text = f"bank {self.old.name!r} has no text for chunk {chunk.chunk_id}: it cannot be embedded anew"
                raise FailedPrecondition(text, metadata={"chunk_id": str(chunk.chunk_id)})
        vectors = embedded(self.made, [chunk.text for chunk in chunks])
        tensors = self._tensors(chunks)
        now = datetime.now(UTC)
        pairs = [
            (chunk, _anew(chunk, vector, tensors.get(chunk.chunk_id), now))
            for chunk, vector in zip(chunks, vectors, strict=True)
            if self.old.kv is None or chunk.chunk_id in tensors
        ]
        written = self.client.write_many(
            self.new.name,
            [new for _, new in pairs],
            reader_digest=self.old.kv.reader_digest if self.old.kv else "",
            embedder_digest=self.made.digest,
        )
        for (chunk, _), result in zip(pairs, written, strict=True):
            yield chunk, result.chunk_id

    def _tensors(self, chunks: list[m.Chunk]) -> dict[int, dict[str, object]]:
        """Fetch the K-V of those chunks that are still there; nothing from a bank of vectors only."""
        if self.old.kv is None:
            return {}
        ids = [chunk.chunk_id for chunk in chunks]
        reader = self.old.kv.reader_digest
        try:
            found = self.client.fetch(self.old.name, ids, reader_digest=reader)
        except ChunkNotFound:
            if len(chunks) == 1:
                return {}
            return {key: value for chunk in chunks for key, value in self._tensors([chunk]).items()}
        return {chunk.chunk_id: chunk.tensors or {} for chunk in found}


def _copy_of(chunk: m.Chunk) -> _Copy:
    return _Copy(chunk.chunk_id, dict(chunk.metadata), chunk.pinned)


def _anew(chunk: m.Chunk, vector: object, tensors: dict[str, object] | None, now: datetime) -> m.NewChunk:
    """Return the chunk with another vector. A time to live that is renewed by use begins anew; another one goes on."""
    expiry = chunk.expiry
    if expiry is not None and expiry.ttl is not None and not expiry.renew and chunk.expire_time is not None:
        expiry = m.Expiry(max(chunk.expire_time - now, timedelta(milliseconds=1)))
    return m.NewChunk(
        vector,  # type: ignore[arg-type]
        tensors,
        start=chunk.start,
        original_length=chunk.original_length,
        token_ids=chunk.token_ids,
        text=chunk.text,
        metadata=chunk.metadata,
        producer=chunk.producer,
        pinned=chunk.pinned,
        expiry=expiry,
        idempotency_key=chunk.idempotency_key,
        if_absent=True,
    )
