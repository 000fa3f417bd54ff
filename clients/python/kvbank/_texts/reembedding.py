"""A bank gets another embedder here: its chunks are copied with new vectors (see `kvbank.copying`)."""

from collections.abc import Iterable
from dataclasses import dataclass

from kvbank import _models as m
from kvbank._client import Client
from kvbank._exceptions import ChunkNotFound
from kvbank._texts.texts import EMBEDDER, named
from kvbank.copying import Progress, anew, is_of, renew
from kvbank.embed import AnyEmbedder, Embedder, embedded, embedder
from kvbank.wire.scalars import Scalar

# Chunks that are copied at once: of texts, and of K-V, which are in memory meanwhile.
_TEXTS, _TENSORS = 64, 8


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
    embedding = m.EmbeddingSpec(made.digest, made.dimension)
    if is_of(seen, seen.kv, embedding):
        return seen
    at_once = _TEXTS if seen.kv is None else _TENSORS
    return renew(client, seen, _NewVectors(client, seen, made, embedding, named(embed), seen.kv, at_once), progress)


@dataclass(slots=True)
class _NewVectors:
    """A bank that becomes the same one with the vectors of another embedder. about: metadata that name the embedder.

    The K-V stay. Others: see `kvbank.copying.Renewal`.
    """

    client: Client
    old: m.Bank
    made: Embedder
    embedding: m.EmbeddingSpec
    about: dict[str, Scalar]
    kv: m.KVSpec | None
    at_once: int
    word = "bank or embedder"
    suffix = "~reembed"

    @property
    def marks(self) -> dict[str, Scalar]:
        """Return the metadata of the bank beside, which name the bank that it is made of."""
        return {"reembed_of": self.old.uid}

    def metadata(self, old: m.Bank) -> dict[str, Scalar]:
        """Return the metadata of the bank, which name the new embedder in the place of the old one."""
        return {key: value for key, value in old.metadata.items() if key != EMBEDDER} | self.about

    def renewed(self, chunks: list[m.Chunk], new: m.Bank) -> Iterable[tuple[m.Chunk, m.NewChunk]]:
        """Yield chunks with their copies, which have new vectors and the old K-V."""
        vectors = embedded(self.made, [chunk.text for chunk in chunks])
        tensors = self._tensors(chunks)
        for chunk, vector in zip(chunks, vectors, strict=True):
            if self.kv is None or chunk.chunk_id in tensors:
                yield chunk, anew(chunk, vector, tensors.get(chunk.chunk_id))

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
