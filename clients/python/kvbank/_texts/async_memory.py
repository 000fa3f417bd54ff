"""`AsyncTextMemory` is `TextMemory` over an `AsyncClient`; each method has the docstring of that one.

Texts are embedded in other threads, so that the event loop goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Unpack

from kvbank import _models as m
from kvbank._arguments import text as _checked
from kvbank._async_client import AsyncClient
from kvbank._exceptions import BankNotFound
from kvbank._options import BankSettings
from kvbank._texts import texts as _texts
from kvbank._texts.memory import TextMemory
from kvbank._texts.passages import LONGEST
from kvbank.copying import MOST_IDS
from kvbank.embed import AnyEmbedder, Embedder, embedded_queries
from kvbank.wire.scalars import Scalar


class AsyncTextMemory:
    """A bank of texts for asyncio: as `TextMemory`, with coroutines, and asynchronous iterators for the lists."""

    def __init__(
        self,
        client: AsyncClient,
        bank: str,
        *,
        embed: AnyEmbedder | None = None,
        longest: int | None = LONGEST,
        **settings: Unpack[BankSettings],
    ) -> None:
        """Sends nothing before it is used."""
        self.client, self.bank, self._embed, self._longest = client, bank, embed, longest
        self._settings = settings
        self._embedder: Embedder | None = None

    async def embedder(self) -> Embedder:
        return await self._of(None) if self._embedder is None else self._embedder

    async def _of(self, bank: m.Bank | None) -> Embedder:
        """Return the embedder of the bank, which is asked for where it is not given."""
        if self._embedder is None:
            known = bank or await self.client.get_bank(self.bank)
            self._embedder = await asyncio.to_thread(_texts.embedder_of, known, self._embed)
        return self._embedder

    async def add(
        self,
        texts: str | Iterable[str],
        *,
        source: str | None = None,
        metadata: Mapping[str, Scalar] | None = None,
        progress: _texts.Progress | None = None,
    ) -> _texts.TextsAdded:
        values = _texts.adding(await self._writer(), source, metadata, self._longest, progress)
        digest = values.embedder.digest
        results = await self.client.write_many(
            self.bank, values.chunks(texts), reader_digest="", embedder_digest=digest
        )
        return _texts.added(results)

    async def _writer(self) -> Embedder:
        """Return the embedder of the bank, which is made where it is missing, and takes texts."""
        try:
            bank = await self.client.get_bank(self.bank)
        except BankNotFound:
            made = await asyncio.to_thread(_texts.new_embedder, self._embed)
            spec, settings = _texts.made_bank(made, self._embed, self._settings)
            bank = await self.client.create_bank(self.bank, kv=None, embedding=spec, exist_ok=True, **settings)
        return await self._of(_texts.takes_texts(bank))

    async def search(
        self,
        text: str,
        *,
        top_k: int = 8,
        filter: m.Filter | None = None,
        source: str | None = None,
        min_score: float | None = None,
        count: bool = True,
    ) -> list[_texts.TextFound]:
        embedder = await self.embedder()
        vectors = await asyncio.to_thread(embedded_queries, embedder, [_checked("text", text)])
        if not vectors.any():
            return []
        return _texts.found(
            await self.client.retrieve(
                self.bank,
                vectors,
                top_k=top_k,
                filter=_texts.where(filter, source),
                min_score=min_score,
                count=count,
                payload=False,
                embedder_digest=embedder.digest,
            )
        )

    async def get(self, chunk_id: int) -> m.Chunk:
        return await self.client.get_chunk(self.bank, chunk_id)

    async def chunks(self, filter: m.Filter | None = None, *, source: str | None = None) -> AsyncIterator[m.Chunk]:
        async for chunk in self.client.list_chunks(self.bank, filter=_texts.where(filter, source)):
            yield chunk

    def __aiter__(self) -> AsyncIterator[m.Chunk]:
        return self.chunks()

    async def count(self, filter: m.Filter | None = None, *, source: str | None = None) -> int:
        if (chosen := _texts.where(filter, source)) is None:
            return (await self.client.get_bank(self.bank)).usage.chunks
        return len([chunk.chunk_id async for chunk in self.client.list_chunks(self.bank, filter=chosen)])

    async def delete(self, filter: m.Filter | None = None, *, source: str | None = None) -> int:
        deleted, batch = 0, list[int]()
        async for chunk in self.client.list_chunks(self.bank, filter=_texts.some(filter, source)):
            batch.append(chunk.chunk_id)
            if len(batch) == MOST_IDS:
                deleted += await self.client.delete_chunks(self.bank, batch)
                batch.clear()
        return deleted + (await self.client.delete_chunks(self.bank, batch) if batch else 0)


for _name, _method in vars(AsyncTextMemory).items():
    if not _name.startswith("_"):
        _method.__doc__ = getattr(TextMemory, _name).__doc__
