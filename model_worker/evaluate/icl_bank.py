"""The demonstrations of the evaluation `icl` in a bank, each a chunk of its own; and which are recalled for an item.

A demonstration is read alone. Where the model keeps sinks, these are the first tokens of the first demonstration.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

import kvbank
from model_worker.evaluate.banks import open_memory
from model_worker.evaluate.icl_examples import Example, Task
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.remember.settings import MemoryOptions
from model_worker.user_text import encode_text
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk

_NUMBER = "demonstration"  # metadata of a chunk
_BATCH = 16


@dataclass
class _Collected:
    """The port of a window that keeps what leaves it, and recalls nothing. chunk: of the longest demonstration."""

    chunk: int
    needs_queries: bool
    left: list[Captured] = field(default_factory=list)
    cadence, query_tokens, query, recent = 1, 0, "past", 0

    def remember(self, rows: Sequence[Captured | None]) -> None:
        """Keep what left the window."""
        self.left += [captured for captured in rows if captured is not None]

    def recall(self, rows: Sequence[Sequence[int]], without: object = None) -> None:
        """Recall nothing for any query."""


@dataclass
class Demonstrations:
    """The demonstrations of a task in a bank of `model`.

    examples: those that are written. memory: finds by the settings of the model. any: gives those of certain numbers,
    whatever their score. numbers: of the examples, by the place at which they were read.
    """

    model: MemoryModel
    task: Task
    examples: Sequence[Example]
    memory: Memory
    any: Memory
    numbers: dict[int, int]

    @classmethod
    def written(
        cls,
        model: MemoryModel,
        task: Task,
        examples: Sequence[Example],
        progress: Callable[[int, int], None],
    ) -> "Demonstrations":
        """Write demonstrations to a new bank. progress: called with (done, in all)."""
        ids = [encode_text(model.tokenizer, task.told(example)) for example in examples]
        longest, bank = max(map(len, ids)), f"icl-{task.name}"
        own: MemoryOptions = {"chunk": longest, "recent": 0, "order": "score", "count": False}
        memory = open_memory(model, bank, **own)
        any_score: MemoryOptions = {**own, "min_score": None, "min_share": None}
        whatever = open_memory(model, bank, **any_score)
        port, numbers = _Collected(longest, memory.needs_queries), dict[int, int]()
        cache = MemoryCache(model.attachment, port, window=longest, sinks=model.sinks)
        for at in range(0, len(ids), _BATCH):
            batch = range(at, min(at + _BATCH, len(ids)))
            for number in batch:
                with torch.no_grad():
                    seen = torch.tensor([ids[number]], device=model.model.device)
                    model.attachment.decoder(input_ids=seen, past_key_values=cache, use_cache=True)
                cache.flush()
            numbers |= {captured.start: number for captured, number in zip(port.left, batch, strict=True)}
            made = [replace(memory.new_chunk(left), metadata={_NUMBER: numbers[left.start]}) for left in port.left]
            port.left.clear()
            model.client.write_many(
                bank,
                made,
                reader_digest=model.attachment.reader.digest,
                embedder_digest=memory.embedder.digest,
            )
            progress(batch[-1] + 1, len(ids))
        return cls(model, task, examples, memory, whatever, numbers)

    @property
    def bank(self) -> str:
        """Return the name of the bank."""
        return str(self.memory.bank)

    def found(self, text: str, among: Sequence[int] | None = None) -> list[RecalledChunk]:
        """Return the demonstrations that are found for a text, the best last; among: numbers, by default all."""
        self.memory.filter = None if among is None else kvbank.Filter(metadata={_NUMBER: list(among)})
        return self._recalled(self.memory, text)

    def of(self, text: str, numbers: Sequence[int]) -> list[RecalledChunk]:
        """Return the demonstrations of these numbers, at most as many as a recall brings, the best for a text last."""
        self.any.filter = kvbank.Filter(metadata={_NUMBER: list(numbers)})
        return self._recalled(self.any, text)

    def _recalled(self, memory: Memory, text: str) -> list[RecalledChunk]:
        found = memory.recall([encode_text(self.model.tokenizer, f" {text}")])
        return [] if found is None else found[0]

    def vote(self, found: Sequence[RecalledChunk]) -> str:
        """Return the label that most of the found demonstrations have; of labels with as many, the nearest one's."""
        labels = [self.examples[self.numbers[chunk.start]].label for chunk in reversed(found)]
        return Counter(labels).most_common(1)[0][0] if labels else ""
