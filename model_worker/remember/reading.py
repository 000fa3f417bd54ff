"""A long text is read into a bank here, chunk by chunk, in the way that its memory stores chunks."""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from model_worker.attachment.model_parts import device_of
from model_worker.remember.behind import Behind
from model_worker.remember.filling import Filling
from model_worker.remember.memory import Memory
from model_worker.remember.passages import Passages
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode_sinks, encode_together
from model_worker.window.memory_port import Answer
from model_worker.window.queries import Queries
from model_worker.window.recalled import RecalledChunk


class Reading(Protocol):
    """What reads one text: `feed` is called with each chunk and its offset in the text, `end` after the last one.

    before: a text that is read from the middle on is fed from so many tokens before that on, of which nothing is stored
    again.
    """

    before: int

    def feed(self, chunk: list[int], start: int) -> None:
        """Read the next chunk."""

    def settle(self) -> None:
        """Write the chunks that were fed, but for those that stand in a window, and wait until they are in the bank."""

    def end(self) -> None:
        """Write what is still held, and wait until all is written."""

    def stop(self) -> None:
        """Wait until what was read is written, as far as it goes, where reading on has failed."""


@dataclass(frozen=True, slots=True)
class Local:
    """The local context that chunks of context `window` are stored in.

    window: in tokens. sinks: the first tokens of the text, which stay. ends: as in `MemoryCache`. begin: offset of the
    first token that is stored.
    """

    window: int
    sinks: list[int]
    ends: frozenset[int]
    begin: int = 0


def reading(memory: Memory, local: Local) -> Reading:
    """Return how a memory reads a text."""
    if memory.compressor.encodes:
        return ReadAlone(memory)
    if memory.context == "isolated":
        below = not memory.attachment.plan.recalls_below_memory
        return ReadBelowRecall(memory) if below else ReadAsMemLong(memory)
    return ReadInWindow(memory, local)


class _WrittenAtOnce:
    """Has nothing to wait for, since each chunk is written when it is fed."""

    before = 0

    def settle(self) -> None:
        """Do nothing, since every chunk is written."""

    end = stop = settle


class ReadTokens(_WrittenAtOnce):
    """Stores chunks as tokens and text, for a model that reads them again; no model runs."""

    def __init__(self, passages: Passages):
        self._passages = passages

    def feed(self, chunk: list[int], start: int) -> None:
        """Write the next chunk of the text."""
        self._passages.remember(chunk, start)


class ReadAlone(_WrittenAtOnce):
    """Gives each chunk to a compressor that runs the model itself, over the chunk alone."""

    def __init__(self, memory: Memory):
        self._memory = memory

    def feed(self, chunk: list[int], start: int) -> None:
        """Compress a chunk and write it."""
        self._memory.remember([Captured(chunk, start, {}, "isolated")])


class ReadAsMemLong(_WrittenAtOnce):
    """Lets the model see each chunk with what the chunk recalled, and nothing else (MemLong, section 3)."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self._cache: MemoryCache | None = None

    def feed(self, chunk: list[int], start: int) -> None:
        """Run the model over a chunk, and write the chunk."""
        if self._cache is None:
            # Without sinks: a chunk that saw the beginning of its text would be encoded once more, alone.
            memory = self._memory
            self._cache = MemoryCache(memory.attachment, memory, window=memory.chunk, start=start, sinks=0)
        run(self._cache, chunk)
        self._cache.flush()


class ReadBelowRecall:
    """Stores the same as `ReadAsMemLong` in less time, where no memory layer stands above a retrieval layer.

    What a chunk attends to besides itself changes nothing of what is stored then. So the model sees each chunk alone,
    several of them together in one forward, while the memory's line recalls for those before them, because that counts
    for eviction, and writes them.
    """

    before = 0

    def __init__(self, memory: Memory):
        self._memory, self._behind, self._queries = memory, Behind(memory), Queries(memory)
        self._recents: deque[RecalledChunk] = deque(maxlen=memory.recent)
        self._fed: list[tuple[list[int], int, Answer | None]] = []

    def feed(self, chunk: list[int], start: int) -> None:
        """Let a chunk be recalled for and written, as soon as the model has run over it."""
        memory = self._memory
        self._fed.append((chunk, start, self._question(chunk)))
        self._recents.append(RecalledChunk(0, start, {}, tuple(chunk)))
        if (len(self._fed) + 1) * max(memory.chunk, len(chunk)) > memory.settings.together:
            self._encode()

    def _question(self, chunk: list[int]) -> Answer | None:
        """Return what counts the chunks that the next one recalls, beside those that are recent; None for nothing."""
        memory, ids = self._memory, torch.tensor([chunk])
        valid = torch.ones_like(ids, dtype=torch.bool)
        asked = self._queries.due(ids, valid)
        if asked:
            self._queries.recalled()
        self._queries.append(ids, valid)
        return memory.question(asked, [self._recents], payload=False) if asked and memory.settings.count else None

    def _encode(self) -> None:
        """Run the model over the chunks that were fed, and give them to the memory's line. Those that an interrupt
        keeps from it stay fed."""
        fed = [(chunk, start) for chunk, start, _ in self._fed]
        encoded = encode_together(self._memory.attachment, fed, self._memory.needs_queries) if fed else []
        for captured in encoded:
            _, _, question = self._fed.pop(0)
            self._behind.take(captured, question)

    def settle(self) -> None:
        """Run the model over what was fed, and wait until all chunks are written."""
        self._encode()
        self._behind.settle()

    end = settle

    def stop(self) -> None:
        """Write the chunks that were fed."""
        with suppress(Exception):  # of a chunk; the error that ended the reading is raised
            self.end()


class ReadInWindow:
    """Stores each chunk as it stands in the local window, behind the text before it; nothing is recalled meanwhile.

    On SmolLM2 such chunks are recalled better than chunks that were encoded alone, whose own first token takes the
    attention that belongs to the first token of a text (docs/worker.md).
    """

    def __init__(self, memory: Memory, local: Local):
        self.before = local.window
        self._memory, self._local, self._behind = memory, local, Behind(memory)
        self._cache: MemoryCache | None = None

    def feed(self, chunk: list[int], start: int) -> None:
        """Run the model over a chunk behind the window, and write what leaves the window."""
        if self._cache is None:
            self._cache = self._begun(start)
        run(self._cache, chunk)

    def _begun(self, start: int) -> MemoryCache:
        """Return a window that begins at an offset of the text, with the sinks that the text has there."""
        port, local = Filling(self._memory, self._behind, self._local.begin), self._local
        wanted = len(local.sinks)
        cache = MemoryCache(
            self._memory.attachment, port, window=local.window, start=start, sinks=wanted, ends=local.ends
        )
        if start and (first := local.sinks[: min(start, cache.sinks.wanted)]):
            encode_sinks(cache, first)
        return cache

    def settle(self) -> None:
        """Wait until the chunks are written that have left the window."""
        self._behind.settle()

    def end(self) -> None:
        """Write what stands in the window, and wait until all is written."""
        if self._cache is not None:
            self._cache.flush()
        self._behind.settle()

    def stop(self) -> None:
        """Wait until the chunks are written that have left the window."""
        with suppress(Exception):  # of a chunk; the error that ended the reading is raised
            self._behind.settle()


def run(cache: MemoryCache, token_ids: Sequence[int]) -> None:
    """Run the decoder over the next tokens of a cache."""
    attachment = cache.attachment
    ids = torch.tensor([token_ids], device=device_of(attachment.model))
    with torch.no_grad():
        attachment.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
