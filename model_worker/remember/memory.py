"""Remember and recall: the worker's loop over the SDK.

A chunk's way to the disk: captured by the cache, compressed, embedded, written (or spooled while the service is away).
A query's way back: embedded, retrieved, and handed to the cache, which rotates it into attention.

This file owns the rule that no trouble with the service ends a generation: what the service cannot take now waits in
the spool, what it refuses is dropped, a recall that fails leaves attention with what it has; each with a warning.
`strict` raises instead.
"""

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from torch import Tensor

import kvbank
from model_worker.arguments import choice, finite, flag, of_kind, token_rows, whole, words
from model_worker.attachment.attachment import Attachment
from model_worker.compress import Compressor
from model_worker.compress import compressor as compressor_named
from model_worker.errors import BankMismatch, InputError, SpoolFull
from model_worker.remember import stored
from model_worker.remember.embedding import Embedder, LexicalEmbedder, of_bank
from model_worker.remember.embedding import embedder as embedder_named
from model_worker.remember.payload_cache import PayloadCache
from model_worker.remember.spool import Spool, Spooled
from model_worker.tensors import DTYPES, NAMES, to_numpy
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk

if TYPE_CHECKING:
    from model_worker.icae import Icae, Slots

_AWAY = (kvbank.Unavailable, kvbank.DeadlineExceeded, kvbank.DiskFull)
_PATIENCE_S, _STRICT_PATIENCE_S = 2.0, 10.0
START_S = 3.0  # for a first answer, so that a service that is not there is noticed soon
_LONGEST_PAUSE_S = 60.0
# How often the same chunk of a source can be deleted and stored again while the service knows its keys (a day): a
# service that says for ever that it has gone does not hold up its worker for ever.
_TIMES_AGAIN = 1000


@dataclass(slots=True)
class MemoryStats:
    """What one worker did so far.

    written: chunks that were stored. again: those among them that had been stored before and were deleted, evicted or
    had expired since. gone: chunks out of the spool that had been stored and were gone since, and stayed so. evicted:
    by this worker's writes, not what the service evicts after them. recall_seconds: latencies of the last recalls.
    """

    written: int = 0
    again: int = 0
    gone: int = 0
    evicted: int = 0
    spooled: int = 0
    dropped: int = 0
    recalls: int = 0
    failed_recalls: int = 0
    tokens: int = 0
    stored_tokens: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    recall_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=4096))


