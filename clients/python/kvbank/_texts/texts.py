"""What both text memories do alike, without I/O: which embedder a bank has, chunks out of texts, filters by source."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import xxhash

from kvbank import _models as m
from kvbank._arguments import checked_metadata, integer, invalid, iterable
from kvbank._arguments import text as checked_text
from kvbank._exceptions import EmbedderMismatch, FailedPrecondition
from kvbank._options import BankSettings
from kvbank._texts.passages import passages
from kvbank.embed import AnyEmbedder, Embedder, embedded, embedder, name_of, of_bank
from kvbank.embed.spec import of_digest
from kvbank.wire.scalars import Scalar

# The keys of metadata of a chunk that has the name of its document, and of a bank that has the name of its embedder.
SOURCE, EMBEDDER = "source", "embedder"
# Passages that are embedded at once.
_BATCH = 64
_DEFAULT = "lexical"

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class TextsAdded:
    """What has become of texts that were added.

    chunk_ids: of all their passages, in order. written: how many passages are new. known: how many were there before.
    """

    chunk_ids: tuple[int, ...]
    written: int
    known: int


@dataclass(frozen=True, slots=True)
class TextFound:
    """A passage that was found; a higher score is nearer."""

    score: float
    chunk: m.Chunk

    @property
    def chunk_id(self) -> int:
        """Return the id of the chunk that has the passage."""
        return self.chunk.chunk_id

    @property
    def text(self) -> str:
        """Return the text of the passage."""
        return self.chunk.text

    @property
    def source(self) -> str:
        """Return the name of the document that the passage is of; "" where none was given."""
        return str(self.chunk.metadata.get(SOURCE, ""))


def embedder_of(bank: m.Bank, embed: AnyEmbedder | None) -> Embedder:
    """Return the embedder that a bank is searched by. embed: what the caller gave; None goes by what the bank says.

    Errors: EmbedderMismatch, which names both digests; FailedPrecondition where the bank does not say its embedder.
    """
    digest = bank.embedding.embedder_digest
    if embed is None:
        known = of_digest(digest, bank.embedding.dimension)
        if known is not None:
            return known
        embed = bank.metadata.get(EMBEDDER)  # type: ignore[assignment]
        if not isinstance(embed, str):
            text = f"bank {bank.name!r} does not say by which embedder (digest {digest}) it is searched: give embed="
            raise FailedPrecondition(text, reason="EMBEDDER_MISMATCH", metadata={"bank_digest": digest})
    found = of_bank(embedder(embed), digest)
    if (found.digest, found.dimension) != (digest, bank.embedding.dimension):
        text = (
            f"bank {bank.name!r} is searched by another embedder (digest {digest}, dimension "
            f"{bank.embedding.dimension}) than {name_of(found)} (digest {found.digest}, dimension {found.dimension})"
        )
        metadata = {"bank_digest": digest, "request_digest": found.digest}
        raise EmbedderMismatch(text, reason="EMBEDDER_MISMATCH", metadata=metadata)
    return found


def new_embedder(embed: AnyEmbedder | None) -> Embedder:
    """Return the embedder of a bank that is about to be made."""
    return embedder(_DEFAULT if embed is None else embed)


def made_bank(
    made: Embedder, embed: AnyEmbedder | None, settings: BankSettings
) -> tuple[m.EmbeddingSpec, BankSettings]:
    """Return the spec of the embeddings and the settings of a bank that is about to be made."""
    about: Mapping[str, Scalar] = {**named(embed), **settings.get("metadata", {})}
    return m.EmbeddingSpec(made.digest, made.dimension), {**settings, "metadata": about}


def named(embed: AnyEmbedder | None) -> dict[str, Scalar]:
    """Return metadata that name the embedder of a new bank; none where its name would mean nothing elsewhere."""
    embed = _DEFAULT if embed is None else embed
    return {EMBEDDER: embed} if isinstance(embed, str) and not embed.startswith((".", "/", "~")) else {}


def takes_texts(bank: m.Bank) -> m.Bank:
    """Return a bank that texts can be added to. Errors: FailedPrecondition for one with K-V."""
    if bank.kv is not None:
        text = f"bank {bank.name!r} holds K-V of a model: texts are added to it by that model (MemoryModel.read)"
        raise FailedPrecondition(text, reason="READER_MISMATCH", metadata={"bank_digest": bank.kv.reader_digest})
    return bank


@dataclass(frozen=True, slots=True)
class Adding:
    """Texts on their way into a bank. longest: letters of a passage; None stores each text as one."""

    embedder: Embedder
    source: str
    metadata: Mapping[str, Scalar]
    longest: int | None
    progress: Progress | None = None

    def chunks(self, texts: str | Iterable[str]) -> Iterator[m.NewChunk]:
        """Yield the chunks of texts, whose keys follow from source, offset and content. Errors: InvalidArgument, which
        names the text by its place."""
        found = self._passages([texts] if isinstance(texts, str) else iterable("texts", texts))
        metadata, done = checked_metadata(self.metadata), 0
        if SOURCE in metadata:
            raise invalid("metadata", f"has {SOURCE!r}, which is an argument of its own")
        if self.source:
            metadata = {SOURCE: self.source, **metadata}
        while batch := list(islice(found, _BATCH)):
            vectors = embedded(self.embedder, [passage for _, passage in batch])
            for vector, (start, passage) in zip(vectors, batch, strict=True):
                key = _key(self.source, start, passage)
                yield m.NewChunk(
                    vector, start=start, text=passage, metadata=metadata, idempotency_key=key, if_absent=True
                )
            done += len(batch)
            if self.progress is not None:
                self.progress(done)

    def _passages(self, texts: Iterable[str]) -> Iterator[tuple[int, str]]:
        for place, given in enumerate(texts):
            text = checked_text(f"texts[{place}]", given)
            if not text or text.isspace():
                raise invalid(f"texts[{place}]", "is empty: there is nothing to find it by")
            yield from [(0, text)] if self.longest is None else passages(text, self.longest)


def adding(
    embedder: Embedder,
    source: str | None,
    metadata: Mapping[str, Scalar] | None,
    longest: int | None,
    progress: Progress | None,
) -> Adding:
    """Return the values of one call, checked. Errors: InvalidArgument."""
    name = "" if source is None else checked_text("source", source)
    if longest is not None:
        integer("longest", longest, (1, 2**31 - 1))
    return Adding(embedder, name, {} if metadata is None else metadata, longest, progress)


def added(results: list[m.WriteResult]) -> TextsAdded:
    """Return what has become of the chunks. Errors: FailedPrecondition, where the server is of an earlier version and
    does not write a chunk again that has gone."""
    if any(result.gone for result in results):
        raise FailedPrecondition("texts that were deleted are not stored again by a server of an earlier version")
    known = sum(result.replayed for result in results)
    return TextsAdded(tuple(result.chunk_id for result in results), len(results) - known, known)


def found(retrieval: m.Retrieval) -> list[TextFound]:
    """Return the hits of the one query of a retrieval, the best first."""
    return [TextFound(hit.score, retrieval.chunks[hit.chunk_id]) for hit in retrieval.queries[0]]


def where(filter: m.Filter | None, source: str | None) -> m.Filter | None:
    """Return the filter that selects what both select; None selects all."""
    if source is None:
        return filter
    given = filter or m.Filter()
    return replace(given, metadata={**given.metadata, SOURCE: checked_text("source", source)})


def some(filter: m.Filter | None, source: str | None) -> m.Filter:
    """Return the filter of what is deleted. Errors: InvalidArgument where none is given."""
    chosen = where(filter, source)
    if chosen is None:
        raise invalid("filter", "is missing: Filter() stands for all texts")
    return chosen


def _key(source: str, start: int, text: str) -> bytes:
    return xxhash.xxh3_128_digest(f"text-1 {len(source)} {source} {start} {text}".encode())
