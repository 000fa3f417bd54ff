"""What a set of layers recalls is measured here: facts in chunks, asked for with the chunks' K-V in these layers only.

The chunks are encoded once, in all layers, so that a set of layers costs one forward of the questions. No bank is
needed. A fact is told when each token of its answer is the model's first choice behind those before it, which is what
greedy decoding writes.
"""

import copy
import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.model_parts import device_of
from model_worker.attachment.plan import MemoryPlan
from model_worker.evaluate.planted import Planted
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from model_worker.window.recalled import RecalledChunk

_OPENING = 8  # tokens with which the stream began, before all else left the window
_BATCH = 16  # facts that are asked for at once
# An answer less likely than this is not told, however unlikely it is.
_WORST = 8.0  # nats


@dataclass(frozen=True, slots=True)
class Told:
    """What was told of N facts.

    nats: `[N]`, minus the log-probability of each whole answer, at most 8. right: bool `[N]`, whether greedy decoding
    writes the answer and then goes on with neither a digit nor a letter.
    """

    nats: Tensor
    right: Tensor


@dataclass(frozen=True, slots=True)
class _Batch:
    """Facts whose questions stand behind equally long local texts.

    cache: the window before the questions. memory: what is recalled for each. index: where the facts stand among all.
    """

    facts: list[Planted]
    index: list[int]
    cache: MemoryCache
    memory: list[list[RecalledChunk]]


