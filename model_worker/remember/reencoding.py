"""A bank gets the K-V of another model here: each chunk is read anew by that model, into a bank beside the old one.

How the copy goes on after a kill, and how it takes the name of the old bank, is in `kvbank.copying`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import kvbank
from kvbank.copying import anew, is_of
from kvbank.wire.scalars import Scalar
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.digest import tokenizer_digest
from model_worker.compress import Compressor
from model_worker.embed import Embedder, embedded
from model_worker.remember.document import SOURCE
from model_worker.remember.memory import Memory
from model_worker.remember.opening import kv_spec
from model_worker.remember.settings import MemorySettings
from model_worker.user_text import encode_text
from model_worker.window.capture import Captured
from model_worker.window.encoding import Behind


class Reencoding:
    """What a bank becomes: the same texts with the K-V of the attached model.

    settings: of the memory that makes the chunks, with the embedder of the new bank. window, sinks: tokens of the local
    context that a chunk is read behind, as far as the chunk goes on from the one before. about: metadata that name
    another embedder; empty where it stays.
    """

    word, suffix, at_once = "bank, model or compressor", "~reencode", 8

    def __init__(
        self,
        client: kvbank.Client,
        old: kvbank.Bank,
        attachment: Attachment,
        tokenizer: Any,
        settings: MemorySettings,
        *,
        local: tuple[int, int],
        about: dict[str, Scalar],
    ):
        self._client, self._old, self._attachment, self._tokenizer = client, old, attachment, tokenizer
        self._settings, self._about = settings, about
        self._embedder, self._compressor = cast(Embedder, settings.embedder), cast(Compressor, settings.compressor)
        self.kv: kvbank.KVSpec | None = kv_spec(attachment, None)
        self.embedding = kvbank.EmbeddingSpec(self._embedder.digest, self._embedder.dimension)
        self._window, self._sinks = local
        self._memory: Memory | None = None
        self._behind: Behind | None = None
        self._next: tuple[object, ...] = ()  # what the next chunk is, if it goes on from the last one
        parts = {} if old.kv is None else old.kv.reader_parts
        self._same_tokens = tokenizer_digest(tokenizer) in (parts.get("tokenizer"), old.metadata.get("tokenizer"))

    @property
    def marks(self) -> dict[str, Scalar]:
        """Return the metadata of the bank beside, which name the bank that it is made of, and the compressor."""
        return {"reencode_of": self._old.uid, "reencode_compressor": self._compressor.spec}

    def is_done(self) -> bool:
        """Tell whether the bank has what it is to become: K-V of the attached model alone, all made by the
        compressor."""
        if not is_of(self._old, self.kv, self.embedding):
            return False
        chunk = Memory(self._attachment, self._client, self._old.name, self._tokenizer, self._settings).chunk
        compressor = self._compressor.for_bank(self._attachment, self._old, chunk)
        return all(
            compressor.has_made(each.producer, len(each.token_ids), self._attachment)
            for each in self._client.list_chunks(self._old.name)
        )

    def metadata(self, old: kvbank.Bank) -> dict[str, Scalar]:
        """Return the metadata of the bank, which name the new embedder where there is one."""
        return {**old.metadata, **self._about}

    def renewed(self, chunks: list[kvbank.Chunk], new: kvbank.Bank) -> Iterable[tuple[kvbank.Chunk, kvbank.NewChunk]]:
        """Yield chunks with their copies, which have the K-V of the attached model."""
        memory = self._opened(new)
        for chunk in chunks:
            ids = self._ids(chunk)
            made = memory.new_chunk(self._captured(memory, chunk, ids))
            same = made.text == chunk.text
            vector = made.embedding if same else embedded(self._embedder, [chunk.text])[0]
            own = {"token_ids": ids, "original_length": len(ids), "producer": made.producer}
            yield chunk, anew(chunk, vector, made.tensors, **own)

    def _opened(self, new: kvbank.Bank) -> Memory:
        if self._memory is None:
            settings = replace(self._settings, strict=True, source=None, metadata=None)
            self._memory = Memory(self._attachment, self._client, new.name, self._tokenizer, settings)
            self._memory.open()
        return self._memory

    def _ids(self, chunk: kvbank.Chunk) -> list[int]:
        """Return the tokens of a chunk as the model reads them: as they are stored, where the tokenizer is the same.
        Raises kvbank.FailedPrecondition for a text that has none."""
        if self._same_tokens and chunk.token_ids:
            return list(chunk.token_ids)
        if not (ids := list(encode_text(self._tokenizer, chunk.text))):
            text = f"bank {self._old.name!r}: the text of chunk {chunk.chunk_id} has no tokens for this model"
            raise kvbank.FailedPrecondition(f"{text}: delete the chunk", metadata={"chunk_id": str(chunk.chunk_id)})
        return ids

    def _captured(self, memory: Memory, chunk: kvbank.Chunk, ids: Sequence[int]) -> Captured:
        """Return a chunk as the model sees it: alone, or behind those before it in its text."""
        if memory.context == "isolated" or memory.compressor.encodes:
            return Captured(list(ids), chunk.start, {})
        of = chunk.metadata.get(SOURCE), chunk.metadata.get("branch")
        if self._behind is None or self._next != (*of, chunk.start):
            self._behind = Behind(
                self._attachment,
                self._window,
                self._sinks,
                chunk=memory.chunk,
                start=chunk.start,
                needs_queries=memory.needs_queries,
            )
        self._next = *of, chunk.start + (chunk.original_length or len(chunk.text))
        return self._behind.encode(list(ids), chunk.start)
