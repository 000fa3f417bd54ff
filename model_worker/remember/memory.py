"""What a worker remembers goes into a bank here, and comes back for a query.

A chunk's way in: captured by the cache, compressed and embedded here, written or spooled by `delivery`. A query's way:
embedded here, asked by `recalling`, and handed to the cache, which rotates the keys into attention. What is asked ahead
waits for the service in the memory's `line`.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import kvbank
from kvbank.wire.scalars import Scalar
from model_worker.arguments import choice, of_kind, token_rows, words
from model_worker.attachment.attachment import Attachment
from model_worker.compress import Compressor
from model_worker.dtypes import DTYPES
from model_worker.embed import Embedder, embedded, embedded_queries
from model_worker.errors import InputError
from model_worker.remember import stored
from model_worker.remember.asking import answered, bank_of, rows_by_bank
from model_worker.remember.delivery import Delivery, source_key
from model_worker.remember.line import Line
from model_worker.remember.opening import Wanted, check_embedder, kv_spec, open_bank
from model_worker.remember.other_banks import OtherBanks
from model_worker.remember.payload_cache import PayloadCache
from model_worker.remember.recalling import Passage, Ranking, Recaller
from model_worker.remember.service_link import AWAY, ServiceLink
from model_worker.remember.settings import CHUNK, TOP_K, MemoryOptions, MemorySettings, changed
from model_worker.remember.spool import Spool, Spooled
from model_worker.remember.stats import MemoryStats
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from model_worker.window.memory_port import Answer, Begun
from model_worker.window.recalled import RecalledChunk

if TYPE_CHECKING:
    from model_worker.icae import Icae, Slots


class Memory:
    """One worker's access to a bank, or to one bank for each row of a batch. It is not for two threads at once.

    attachment: the model whose K-V are stored. bank: a name, or one for each row. tokenizer: turns a chunk's ids into
    the text that is embedded. settings: see `MemorySettings`. options: fields of the settings, which replace those of
    `settings`. Raises InputError for settings that make no sense.
    """

    def __init__(
        self,
        attachment: Attachment,
        client: kvbank.Client,
        bank: str | Sequence[str],
        tokenizer: Any,
        settings: MemorySettings | None = None,
        **options: Unpack[MemoryOptions],
    ):
        given = MemorySettings() if settings is None else of_kind("settings", settings, MemorySettings)
        self.settings = settings = changed(given, options)
        self.attachment, self.client, self.tokenizer = attachment, client, tokenizer
        self.bank = bank if isinstance(bank, str) else words("bank", bank)
        self.chunk, self.top_k = settings.chunk or CHUNK, settings.top_k or TOP_K
        self.recent = settings.recent or 0
        self.cadence, self.ahead = settings.cadence or self.chunk, settings.ahead
        if self.ahead >= self.cadence:
            raise InputError(f"ahead is {self.ahead}, and has to be less than the cadence of {self.cadence} tokens")
        self.query: str = settings.query
        self.query_tokens = settings.query_tokens or self.chunk
        self.context = settings.context or ("isolated" if attachment.plan.mode == "memlong" else "window")
        # The settings have made objects of names.
        self.embedder, self.compressor = cast(Embedder, settings.embedder), cast(Compressor, settings.compressor)
        self.stats = MemoryStats()
        self.link = ServiceLink(client, settings.call_seconds, settings.retry_after)
        self.delivery = Delivery(self.link, self.stats, spool=settings.spool, strict=settings.strict)
        self.line = Line()
        """Speaks to the service in a thread; this thread waits for it before it speaks itself."""
        payloads = PayloadCache() if settings.payload_cache is None else settings.payload_cache
        self._recaller = Recaller(
            client,
            attachment,
            payloads,
            top_k=self.top_k,
            order=settings.order or ("time" if attachment.plan.mode == "memlong" else "score"),
            min_score=settings.min_score,
            min_share=settings.min_share,
            count=settings.count,
        )
        self.filter: kvbank.Filter | None = None
        """Selects the chunks of the own bank that may be recalled, from the next recall on. None: all may be."""
        self.others = OtherBanks(client, attachment)
        """Banks that are recalled from besides the own one; none until they are taken."""
        self._dtype = DTYPES["fp32"]

    @property
    def needs_queries(self) -> bool:
        """Tell whether the compressor reads queries, so that the cache keeps them."""
        return self.compressor.needs_queries

    @property
    def spool(self) -> Spool | None:
        """Return where chunks wait while the service is away."""
        return self.delivery.spool

    @spool.setter
    def spool(self, spool: Spool | None) -> None:
        self.delivery.spool = spool

    # -- the bank -------------------------------------------------------------------------------------------------

    def open(
        self,
        *,
        capacity: kvbank.Capacity | None = None,
        policy: kvbank.Policy | None = None,
        dtype: str | None = None,
        metadata: Mapping[str, Scalar] | None = None,
    ) -> list[kvbank.Bank]:
        """Use the bank if it exists and fits this model and embedder, else make it with these settings.

        dtype: of stored K-V, by default the model's. Returns the bank, or those of the rows. Raises BankMismatch with
        both digests named.
        """
        if dtype is not None:
            choice("dtype", dtype, DTYPES)
        wanted = Wanted(kv_spec(self.attachment, dtype), dtype, capacity, policy, metadata)
        banks = []
        for name in [self.bank] if isinstance(self.bank, str) else self.bank:
            bank, self.embedder = open_bank(self.link, name, wanted, self.embedder)
            assert bank.kv is not None
            self._dtype = DTYPES[bank.kv.dtype]
            self.compressor = self.compressor.for_bank(self.attachment, bank, self.chunk)
            banks.append(bank)
        for bank in banks:  # all rows are embedded by one form of the embedder, the one of the last bank
            check_embedder(bank, self.embedder)
        return banks

    def _bank_of(self, row: int) -> str:
        return bank_of(self.bank, row)

    # -- remember -------------------------------------------------------------------------------------------------

    def remember(self, rows: Sequence[Captured | None]) -> list[RecalledChunk | None]:
        """Compress, embed and write what left the local window; one entry for each row of the batch.

        Returns the chunks for attention, as they are stored, where `recent` asks for them; else None for each row.
        """
        return [self.attended(chunk) for chunk in self.fill(rows)]

    def fill(self, rows: Sequence[Captured | None]) -> list[kvbank.NewChunk | None]:
        """Compress, embed and write what left the local window, and return the chunks, one entry for each row."""
        made = self.made(rows)
        for row, chunk in enumerate(made):
            if chunk is not None:
                self.write(chunk, row)
        return made

    def made(self, rows: Sequence[Captured | None]) -> list[kvbank.NewChunk | None]:
        """Compress and embed what left the local window, and return the chunks, which are not written yet."""
        self.attachment.check_unchanged(whole=True)
        return [
            None if captured is None else self.new_chunk(of_kind(f"rows[{row}]", captured, Captured))
            for row, captured in enumerate(of_kind("rows", rows, Sequence))
        ]

    def write(self, chunk: kvbank.NewChunk, row: int = 0) -> None:
        """Write a chunk that was made here. row: of the batch, whose bank takes the chunk."""
        self.line.wait()
        bank = self._bank_of(row)
        assert chunk.tensors is not None
        self._account(len(chunk.token_ids), chunk.tensors)
        self.delivery.write(self.addressed(bank, chunk))

    def store(self, chunk: kvbank.NewChunk, row: int = 0) -> None:
        """Write a chunk that was made here to the service at once, or raise ServiceError: the chunk waits nowhere."""
        self.line.wait()
        assert chunk.tensors is not None
        self.delivery.store(self.addressed(self._bank_of(row), chunk))
        self._account(len(chunk.token_ids), chunk.tensors)

    def attended(self, chunk: kvbank.NewChunk | None) -> RecalledChunk | None:
        """Return a chunk that was made here as attention takes it; None where `recent` asks for none."""
        if chunk is None or not self.recent:
            return None
        assert chunk.tensors is not None
        return RecalledChunk(0, chunk.start, stored.layers_of(chunk.tensors, self.attachment), tuple(chunk.token_ids))

    def new_chunk(self, captured: Captured, text: str | None = None) -> kvbank.NewChunk:
        """Make the chunk that is written of what left the window. text: of its tokens; None to decode them here."""
        alone = self.context == "isolated" and not self.compressor.encodes  # else the compressor runs the model itself
        if alone and captured.context != "isolated":
            captured = encode(self.attachment, captured.token_ids, captured.start, self.needs_queries)
        payload = self.compressor.compress(captured, self.attachment)
        text = self.text(captured.token_ids) if text is None else text
        tensors = stored.tensors_of(payload, self._dtype)
        return kvbank.NewChunk(
            embedding=embedded(self.embedder, [text])[0],
            tensors=tensors,
            start=captured.start,
            original_length=len(captured),
            token_ids=captured.token_ids,
            text=text,
            metadata=self.settings.metadata or {},
            producer=kvbank.Producer(
                payload.method,
                payload.version,
                "isolated" if self.compressor.encodes else captured.context,
                payload.adapter_digest,
                measured_loss=payload.measured_loss,
            ),
            **source_key(self.settings.source, captured.start, captured.token_ids),
        )

    def addressed(self, bank: str, chunk: kvbank.NewChunk) -> Spooled:
        """Address a chunk to a bank, under the digests of this model and embedder."""
        digests = self.attachment.reader.digest, self.embedder.digest
        return Spooled(bank, chunk, *digests, renewable=self.settings.source is not None)

    def deliver_spooled(self) -> bool:
        """Deliver what waits on disk, oldest first; return whether nothing waits any more."""
        self.line.wait()
        return self.delivery.deliver_spooled()

    def _account(self, tokens: int, tensors: Mapping[str, Tensor]) -> None:
        """Count the tokens and bytes of a chunk's K-V, or of what stands for them, without positions."""
        kept = {name: tensor for name, tensor in tensors.items() if name[:3] != "pos"}
        pair = 2 * self.attachment.kv_heads * self.attachment.head_dim * self._dtype.itemsize
        self.stats.tokens += tokens
        self.stats.stored_tokens += max(tensor.shape[name != "soft"] for name, tensor in kept.items())
        self.stats.bytes_before += tokens * pair * len(self.attachment.plan.memory_layers)
        self.stats.bytes_after += sum(tensor.nbytes for tensor in kept.values())

    # -- recall ---------------------------------------------------------------------------------------------------

    def recall(
        self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None
    ) -> list[list[RecalledChunk]] | None:
        """Return the `top_k` chunks for each row, in the order of attention; None when the service did not say.

        without: chunks of each row that are attended to anyway; others take their places. The search counts them, and
        as many more chunks, as retrieved.
        """
        question = self.question(rows, without)
        self.line.wait()
        return question()

    def ask(self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None) -> Begun:
        """Begin a recall in the memory's line, and return it. rows, without: as in `recall`.

        What leaves the window meanwhile is written behind the question, and is not found by it.
        """
        return self.line.begin(self.question(rows, without))

    def question(
        self,
        rows: Sequence[Sequence[int]],
        without: Sequence[Collection[RecalledChunk]] | None = None,
        *,
        payload: bool = True,
    ) -> Answer:
        """Return what asks the banks when it is called, in any thread, for chunks that may be recalled as of now.

        rows, without: as in `recall`, and so is what the call returns. payload: False to have the chunks counted alone,
        of which nothing is sent or returned.
        """
        self.attachment.check_unchanged()
        rows = token_rows("rows", rows)
        texts = [self.text(ids) for ids in rows]
        passages = [{chunk.passage for chunk in left_out} for left_out in without or [()] * len(texts)]
        ask = partial(self._retrieve, texts, passages, self.filter, payload)
        return partial(answered, ask, self.link, self.stats, self.settings.strict)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text by which tokens are found, and for which they are searched."""
        return str(self.tokenizer.decode(list(token_ids)))

    def left_before(self, start: int) -> list[RecalledChunk]:
        """Return the `recent` chunks before an offset of the source, which a window that begins there has seen leave.

        start: the offset. What waits in the spool is among them. A service that is away gives a warning; it raises
        with `strict`.
        """
        if not self.recent or start <= 0:
            return []
        self.line.wait()
        bank, found = self._bank_of(0), []
        try:
            found = self._recaller.left_before(bank, start, self.recent, self.chunk, self.link.patience, self.filter)
        except AWAY as error:
            if self.settings.strict:
                raise
            self.link.lost(error)
        waiting = [] if self.spool is None else [spooled.chunk for _, spooled in self.spool if spooled.bank == bank]
        found += [chunk for new in waiting if new.start < start and (chunk := self.attended(new)) is not None]
        first = {chunk.start: chunk for chunk in reversed(found)}  # a chunk that was written again may wait twice
        return [first[at] for at in sorted(first)[-self.recent :]]

    def _retrieve(
        self, texts: list[str], passages: list[set[Passage]], chosen: kvbank.Filter | None, payload: bool
    ) -> list[list[RecalledChunk]]:
        """Ask each bank once, for all rows that it belongs to, and the other banks for all rows.

        texts: the query of each row. passages: those that each row leaves out. chosen: see `filter`. payload: see
        `question`.
        """
        found: list[list[Ranking]] = [[] for _ in texts]
        known: dict[str, NDArray[np.float32]] = {}

        def vectors_of(embedder: Embedder) -> NDArray[np.float32]:
            if embedder.digest not in known:
                known[embedder.digest] = embedded_queries(embedder, texts)
            return known[embedder.digest]

        def ask(
            bank: str, embedder: Embedder, members: list[int], chosen: kvbank.Filter | None = None
        ) -> list[Ranking]:
            vectors, left_out = vectors_of(embedder)[members], [passages[row] for row in members]
            timeout = self.link.patience
            return self._recaller.retrieve(bank, vectors, embedder.digest, timeout, left_out, chosen, payload)

        for bank, members in rows_by_bank(vectors_of(self.embedder), self._bank_of).items():
            for row, ranking in zip(members, ask(bank, self.embedder, members, chosen), strict=True):
                found[row].append(ranking)
        for row, ranking in self.others.rankings(vectors_of, ask):
            found[row].append(ranking)
        return [self._recaller.chosen(rankings) for rankings in found]

    def slots(self, chunk_ids: Sequence[int], icae: "Icae", *, row: int = 0) -> list["Slots"]:
        """Return what `icae.answer` takes of chunks, in this order: their memory slots, or an uncompressed chunk whole.

        The frozen model reads all of them, behind a prefix, in one forward: exactly, which attention to the K-V of
        isolated chunks is not. row: of the batch, whose bank it is. Raises BankMismatch for a chunk of another adapter
        than `icae`, InputError for one that holds something else.
        """
        from model_worker.icae import Icae

        of_kind("icae", icae, Icae)
        reader = self.attachment.reader.digest
        found = self.client.fetch(
            self._bank_of(row), chunk_ids, reader_digest=reader, tensors="torch", timeout=self.link.patience
        )
        return [stored.slots_of(chunk, self.attachment, icae) for chunk in found]