class Memory:
    """One worker's access to a bank (or one bank a batch row).

    tokenizer: turns a chunk's ids into the text that is embedded. compressor: see compress/. chunk: tokens a chunk.
    top_k: chunks a query. cadence: decode steps between recalls (a chunk). query_tokens: at most so many of the last
    tokens are the query (a chunk). query: `with_input` (they include the tokens about to be processed, as in MemLong)
    or `past` (only what came before them: use it to measure loss honestly). context: `isolated` (a chunk is encoded
    alone; default in mode memlong) or `window` (as it stood in the local window). count: whether recalls count for
    eviction. source: names the text; a chunk of it that is written again, after a crash, is stored once, and one that
    was deleted, evicted or had expired since is stored again (counted in `stats.again`).
    spool: where chunks wait while the service is away; without one they are dropped and counted. strict: raise when the
    service is away. patience: seconds that one call may take; by default 2, so that a conversation goes on, and 10 with
    strict. retry_after: seconds after which a lost service is asked again, at first; the pause doubles up to a minute.
    """

    def __init__(
        self,
        attachment: Attachment,
        client: kvbank.Client,
        bank: str | Sequence[str],
        tokenizer: object,
        *,
        embedder: Embedder | None = None,
        compressor: str | Compressor = "none",
        chunk: int = 64,
        top_k: int = 4,
        cadence: int | None = None,
        query_tokens: int | None = None,
        query: str = "with_input",
        context: str | None = None,
        count: bool = True,
        min_score: float | None = None,
        metadata: Mapping[str, str] | None = None,
        source: str | None = None,
        spool: Spool | None = None,
        strict: bool = False,
        patience: float | None = None,
        retry_after: float = 2.0,
        payload_cache: PayloadCache | None = None,
    ):
        if context is None:
            context = "isolated" if attachment.plan.mode == "memlong" else "window"
        self.chunk, self.top_k = whole("chunk", chunk), whole("top_k", top_k)
        self.cadence = whole("cadence", self.chunk if cadence is None else cadence)
        self.query_tokens = whole("query_tokens", self.chunk if query_tokens is None else query_tokens)
        self.attachment, self.client, self.tokenizer = attachment, client, tokenizer
        self.bank = bank if isinstance(bank, str) else words("bank", bank)
        self.embedder = LexicalEmbedder() if embedder is None else embedder_named(embedder)
        named = compressor_named(compressor) if isinstance(compressor, str) else compressor
        self.compressor = of_kind("compressor", named, Compressor)
        self.context = choice("context", context, ("isolated", "window"))
        self.query = choice("query", query, ("with_input", "past"))
        self.count, self.strict = flag("count", count), flag("strict", strict)
        self.min_score = None if min_score is None else finite("min_score", min_score)
        self.metadata = _metadata(metadata)
        self.spool = None if spool is None else of_kind("spool", spool, Spool)
        self.source = None if source is None else of_kind("source", source, str)
        patience = (_STRICT_PATIENCE_S if strict else _PATIENCE_S) if patience is None else patience
        self.patience, self.retry_after = finite("patience", patience, above=0.0), finite("retry_after", retry_after)
        self.stats = MemoryStats()
        self._payloads = (
            PayloadCache() if payload_cache is None else of_kind("payload_cache", payload_cache, PayloadCache)
        )
        self._store_id = ""
        self._retry_at = 0.0
        self._pause = self.retry_after
        self._dtype = DTYPES["fp32"]

    @property
    def needs_queries(self) -> bool:
        """Whether the compressor reads queries."""
        return self.compressor.needs_queries

    # -- the bank -------------------------------------------------------------------------------------------------

    def open(
        self,
        *,
        capacity: kvbank.Capacity | None = None,
        policy: kvbank.Policy | None = None,
        dtype: str | None = None,
    ) -> list[kvbank.Bank]:
        """Use the bank if it exists and fits this model and embedder, else create it with these settings.

        dtype: of stored K-V, by default the model's. Returns the bank, or those of the rows. Raises BankMismatch with
        both digests named.
        """
        if dtype is not None:
            choice("dtype", dtype, DTYPES)
        model_dtype = next(self.attachment.model.parameters()).dtype
        embeddings: Any = self.attachment.model.get_input_embeddings()  # type: ignore[operator]
        wanted = kvbank.KVSpec(
            reader_digest=self.attachment.reader.digest,
            layers=self.attachment.plan.memory_layers,
            kv_heads=self.attachment.kv_heads,
            head_dim=self.attachment.head_dim,
            dtype=dtype or NAMES[model_dtype],
            reader_parts=self.attachment.reader.parts,
            hidden_size=embeddings.weight.shape[1],
        )
        banks = []
        for name in self._banks():
            embedding = kvbank.EmbeddingSpec(self.embedder.digest, self.embedder.dimension)
            try:
                bank = self.client.get_bank(name, timeout=START_S)
                self.embedder = of_bank(self.embedder, bank.embedding.embedder_digest)
            except kvbank.BankNotFound:
                bank = self.client.create_bank(
                    name,
                    kv=wanted,
                    embedding=embedding,
                    capacity=capacity,
                    policy=policy,
                    exist_ok=True,
                    timeout=max(START_S, self.patience),
                )
            _check_fits(bank, wanted, self.embedder.digest, dtype)
            assert bank.kv is not None
            self._dtype = DTYPES[bank.kv.dtype]
            self.compressor = self.compressor.for_bank(self.attachment, bank, self.chunk)
            banks.append(bank)
        return banks

    def _banks(self) -> list[str]:
        return [self.bank] if isinstance(self.bank, str) else list(self.bank)

    def _bank_of(self, row: int) -> str:
        if isinstance(self.bank, str):
            return self.bank
        if row >= len(self.bank):
            raise InputError(f"row {row} of the batch has no bank: {len(self.bank)} were given")
        return self.bank[row]

    # -- remember -------------------------------------------------------------------------------------------------

    def remember(self, rows: Sequence[Captured | None]) -> None:
        """Compress, embed and write what left the local window; one entry a batch row."""
        self.attachment.check_unchanged(whole=True)
        for row, captured in enumerate(of_kind("rows", rows, Sequence)):
            if captured is not None:
                of_kind(f"rows[{row}]", captured, Captured)
            if captured is None:
                continue
            alone = self.context == "isolated" and not self.compressor.encodes  # else it runs the model itself
            if alone and captured.context != "isolated":
                captured = encode(self.attachment, captured.token_ids, captured.start, self.needs_queries)  # noqa: PLW2901
            self._write(self._bank_of(row), self._new_chunk(captured))

    def _new_chunk(self, captured: Captured) -> kvbank.NewChunk:
        payload = self.compressor.compress(captured, self.attachment)
        text = str(self.tokenizer.decode(captured.token_ids))  # type: ignore[attr-defined]
        tensors = stored.tensors_of(payload, self._dtype)
        self._account(len(captured), tensors)
        key: dict[str, Any] = {} if self.source is None else {"idempotency_key": self._key(captured)}
        return kvbank.NewChunk(
            embedding=embedded(self.embedder, [text])[0],
            tensors=tensors,
            start=captured.start,
            original_length=len(captured),
            token_ids=captured.token_ids,
            text=text,
            metadata=self.metadata,
            producer=kvbank.Producer(
                payload.method,
                payload.version,
                "isolated" if self.compressor.encodes else captured.context,
                payload.adapter_digest,
                measured_loss=payload.measured_loss,
            ),
            **key,
        )

    def _key(self, captured: Captured) -> bytes:
        return xxhash.xxh3_128_digest(f"{self.source} {captured.start} {captured.token_ids}".encode())

    def _account(self, tokens: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Bytes of K-V, or of what stands for them: positions are not counted."""
        kept = {name: array for name, array in tensors.items() if name[:3] != "pos"}
        pair = 2 * self.attachment.kv_heads * self.attachment.head_dim * self._dtype.itemsize
        self.stats.tokens += tokens
        self.stats.stored_tokens += max(array.shape[name != "soft"] for name, array in kept.items())
        self.stats.bytes_before += tokens * pair * len(self.attachment.plan.memory_layers)
        self.stats.bytes_after += sum(array.nbytes for array in kept.values())

    def _write(self, bank: str, chunk: kvbank.NewChunk) -> None:
        digests = self.attachment.reader.digest, self.embedder.digest
        new = Spooled(bank, chunk, *digests, renewable=self.source is not None)
        if self.strict:
            self._deliver(new)
            return
        if self._worth_trying() and self.deliver_spooled():
            try:
                self._deliver(new)
                return
            except _AWAY as error:
                self._away(error)
            except kvbank.ServiceError as error:
                self._drop(error)
                return
        self._spool(new)

    def _deliver(self, new: Spooled) -> None:
        """Write a chunk, once, whatever became of earlier writes under its key.

        A key that follows from the source stays the same when the source is read again. Where its chunk is gone, the
        chunk is stored again under the key that follows on it, so that a crash repeats that one.
        """
        chunk, written, times = new.chunk, self.stats.written, 0
        while (gone := self._attempt(new, chunk)) and new.renewable and times < _TIMES_AGAIN:
            chunk, times = replace(chunk, idempotency_key=_next_key(chunk.idempotency_key)), times + 1
        self.stats.again += times > 0 and self.stats.written > written
        self.stats.gone += gone

    def _attempt(self, new: Spooled, chunk: kvbank.NewChunk) -> bool:
        """Write a chunk under its key; whether the key was used for one that is gone by now."""
        try:
            result = self.client.write(
                new.bank,
                chunk,
                reader_digest=new.reader_digest,
                embedder_digest=new.embedder_digest,
                timeout=self.patience,
            )
        except kvbank.AlreadyExists as error:
            if not new.renewable:
                raise
            # These tokens of the source were written; encoded again, their K-V differ in the last bits.
            return self._is_gone(new.bank, error)
        self.stats.written += not result.replayed
        self.stats.evicted += len(result.evicted)
        return result.gone

    def _is_gone(self, bank: str, error: kvbank.AlreadyExists) -> bool:
        """Whether the chunk that an idempotency key was first used for is not in the bank any more."""
        try:
            self.client.get_chunk(bank, int(error.metadata.get("chunk_id", 0)), timeout=self.patience)
        except kvbank.ChunkNotFound:
            return True
        return False

    def _spool(self, new: Spooled) -> None:
        if self.spool is None:
            self.stats.dropped += 1
            return
        try:
            self.spool.put(new)
            self.stats.spooled += 1
        except (SpoolFull, OSError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        self.stats.dropped += 1
        warnings.warn(f"a chunk was not remembered: {error}", RuntimeWarning, stacklevel=2)

    def deliver_spooled(self) -> bool:
        """Deliver what waits on disk, oldest first; true when nothing waits any more."""
        if self.spool is None or not len(self.spool):
            return True
        if self._retry_at and not self._back(START_S):
            return False
        for path, waiting in self.spool:
            try:
                self._deliver(waiting)
            except _AWAY as error:
                self._away(error)
                return False
            except kvbank.ServiceError as error:
                self.stats.dropped += 1
                self.spool.set_aside(path, str(error))
            else:
                self.spool.done(path)
        return True

    @property
    def away(self) -> bool:
        """Whether the service did not answer when it was asked last."""
        return self._retry_at > 0

    def _away(self, error: kvbank.ServiceError) -> None:
        warnings.warn(f"the memory service is away: {error}", RuntimeWarning, stacklevel=2)
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, max(_LONGEST_PAUSE_S, self.retry_after))

    def _worth_trying(self) -> bool:
        """A lost service is asked again only after a pause, so that it does not hold up every token."""
        return time.monotonic() >= self._retry_at and (not self._retry_at or self._back(self.patience / 4))

    def _back(self, timeout: float) -> bool:
        """Whether a lost service answers again. Asked in one short call, not with a write and its repetitions."""
        try:
            self.client.server_info(timeout=timeout)
        except kvbank.ServiceError as error:
            self._away(error)
            return False
        self._retry_at, self._pause = 0.0, self.retry_after
        return True

    # -- recall ---------------------------------------------------------------------------------------------------

    def recall(self, rows: Sequence[Sequence[int]]) -> list[list[RecalledChunk]] | None:
        """The `top_k` chunks for each row's query tokens, ascending by id; None when the service could not say."""
        self.attachment.check_unchanged()
        rows = token_rows("rows", rows)
        if not self.strict and not self._worth_trying():
            self.stats.failed_recalls += 1
            return None
        begin = time.perf_counter()
        try:
            found = self._retrieve(rows)
        except kvbank.ServiceError as error:
            if self.strict:
                raise
            self.stats.failed_recalls += 1
            if isinstance(error, _AWAY):
                self._away(error)
            else:
                warnings.warn(f"nothing was recalled: {error}", RuntimeWarning, stacklevel=2)
            return None
        self.stats.recalls += 1
        self.stats.recall_seconds.append(time.perf_counter() - begin)
        return found

    def _retrieve(self, rows: Sequence[Sequence[int]]) -> list[list[RecalledChunk]]:
        texts = [str(self.tokenizer.decode(list(ids))) for ids in rows]  # type: ignore[attr-defined]
        vectors = embedded(self.embedder, texts)
        found: list[list[RecalledChunk]] = [[] for _ in rows]
        rows_of: dict[str, list[int]] = {}
        for row in np.flatnonzero(vectors.any(axis=1)).tolist():  # a query without a word finds nothing
            rows_of.setdefault(self._bank_of(row), []).append(row)
        for bank, members in rows_of.items():
            for row, chunks in zip(members, self._retrieve_from(bank, vectors[members]), strict=True):
                found[row] = chunks
        return found

    def _retrieve_from(self, bank: str, vectors: np.ndarray) -> list[list[RecalledChunk]]:
        answer = self.client.retrieve(
            bank,
            vectors,
            top_k=self.top_k,
            min_score=self.min_score,
            count=self.count,
            held=kvbank.Held(self._store_id, self._payloads.held(self._store_id)),
            reader_digest=self.attachment.reader.digest,
            embedder_digest=self.embedder.digest,
            timeout=self.patience,
        )
        self._store_id = answer.store_id
        held_first = sorted(answer.chunks.values(), key=lambda chunk: chunk.tensors is not None)
        chunks = {chunk.chunk_id: self._recalled(chunk) for chunk in held_first}  # new payloads may push held ones out
        return [sorted((chunks[hit.chunk_id] for hit in hits), key=lambda c: c.chunk_id) for hits in answer.queries]

    def _recalled(self, chunk: kvbank.Chunk) -> RecalledChunk:
        if chunk.tensors is None:
            held = self._payloads.get(self._store_id, chunk.chunk_id, chunk.checksum)
            assert held is not None, "the service left out bytes that were not held"
            return held
        recalled = RecalledChunk(chunk.chunk_id, chunk.start, stored.layers_of(chunk.tensors, self.attachment))
        self._payloads.put(self._store_id, chunk.checksum, recalled)
        return recalled

    def slots(self, chunk_ids: Sequence[int], icae: "Icae", *, row: int = 0) -> list["Slots"]:
        """What `icae.answer` takes of these chunks, in this order: their memory slots, or an uncompressed chunk whole.

        The frozen model reads all of them, behind a prefix, in one forward: exactly, which attention to the K-V of
        isolated chunks is not. row: of the batch, whose bank it is. Raises BankMismatch for a chunk of another adapter
        than `icae`, InputError for one that holds something else.
        """
        from model_worker.icae import Icae

        of_kind("icae", icae, Icae)
        reader = self.attachment.reader.digest
        found = self.client.fetch(self._bank_of(row), chunk_ids, reader_digest=reader, timeout=self.patience)
        return [stored.slots_of(chunk, self.attachment, icae) for chunk in found]


def embedded(embedder: Embedder, texts: list[str]) -> np.ndarray:
    """The embedder's vectors of `texts`, `[n, dimension]` float32. Raises InputError where it returns others."""
    found = embedder.embed(texts)
    if isinstance(found, Tensor):
        found = to_numpy(found.float())
    try:
        vectors = np.asarray(found, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"the embedder returned what is no array of numbers: {error}") from None
    if vectors.shape != (len(texts), embedder.dimension) or not np.isfinite(vectors).all():
        raise InputError(
            f"the embedder returned an array of shape {vectors.shape}; finite numbers of shape "
            f"({len(texts)}, {embedder.dimension}) are expected"
        )
    return vectors


def _metadata(given: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        return kvbank.checked_metadata({} if given is None else of_kind("metadata", given, Mapping))
    except kvbank.InvalidArgument as error:
        raise InputError(str(error)) from None


def _next_key(key: bytes) -> bytes:
    """The key under which a chunk is stored again after the one that `key` was used for has gone."""
    return xxhash.xxh3_128_digest(b"again " + key)


def _check_fits(bank: kvbank.Bank, wanted: kvbank.KVSpec, embedder: str, dtype: str | None) -> None:
    have = bank.kv
    if have is None:
        raise BankMismatch(f"bank {bank.name!r} holds vectors only")
    if have.reader_digest != wanted.reader_digest:
        parts = [part for part, value in wanted.reader_parts.items() if have.reader_parts.get(part) != value]
        raise BankMismatch(
            f"bank {bank.name!r} was written by another model (digest {have.reader_digest}, this one is "
            f"{wanted.reader_digest}; {', '.join(parts)} differ)"
        )
    if tuple(have.layers) != tuple(wanted.layers):
        raise BankMismatch(f"bank {bank.name!r} holds layers {have.layers}, this worker remembers {wanted.layers}")
    if have.hidden_size not in (0, wanted.hidden_size):
        raise BankMismatch(
            f"bank {bank.name!r} holds soft tokens of {have.hidden_size} numbers, this model reads {wanted.hidden_size}"
        )
    if dtype is not None and have.dtype != dtype:
        raise BankMismatch(f"bank {bank.name!r} stores {have.dtype}, not {dtype}")
    if bank.embedding.embedder_digest != embedder:
        raise BankMismatch(
            f"bank {bank.name!r} is searched by another embedder (digest {bank.embedding.embedder_digest}, this one is "
            f"{embedder})"
        )
