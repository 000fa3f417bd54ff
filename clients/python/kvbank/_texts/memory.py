"""`TextMemory` keeps texts in a bank, over a blocking client."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Unpack

from kvbank import _models as m
from kvbank._arguments import text as _checked
from kvbank._client import Client
from kvbank._exceptions import BankNotFound
from kvbank._options import BankSettings
from kvbank._texts import texts as _texts
from kvbank._texts.passages import LONGEST
from kvbank.copying import MOST_IDS
from kvbank.embed import AnyEmbedder, Embedder, embedded_queries
from kvbank.wire.scalars import Scalar


class TextMemory:
    """A bank of texts: texts go in, and the nearest ones come out. No model is needed.

    client: stays the caller's. bank: its name; a bank of vectors only, which the first `add` makes where it is missing
    (`settings` are those of `create_bank`). A bank with K-V of a model can be searched and looked at here, too.
    embed: what turns a text into the vector by which it is found. `"lexical"`, `"lexical:idf"` and `"lexical:d=N"` find
        shared wording and need nothing more; `"minilm"` and other encoders find meaning and need `kvbank[worker]`; or a
        function of texts with a `digest`. None: what the bank was made with, and `"lexical"` for a new one.
    longest: letters of a passage. A longer text is cut into passages, at the ends of paragraphs and sentences where it
        can be, and each is stored and found by itself. None stores each text whole.

    Errors of every method: those of the client; EmbedderMismatch for a bank that is searched by another embedder.
    """

    def __init__(
        self,
        client: Client,
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

    def embedder(self) -> Embedder:
        """Return what turns texts into vectors, which the bank says. Errors: BankNotFound."""
        if self._embedder is None:
            self._embedder = _texts.embedder_of(self.client.get_bank(self.bank), self._embed)
        return self._embedder

    def add(
        self,
        texts: str | Iterable[str],
        *,
        source: str | None = None,
        metadata: Mapping[str, Scalar] | None = None,
        progress: _texts.Progress | None = None,
    ) -> _texts.TextsAdded:
        """Store texts, each passage once, and return which were new when all are durable.

        A passage is known by source, offset in its text, and content: adding it again writes nothing, and leaves its
        metadata as they are. So a call that was interrupted can be made again. A passage that was deleted is stored
        again.
        texts: one text, or any iterable of them, which is consumed as passages are written. source: the name of their
        document, in the metadata of each chunk. metadata: of every chunk. progress: called with the number of passages
        that were handed over, every 64.
        Errors: InvalidArgument for an empty text, and for one that UTF-8 cannot encode; those before it are stored.
        """
        values = _texts.adding(self._writer(), source, metadata, self._longest, progress)
        digest = values.embedder.digest
        results = self.client.write_many(self.bank, values.chunks(texts), reader_digest="", embedder_digest=digest)
        return _texts.added(results)

    def _writer(self) -> Embedder:
        """Return the embedder of the bank, which is made where it is missing, and takes texts."""
        try:
            bank = self.client.get_bank(self.bank)
        except BankNotFound:
            made = _texts.new_embedder(self._embed)
            spec, settings = _texts.made_bank(made, self._embed, self._settings)
            bank = self.client.create_bank(self.bank, kv=None, embedding=spec, exist_ok=True, **settings)
        _texts.takes_texts(bank)
        if self._embedder is None:
            self._embedder = _texts.embedder_of(bank, self._embed)
        return self._embedder

    def search(
        self,
        text: str,
        *,
        top_k: int = 8,
        filter: m.Filter | None = None,
        source: str | None = None,
        min_score: float | None = None,
        count: bool = True,
    ) -> list[_texts.TextFound]:
        """Return the passages that are nearest to a text, the best first; none for a text in which there is nothing.

        top_k: the most passages, 1 to 1000. filter, source: select what may be found. min_score: passages below it are
        left out. count: False leaves the retrieval counts as they are.
        """
        embedder = self.embedder()
        vectors = embedded_queries(embedder, [_checked("text", text)])
        if not vectors.any():
            return []
        return _texts.found(
            self.client.retrieve(
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

    def get(self, chunk_id: int) -> m.Chunk:
        """Return one passage by the id of its chunk. Errors: ChunkNotFound."""
        return self.client.get_chunk(self.bank, chunk_id)

    def chunks(self, filter: m.Filter | None = None, *, source: str | None = None) -> Iterator[m.Chunk]:
        """Yield all passages, or those that `filter` and `source` select, in the order in which they were written."""
        yield from self.client.list_chunks(self.bank, filter=_texts.where(filter, source))

    def __iter__(self) -> Iterator[m.Chunk]:
        return self.chunks()

    def count(self, filter: m.Filter | None = None, *, source: str | None = None) -> int:
        """Count all passages, or those that `filter` and `source` select, which are read for that."""
        if (chosen := _texts.where(filter, source)) is None:
            return self.client.get_bank(self.bank).usage.chunks
        return sum(1 for _ in self.client.list_chunks(self.bank, filter=chosen))

    def delete(self, filter: m.Filter | None = None, *, source: str | None = None) -> int:
        """Delete the passages that `filter` and `source` select, and return how many there were.

        `Filter()` selects all. Errors: InvalidArgument where neither is given.
        """
        ids = (chunk.chunk_id for chunk in self.client.list_chunks(self.bank, filter=_texts.some(filter, source)))
        deleted = 0
        while batch := list(islice(ids, MOST_IDS)):
            deleted += self.client.delete_chunks(self.bank, batch)
        return deleted
