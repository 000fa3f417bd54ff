"""What a long session costs as a whole is measured here: a text is read once, and many questions are asked behind it.

Three ways do the same, one after the other:

* `memory`: the text is read into a bank; each question is fed alone, and attends to the K-V of its hits.
* `re-reading the hits`: texts and embeddings are kept, and the plain model reads the tokens of the same hits before
  each question, as retrieval of texts does.
* `plain cache`: the plain model reads the text once, keeps the K-V of all of it, and goes on from there with each
  question. Time and memory depend on shapes alone, so the text may be longer than the model was trained for.

Questions are drawn from the text, and no score leaves a hit out. The journal has a line for each reading and each
question: a run that goes on reads again only where a way has questions left, and not into a bank that was kept.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, cycle, islice
from random import Random
from statistics import median
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from model_worker.embed import embedded, embedded_queries
from model_worker.errors import InputError
from model_worker.evaluate.banks import open_memory
from model_worker.evaluate.cost import Cost, counted
from model_worker.evaluate.greedy import answer
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.resident import ResidentPeak
from model_worker.evaluate.stream import window_of
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.window.chunking import chunks

MEMORY, HITS, PLAIN = "memory", "re-reading the hits", "plain cache"
_BANK = "whole-session"
_PIECE = 512  # tokens that the plain model is fed at once

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the ways have to do.

    tokens: of the text. questions: how many, of `question` tokens each. answer: the most tokens of an answer.
    plain_up_to: the plain cache is measured up to so many tokens of text. seed: draws the questions.
    """

    tokens: int
    questions: int
    question: int
    answer: int
    plain_up_to: int
    seed: int


class _Way(Protocol):
    """One way to have a text at hand.

    `read` reads the text and returns the bytes that are kept of it; `ask` returns the tokens of an answer.
    """

    def read(self, ids: Sequence[int], progress: Callable[[int, int], None]) -> int: ...

    def ask(self, question: Sequence[int]) -> list[int]: ...


