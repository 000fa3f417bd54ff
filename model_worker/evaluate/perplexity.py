"""What a memory is worth to the loss of a text is measured here, by the size of the memory, at an equal local window.

A document is one stream of tokens: a history, and behind it a span all of whose tokens are scored. The stream is fed
once without recalling, which gives the losses without a memory and a bank with every chunk that left the window. Then
the span is fed again for each memory: of the last N tokens of the text, of the whole history, of another text; each
begins a window before the span, so that the local context of the first scored token was computed with that memory. So
all memories share one reading and one bank (see memory_span.py); what a chunk stores was computed without recalling,
also where it is encoded in its window.

The query of a recall is the past, never the tokens to be scored. Differences are paired: token by token, the same
tokens in the same window.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from model_worker.errors import InputError
from model_worker.evaluate.memory_span import MemorySpan, OtherMemory
from model_worker.evaluate.stream import Fed, feed, window_of
from model_worker.model import MemoryModel
from model_worker.remember.filling import Filling
from model_worker.remember.memory import Memory
from model_worker.window.cache import MemoryCache
from model_worker.window.memory_port import MemoryPort

NONE, ALL, OTHER, RECENT = "none", "all", "another text", "recent alone"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Document:
    """A stream of token ids of a text, whose last `score` tokens are scored; `name` says which text, and where."""

    name: str
    ids: Sequence[int]
    score: int

    @property
    def history(self) -> int:
        """Return the number of tokens before those that are scored."""
        return len(self.ids) - self.score


def sizes_of(history: int, asked: Sequence[int]) -> dict[str, int | None]:
    """Return the sizes of memory in tokens by their names, smallest first; one of the whole history is called `all`."""
    sizes: dict[str, int | None] = {f"last {size:,}": size for size in sorted(set(asked)) if size < history}
    return {**sizes, ALL: None}


def check_document(model: MemoryModel, document: Document) -> None:
    """Raise InputError for a document shorter than its window and two blocks, or without a block before its scores."""
    if document.history < model.chunk or len(document.ids) < model.window + 2 * model.chunk:
        raise InputError(
            f"{document.name} has {len(document.ids):,} tokens: too few for {document.score:,} that are scored behind "
            f"a window of {model.window}"
        )


def measure_document(
    model: MemoryModel,
    memory: Memory,
    document: Document,
    sizes: Mapping[str, int | None],
    other: Memory | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the losses `[score]` in nats of a document's scored tokens, by the name of the memory, `none` first.

    memory: over an empty bank, with a query of the past; the bank is filled with the document. sizes: see `sizes_of`.
    other: over the bank of another text. progress: called with (tokens fed, in all). Raises InputError for a document
    shorter than its window and two blocks.
    """
    check_document(model, document)
    block = model.chunk
    # Whole blocks, so that what is fed again is cut as the stream was.
    begin = max(block, (document.history - model.window) // block * block)
    passes = len(sizes) + (other is not None) + bool(memory.recent)
    fed, total = 0, len(document.ids) + passes * (len(document.ids) - begin)

    def tell(tokens: int) -> None:
        nonlocal fed
        fed += tokens
        if progress is not None:
            progress(fed, total)

    def losses(cache: MemoryCache, first: int, expected: Tensor | None, until: int | None = None) -> Fed:
        return feed(model, document.ids[first:until], cache, expected, tell)

    stream = window_of(model, Filling(memory))
    before = losses(stream, 0, None, begin)
    state, left = stream.state(), int(stream.columns.oldest(0, 1)[1])
    behind = losses(stream, begin, before.last)
    found = {NONE: behind.nats}
    stream.flush()
    ports: dict[str, MemoryPort] = {}
    if memory.recent:
        ports[RECENT] = MemorySpan(memory, left, 0)
    ports |= {name: MemorySpan(memory, left, size) for name, size in sizes.items()}
    if other is not None:
        ports[OTHER] = OtherMemory(other)
    for name, port in ports.items():
        cache = window_of(model, port, left)
        cache.restore(state)
        found[name] = losses(cache, begin, before.last).nats
    return {name: nats[-document.score :] for name, nats in found.items()}


def blocks_of(nats: Tensor, block: int) -> Tensor:
    """Return the mean of each whole block of `block` neighbouring losses."""
    count = len(nats) // block
    return nats[: count * block].reshape(count, block).mean(1)