class RecallByLayers:
    """Facts that are asked for with memory in a set of layers.

    attachment: has the layers from which sets are taken, and a tokenizer. opening: token ids with which the
    stream began; its sinks come from there. context: `isolated` or `window`, as chunks are stored. hits: chunks that
    are recalled for each question: those of other facts, and its own behind them, where the best match stands.
    """

    def __init__(
        self,
        attachment: Attachment,
        facts: Sequence[Planted],
        opening: Sequence[int],
        *,
        context: str,
        hits: int,
        seed: int = 0,
    ):
        self._attachment, self._plan = attachment, attachment.plan
        self._opening, self.facts = list(opening[:_OPENING]), list(facts)
        self._hits = min(hits, len(facts))
        self._chunks = [self._encoded(index, fact.chunk, context) for index, fact in enumerate(facts)]
        self._batches = list(self._in_batches(random.Random(f"hits:{seed}")))

    def told(self, layers: Collection[int]) -> Told:
        """Ask for all facts with memory in these retrieval layers only; none for no memory."""
        nats, right = torch.empty(len(self.facts)), torch.empty(len(self.facts), dtype=torch.bool)
        for batch in self._batches:
            cache = self._copy(batch.cache)
            with self._retrieving(layers):
                if layers:
                    cache.set_memory(batch.memory)
                nats[batch.index], right[batch.index] = self._asked(batch, cache)
        return Told(nats, right)

    @contextmanager
    def _retrieving(self, layers: Collection[int]) -> Iterator[None]:
        """Let only these layers retrieve while the block runs."""
        if layers:
            self._attachment.plan = with_layers(self._plan, layers)
        try:
            yield
        finally:
            self._attachment.plan = self._plan

    def _copy(self, cache: MemoryCache) -> MemoryCache:
        """Return a copy of a window, of the same attachment."""
        return copy.deepcopy(cache, {id(self._attachment): self._attachment})

    # -- what is there before a question --------------------------------------------------------------------------

    def _encoded(self, index: int, ids: list[int], context: str) -> RecalledChunk:
        """Return a chunk as it is stored, without compression."""
        captured = encode(self._attachment, ids) if context == "isolated" else self._read(ids)
        offsets = torch.arange(len(ids))
        layers = {layer: (part.keys, part.values, offsets) for layer, part in captured.layers.items()}
        return RecalledChunk(index, index * len(ids), layers)

    def _read(self, ids: list[int]) -> Captured:
        """Return a chunk as `MemoryModel.read` stores it: alone in the window, behind the sinks of its stream."""
        left = _Left(len(ids))
        cache = MemoryCache(self._attachment, left, window=max(len(ids), len(self._opening)))
        for part in (self._opening, ids):
            self._feed([part], cache)
            left.chunk = len(part)
            cache.flush()
        return left.rows[-1]

    def _in_batches(self, draw: random.Random) -> Iterator[_Batch]:
        groups: dict[int, list[int]] = {}
        for index, fact in enumerate(self.facts):
            groups.setdefault(len(fact.local), []).append(index)
        for group in groups.values():
            for at in range(0, len(group), _BATCH):
                own = group[at : at + _BATCH]
                facts = [self.facts[i] for i in own]
                yield _Batch(facts, own, self._window(facts), [self._recalled(i, draw) for i in own])

    def _recalled(self, own: int, draw: random.Random) -> list[RecalledChunk]:
        """Return chunks of other facts, drawn, and the one of fact `own` next to the question, as the best match is."""
        others = draw.sample([i for i in range(len(self.facts)) if i != own], self._hits - 1)
        return [self._chunks[i] for i in (*others, own)]

    def _window(self, facts: Sequence[Planted]) -> MemoryCache:
        """Return a window with the local texts of these facts, in a stream whose beginning has left it."""
        cache = MemoryCache(self._attachment)
        self._feed([self._opening] * len(facts), cache)
        cache.flush()
        if facts[0].local:
            self._feed([fact.local for fact in facts], cache)
        return cache

    # -- asking ---------------------------------------------------------------------------------------------------

    def _feed(self, rows: list[list[int]], cache: MemoryCache) -> None:
        ids = torch.tensor(rows, device=device_of(self._attachment.model))
        with torch.no_grad():
            self._attachment.decoder(input_ids=ids, past_key_values=cache, use_cache=True)

    def _asked(self, batch: _Batch, cache: MemoryCache) -> tuple[Tensor, Tensor]:
        """Return nats and right of a batch: questions and answers are fed in one forward, padded on the left."""
        device = device_of(self._attachment.model)
        rows = [fact.question + fact.answer for fact in batch.facts]
        length, kept = max(map(len, rows)), max(len(fact.answer) for fact in batch.facts) + 1
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
        seen = cache.get_seq_length()
        mask = torch.ones(len(rows), seen + length, dtype=torch.long, device=device)
        for index, row in enumerate(rows):
            mask[index, seen : seen + length - len(row)] = 0
        with torch.no_grad():
            logits = self._attachment.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=kept
            ).logits[:, -kept:]
        chosen, likely = logits.argmax(-1).cpu(), logits.float().log_softmax(-1).cpu()
        nats = torch.tensor([_nats(own, fact.answer) for own, fact in zip(likely, batch.facts, strict=True)])
        right = [
            own[-len(fact.answer) - 1 : -1].tolist() == fact.answer and self._ends(int(own[-1]))
            for own, fact in zip(chosen, batch.facts, strict=True)
        ]
        return nats, torch.tensor(right)

    def _ends(self, token: int) -> bool:
        """Tell whether an answer ends before this token."""
        tokenizer: Any = self._attachment.tokenizer
        return not tokenizer.decode([token])[:1].isalnum()


@dataclass
class _Left:
    """The memory of a window that is read only for what leaves it."""

    chunk: int
    cadence, query_tokens, query, recent, needs_queries = 1, 0, "past", 0, False

    def __post_init__(self) -> None:
        self.rows: list[Captured] = []

    def remember(self, rows: Sequence[Captured | None]) -> None:
        self.rows += [row for row in rows if row is not None]

    def recall(self, rows: Sequence[Sequence[int]], without: object = None) -> None:
        return None


def with_layers(plan: MemoryPlan, layers: Collection[int]) -> MemoryPlan:
    """Return a plan in which only these layers retrieve; in mode per_layer they alone remember, too."""
    chosen = tuple(sorted(layers))
    if plan.mode == "memlong":
        return replace(plan, retrieval_layers=chosen)
    return replace(plan, memory_layers=chosen, retrieval_layers=chosen)


def _nats(likely: Tensor, answer: list[int]) -> float:
    """Return minus the log-probability of an answer; likely: `[A, V]`, the last row behind the answer's last token."""
    own = likely[-len(answer) - 1 : -1]
    return min(_WORST, -float(own.gather(1, torch.tensor(answer)[:, None]).sum()))
