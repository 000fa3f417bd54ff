"""The texts of a bank for a model that reads them again as tokens, instead of attending to K-V that are stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import kvbank
from model_worker.arguments import words
from model_worker.attachment.digest import tokenizer_digest
from model_worker.embed import Embedder, embedded, embedded_queries
from model_worker.errors import BankMismatch
from model_worker.remember.asking import answered, bank_of, rows_by_bank
from model_worker.remember.delivery import Delivery, source_key
from model_worker.remember.opening import check_embedder, open_passages
from model_worker.remember.service_link import ServiceLink
from model_worker.remember.settings import CHUNK, TOP_K, MemorySettings
from model_worker.remember.spool import Spooled
from model_worker.remember.stats import MemoryStats
from model_worker.user_text import encode_text


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk of a bank as tokens of the model that reads it again. start: offset in its source."""

    chunk_id: int
    start: int
    token_ids: tuple[int, ...]


class Passages:
    """One reader's access to the texts of a bank, or of one bank for each row of a batch.

    A bank may have been written here, without K-V, or by any model with a memory. Where another tokenizer wrote it, a
    passage is the text of its chunk, in tokens of this one. It is not for two threads at once.
    """

    def __init__(
        self,
        client: kvbank.Client,
        bank: str | Sequence[str],
        tokenizer: Any,
        settings: MemorySettings,
        stats: MemoryStats | None = None,
    ):
        self.settings, self.client, self.tokenizer = settings, client, tokenizer
        self.bank = bank if isinstance(bank, str) else words("bank", bank)
        self.chunk, self.top_k = settings.chunk or CHUNK, settings.top_k or TOP_K
        self.query_tokens = settings.query_tokens or self.chunk
        self.embedder = cast(Embedder, settings.embedder)
        self.stats = MemoryStats() if stats is None else stats
        self.link = ServiceLink(client, settings.call_seconds, settings.retry_after)
        self.delivery = Delivery(self.link, self.stats, spool=settings.spool, strict=settings.strict)
        self._banks: dict[str, kvbank.Bank] = {}
        self._tokenizer_digest = tokenizer_digest(tokenizer)

    def deliver_spooled(self) -> bool:
        """Deliver what waits on disk, oldest first; return whether nothing waits any more."""
        return self.delivery.deliver_spooled()

    def open(
        self, *, capacity: kvbank.Capacity | None = None, policy: kvbank.Policy | None = None
    ) -> list[kvbank.Bank]:
        """Use the bank if it is searched by this embedder, else make one without K-V, with these settings.

        Raises BankMismatch for a bank of another embedder.
        """
        about = {"tokenizer": self._tokenizer_digest}
        for name in [self.bank] if isinstance(self.bank, str) else self.bank:
            self._banks[name], self.embedder = open_passages(
                self.link, name, self.embedder, capacity=capacity, policy=policy, metadata=about
            )
        for bank in self._banks.values():  # all rows are embedded by one form of the embedder, the one of the last bank
            check_embedder(bank, self.embedder)
        return list(self._banks.values())

    def remember(self, token_ids: Sequence[int], start: int, row: int = 0) -> None:
        """Write a passage without K-V. start: its offset in the source. row: of the batch, whose bank takes it.

        Raises BankMismatch for a bank whose chunks have K-V, or that another tokenizer wrote.
        """
        bank = self._banks[bank_of(self.bank, row)]
        if bank.kv is not None:
            raise BankMismatch(f"bank {bank.name!r} holds K-V of a model; it is only read here")
        if not self._is_own(bank.name):
            raise BankMismatch(f"bank {bank.name!r} was written with another tokenizer; it is only read here")
        text = str(self.tokenizer.decode(list(token_ids)))
        chunk = kvbank.NewChunk(
            embedding=embedded(self.embedder, [text])[0],
            start=start,
            original_length=len(token_ids),
            token_ids=list(token_ids),
            text=text,
            metadata=self.settings.metadata or {},
            **source_key(self.settings.source, start, token_ids),
        )
        self.stats.tokens += len(token_ids)
        renewable = self.settings.source is not None
        self.delivery.write(Spooled(bank.name, chunk, "", self.embedder.digest, renewable=renewable))

    def find(self, rows: Sequence[Sequence[int]]) -> list[list[Passage]]:
        """Return the `top_k` passages for each row, in the order of reading; none where the service is away."""
        found = answered(partial(self._retrieve, rows), self.link, self.stats, self.settings.strict)
        return [[] for _ in rows] if found is None else found

    def before(self, prompts: Sequence[Sequence[int]], questions: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return each of the prompts behind the passages that its question finds, as token ids."""
        read = []
        for prompt, passages in zip(prompts, self.find(questions), strict=True):
            again = [token for passage in passages for token in passage.token_ids]
            self.stats.reread_tokens += len(again)
            read.append([*again, *prompt])
        return read

    def _retrieve(self, rows: Sequence[Sequence[int]]) -> list[list[Passage]]:
        texts = [str(self.tokenizer.decode(list(ids)[-self.query_tokens :])) for ids in rows]
        vectors = embedded_queries(self.embedder, texts)
        found: list[list[Passage]] = [[] for _ in rows]
        for bank, members in rows_by_bank(vectors, partial(bank_of, self.bank)).items():
            answer = self.client.retrieve(
                bank,
                vectors[members],
                top_k=self.top_k,
                min_score=self.settings.min_score,
                min_share=self.settings.min_share,
                count=self.settings.count,
                payload=False,
                embedder_digest=self.embedder.digest,
                timeout=self.link.patience,
            )
            for row, hits in zip(members, answer.queries, strict=True):
                ids = [hit.chunk_id for hit in reversed(hits)]
                ordered = sorted(ids) if self.settings.order == "time" else ids
                found[row] = [self._passage(bank, answer.chunks[at]) for at in ordered]
        return found

    def _passage(self, bank: str, chunk: kvbank.Chunk) -> Passage:
        own = self._is_own(bank) and chunk.token_ids
        return Passage(chunk.chunk_id, chunk.start, chunk.token_ids if own else self._tokens(chunk.text))

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(encode_text(self.tokenizer, text))

    def _is_own(self, name: str) -> bool:
        """Tell whether the bank has token ids of this tokenizer."""
        bank = self._banks[name]
        parts = {} if bank.kv is None else bank.kv.reader_parts
        return self._tokenizer_digest in (parts.get("tokenizer"), bank.metadata.get("tokenizer"))