@dataclass
class WholeSession:
    """A run over one bank of `model`.

    text: token ids, which are repeated where more are asked for. progress: called with (stage, done, in all).

    Raises InputError for a text that is shorter than a chunk.
    """

    model: MemoryModel
    text: Sequence[int]
    plan: Plan
    journal: Journal
    progress: Progress
    cost: Cost = field(default_factory=Cost)

    def report(self) -> dict[str, Any]:
        """Measure all ways, and return the figures as plain values."""
        plan, model = self.plan, self.model
        if (length := min(len(self.text), plan.tokens)) < model.chunk:
            raise InputError(f"a text of {length} tokens is shorter than a chunk of {model.chunk}")
        ids = list(islice(cycle(self.text), plan.tokens))
        memory = open_memory(model, _BANK, count=False, min_score=None, min_share=None)
        ways: dict[str, _Way] = {
            MEMORY: _Remembered(model, memory, plan.answer),
            HITS: _HitsAgain(model, memory, plan.answer),
        }
        if plan.tokens <= plan.plain_up_to:
            ways[PLAIN] = _PlainCache(model, plan.answer)
        rows = [self._measured(name, way, ids) for name, way in ways.items()]
        self.cost.stored = model.client.get_bank(_BANK).usage.bytes
        return {
            "rows": rows,
            "tokens": plan.tokens,
            "questions": plan.questions,
            "hits": model.memory.top_k,
            "chunk": model.chunk,
            "load": os.getloadavg()[0],
            "threads": torch.get_num_threads(),
            "cost": asdict(self.cost),
        }

    def _measured(self, name: str, way: _Way, ids: Sequence[int]) -> dict[str, Any]:
        """Return what one way costs: of the reading, of the questions, and of both together."""
        keys, read = self._keys(name), self.journal.get(f"{name}/read")
        if read is None or self._has_to_read_again(name, read):
            read = self._part(f"{name}/read", lambda: way.read(ids, lambda done, _: self._tell(name, done)))
        asked = []
        for number, (key, question) in enumerate(zip(keys, self._questions(ids), strict=True)):
            asked.append(self.journal.get(key) or self._part(key, partial(_length, way, question)))
            self.progress(f"{name}: questions", number + 1, len(keys))
        seconds = [part["seconds"] for part in asked]
        after = list(accumulate(seconds, initial=read["seconds"]))[1:]
        return {
            "way": name,
            "read_seconds": read["seconds"],
            "answer_seconds": median(seconds),
            "seconds": after[-1],
            "after": after,
            "fed": read["fed"] + sum(part["fed"] for part in asked),
            "kept": read["made"],
            "peak": max((part["peak"] for part in (read, *asked) if part["peak"] is not None), default=None),
        }

    def _tell(self, name: str, done: int) -> None:
        self.progress(f"{name}: reading", done, self.plan.tokens)

    def _keys(self, name: str) -> list[str]:
        """Return under which keys the journal has the questions of a way."""
        return [f"{name}/{number}" for number in range(self.plan.questions)]

    def _has_to_read_again(self, name: str, read: dict[str, Any]) -> bool:
        """Tell whether questions are left for which nothing is at hand of what an earlier run has read.

        The bank of the memory is searched for the hits that are re-read too.
        """
        users: dict[str, tuple[str, ...]] = {MEMORY: (MEMORY, HITS), HITS: (), PLAIN: (PLAIN,)}
        if all(self.journal.get(key) is not None for user in users[name] for key in self._keys(user)):
            return False
        return name == PLAIN or self.model.client.get_bank(_BANK).usage.bytes != read["made"]

    def _part(self, key: str, work: Callable[[], int]) -> dict[str, Any]:
        """Do some work, note what it cost, and return that. work: returns a number, which is noted as `made`."""
        with ResidentPeak() as resident, counted(self.model.model, Cost()) as cost:
            made = work()
        self.cost.seconds += cost.seconds
        self.cost.tokens += cost.tokens
        part = {"seconds": cost.seconds, "fed": cost.tokens, "made": made, "peak": resident.bytes}
        self.journal.put(key, part)
        return part

    def _questions(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        """Yield the questions of all ways, which are pieces of the text and the same in each run."""
        draw = Random(f"kvbank-whole-session:{self.plan.seed}")
        for _ in range(self.plan.questions):
            at = draw.randrange(max(1, len(ids) - self.plan.question))
            yield ids[at : at + self.plan.question]


def _length(way: _Way, question: Sequence[int]) -> int:
    """Return how many tokens a way answers a question with."""
    return len(way.ask(question))


class _Remembered:
    """The text is in a bank, as K-V."""

    def __init__(self, model: MemoryModel, memory: Memory, most: int):
        self._model, self._memory, self._most = model, memory, most

    def read(self, ids: Sequence[int], progress: Callable[[int, int], None]) -> int:
        """Read the text into the bank, which is made anew where it has something, and return the bank's bytes."""
        client = self._model.client
        if client.get_bank(_BANK).usage.chunks:
            client.delete_bank(_BANK)
            self._memory.open(dtype=self._model.settings.store_dtype)
        self._model.read(list(ids), progress, memory=self._memory)
        return client.get_bank(_BANK).usage.bytes

    def ask(self, question: Sequence[int]) -> list[int]:
        """Feed a question alone, with what it recalls."""
        model = self._model
        return answer(model.model, window_of(model, self._memory), question, self._most, model.chunk)


class _HitsAgain:
    """The text is kept as chunks of text with their embeddings, of which the model reads what is found.

    The search goes by the bank of the memory, without its K-V, so that the hits are the same.
    """

    def __init__(self, model: MemoryModel, memory: Memory, most: int):
        self._model, self._memory, self._most = model, memory, most

    def read(self, ids: Sequence[int], progress: Callable[[int, int], None]) -> int:
        """Embed the chunks of the text, and return the bytes of their texts and embeddings."""
        model, kept, done = self._model, 0, 0
        for block in chunks(list(ids), model.chunk, model.ends):
            text, done = self._memory.text(block), done + len(block)
            kept += len(text.encode()) + embedded(self._memory.embedder, [text])[0].nbytes
            progress(done, len(ids))
        return kept

    def ask(self, question: Sequence[int]) -> list[int]:
        """Search for the texts of the hits, and feed their tokens and the question to the plain model."""
        memory, text = self._memory, self._memory.text(question)
        found = memory.client.retrieve(
            _BANK,
            embedded_queries(memory.embedder, [text]),
            top_k=memory.top_k,
            embedder_digest=memory.embedder.digest,
            payload=False,
            count=False,
        )
        before = [token for chunk in found.chunks.values() for token in chunk.token_ids]
        return answer(self._model.model, DynamicCache(), [*before, *question], self._most, _PIECE)


class _PlainCache:
    """The K-V of the whole text stay in this process."""

    def __init__(self, model: MemoryModel, most: int):
        self._model, self._most = model, most
        self._cache, self._length = DynamicCache(), 0

    def read(self, ids: Sequence[int], progress: Callable[[int, int], None]) -> int:
        """Feed the whole text to the plain model, and return the bytes of its K-V."""
        self._cache, self._length = DynamicCache(), len(ids)
        net = self._model.model
        with torch.no_grad():
            for at in range(0, len(ids), _PIECE):
                piece = torch.tensor([list(ids[at : at + _PIECE])], device=net.device)
                net(input_ids=piece, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
                progress(min(at + _PIECE, len(ids)), len(ids))
        return sum(part.nbytes for layer in self._cache.layers for part in (layer.keys, layer.values))

    def ask(self, question: Sequence[int]) -> list[int]:
        """Feed a question behind the text, and take it and its answer out of the cache again."""
        made = answer(self._model.model, self._cache, question, self._most, _PIECE)
        self._cache.crop(self._length - self._cache.get_seq_length())  # so many less than 0 are taken out
        return made
