"""The time to the first token of an answer is measured here, behind a history that is longer than the context.

Four ways answer the same question with the same greedy step:

* `memory`: the question alone is fed; the K-V of the hits come from the service, none of them held by the worker.
* `memory, held`: the same, where the worker holds these K-V from an earlier recall.
* `re-reading the hits`: the plain model is fed the tokens of the same hits and the question.
* `re-reading all`: the plain model is fed the whole history and the question, as far as it was trained for that.
* `session`, where sessions are timed too: a worker that has nothing of the conversation takes its lease, gets turns and
  window from the service, feeds the question as a message and recalls, and the answer's first token is durable. Then
  all is also re-read beyond the length that the model was trained for: time depends on shapes.

Every way's time includes its search, which brings the same hits to each: scores leave none out. A round runs each way
once, another first in each round, with a question of its own; figures are medians over rounds, after a round to warm
up. Time depends on shapes alone, so the bank is filled with the texts and embeddings of real chunks and with the K-V of
a few of them: reading is no part of the time.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle, islice
from random import Random
from statistics import median, quantiles
from typing import Any

import torch
from transformers import DynamicCache

import kvbank
from model_worker.errors import InputError
from model_worker.evaluate.banks import open_memory
from model_worker.evaluate.cost import Cost, counted
from model_worker.evaluate.greedy import answer
from model_worker.evaluate.peaks import peak_bytes
from model_worker.evaluate.session_history import SessionHistory, SessionWay
from model_worker.evaluate.stream import window_of
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.remember.payload_cache import PayloadCache
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode

MEMORY, HELD, HITS, ALL = "memory", "memory, held", "re-reading the hits", "re-reading all"
SESSION = "session"
_BANK, _SOURCES, _BATCH, _PIECE = "history", 8, 16, 512
_ALL_ROUNDS = 3  # rounds of the longest way
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Says what is timed, and how often.

    history: lengths in tokens. question: tokens of it. rounds: after the first. all_up_to: the longest history that is
    read again as a whole. sessions: whether sessions are timed too.
    """

    history: tuple[int, ...]
    question: int
    rounds: int
    all_up_to: int
    seed: int
    sessions: bool = False


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The time of one way behind one history.

    tokens: fed before the first token of the answer. seconds: the median of `rounds`; width: 1.57 interquartile ranges
    over the square root of the rounds, half the 95 % interval of a median (McGill, Tukey and Larsen 1978). ratio: the
    median over rounds of the time of `re-reading the hits` divided by this one's, with its width. peak: bytes of
    tensors above the weights, of one run; None where the model is not on a CPU.
    """

    history: int
    way: str
    tokens: int
    rounds: int
    seconds: float
    width: float
    ratio: float
    ratio_width: float
    peak: int | None


@dataclass(frozen=True, slots=True)
class SessionTime:
    """What a session of a history is. faster: the median over rounds of the time of `re-reading all` divided by that of
    `session`, with its width; None where all was not re-read. chunks, chunk_bytes: in the bank; window_bytes: that the
    worker gets beside the K-V of the hits."""

    history: int
    faster: float | None
    faster_width: float | None
    chunks: int
    chunk_bytes: int
    window_bytes: int


@dataclass
class FirstTokenRun:
    """A run over one bank of `model`, filled with chunks of a text. progress: called with (stage, done, in all).

    Raises InputError for a text without a chunk.
    """

    model: MemoryModel
    text: Sequence[int]
    plan: Plan
    progress: Progress
    cost: Cost = field(default_factory=Cost)
    times: list[SessionTime] = field(default_factory=list)
    _sessions: SessionHistory | None = None

    def report(self) -> dict[str, Any]:
        """Fill the bank, time every way, and return all figures as plain values."""
        try:
            with counted(self.model.model, self.cost):
                history = self._filled()
                rows = [row for length in sorted(set(self.plan.history)) for row in self._timed(history, length)]
            self.cost.stored = self.model.client.get_bank(_BANK).usage.bytes
        finally:
            if self._sessions is not None:
                self._sessions.close()
        return {
            "rows": [asdict(row) for row in rows],
            "sessions": [asdict(time) for time in self.times],
            "hits": self.model.memory.top_k,
            "chunk": self.model.chunk,
            "question": self.plan.question,
            "load": os.getloadavg()[0],
            "threads": torch.get_num_threads(),
            "cost": asdict(self.cost),
        }

    def _filled(self) -> list[int]:
        """Fill the bank with chunks of the text, repeated, up to the longest history, and return its tokens."""
        model, chunk = self.model, self.model.chunk
        if len(self.text) < 2 * chunk:
            raise InputError(f"a text of {len(self.text)} tokens is too short for chunks of {chunk}")
        history = list(islice(cycle(self.text), max(self.plan.history)))
        memory = open_memory(model, _BANK, count=False)
        if self.plan.sessions:
            self._sessions = SessionHistory(model, _BANK, history)
        pieces = [(at, history[at : at + chunk]) for at in range(0, len(history) - chunk + 1, chunk)]
        sources = [
            encode(model.attachment, piece, needs_queries=memory.needs_queries) for _, piece in pieces[:_SOURCES]
        ]
        made = (
            self._own(memory.new_chunk(Captured(piece, at, source.layers, "isolated")))
            for (at, piece), source in zip(pieces, cycle(sources), strict=False)
        )
        reader, embedder = model.attachment.reader.digest, memory.embedder.digest
        for at in range(0, len(pieces), _BATCH):
            batch = list(islice(made, _BATCH))
            model.client.write_many(_BANK, batch, reader_digest=reader, embedder_digest=embedder)
            self.progress("filling the bank", min(at + _BATCH, len(pieces)), len(pieces))
        return history

    def _own(self, chunk: kvbank.NewChunk) -> kvbank.NewChunk:
        return chunk if self._sessions is None else self._sessions.own(chunk)

    # -- timing ---------------------------------------------------------------------------------------------------

    def _timed(self, history: Sequence[int], length: int) -> list[FirstToken]:
        """Return the times of every way behind the first `length` tokens of a history."""
        ways = self._ways(history, length)
        draw = Random(f"kvbank-first-token:{self.plan.seed}:{length}")
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        fed: dict[str, int] = {}
        rounds = self.plan.rounds + 1
        for turn in range(rounds):
            at = draw.randrange(max(1, length - self.plan.question))
            question = history[at : at + self.plan.question]
            for name in _turned(list(ways), turn):
                if name == ALL and turn > _ALL_ROUNDS:
                    continue
                if name == HELD:
                    ways[name](question)  # so that the worker holds what this question recalls
                with counted(self.model.model, Cost()) as cost:
                    ways[name](question)
                _rest(ways[name])
                if turn:
                    seconds[name].append(cost.seconds)
                fed[name] = cost.tokens
            self.progress(f"behind {length:,} tokens", turn + 1, rounds)
        cpu = self.model.model.device.type == "cpu"
        peaks = dict[str, int | None]()
        for name, way in ways.items():
            peaks[name] = peak_bytes(partial(way, question)) if cpu else None
            _rest(way)
        if isinstance(session := ways.get(SESSION), SessionWay):
            self.times.append(self._session_time(length, seconds, session))
        return [self._row(length, name, fed[name], seconds, peaks[name]) for name in ways]

    def _row(
        self, length: int, name: str, tokens: int, seconds: Mapping[str, Sequence[float]], peak: int | None
    ) -> FirstToken:
        own = seconds[name]
        ratios = [again / mine for again, mine in zip(seconds[HITS], own, strict=False)]
        middle, width = median_width(own)
        return FirstToken(length, name, tokens, len(own), middle, width, *median_width(ratios), peak)

    def _session_time(self, length: int, seconds: Mapping[str, Sequence[float]], session: SessionWay) -> SessionTime:
        usage = self.model.client.get_bank(_BANK).usage
        chunks = length // self.model.chunk
        ratios = [all_ / own for all_, own in zip(seconds.get(ALL, ()), seconds[SESSION], strict=False)]
        faster, width = median_width(ratios) if ratios else (None, None)
        return SessionTime(
            length, faster, width, chunks, usage.bytes * chunks // max(1, usage.chunks), session.window_bytes()
        )

    def _ways(self, history: Sequence[int], length: int) -> dict[str, Callable[[Sequence[int]], int]]:
        """Return what each way does with a question, by name."""
        trained = self.model.attachment.trained_length
        chunks = kvbank.Filter(start_before=length)
        ways: dict[str, Callable[[Sequence[int]], int]] = {}
        for name, kept in ((MEMORY, 1), (HELD, 1 << 30)):  # a cache of one byte keeps nothing
            ways[name] = partial(self._recall, self._memory(chunks, kept))
        ways[HITS] = partial(self._reread, self._memory(chunks, 1))
        within = trained is None or length + self.plan.question < trained or self._sessions is not None
        if length <= self.plan.all_up_to and within:
            ways[ALL] = partial(self._plain, list(history[:length]))
        if self._sessions is not None:
            ways[SESSION] = self._sessions.way(length)
        return ways

    def _memory(self, chunks: kvbank.Filter, kept: int) -> Memory:
        """Return a memory that recalls the best hits whatever their score, and holds `kept` bytes of their K-V."""
        memory = open_memory(
            self.model, _BANK, count=False, min_score=None, min_share=None, payload_cache=PayloadCache(kept)
        )
        memory.filter = chunks
        return memory

    def _recall(self, memory: Memory, question: Sequence[int]) -> int:
        model = self.model
        return answer(model.model, window_of(model, memory), question, 1, model.chunk)[0]

    def _reread(self, memory: Memory, question: Sequence[int]) -> int:
        """Search without K-V, and read the tokens of the hits before the question."""
        from model_worker.embed import embedded_queries

        text = str(self.model.tokenizer.decode(list(question)))
        found = memory.client.retrieve(
            _BANK,
            embedded_queries(memory.embedder, [text]),
            top_k=memory.top_k,
            filter=memory.filter,
            embedder_digest=memory.embedder.digest,
            payload=False,
            count=False,
        )
        return self._plain([token for chunk in found.chunks.values() for token in chunk.token_ids], question)

    def _plain(self, before: Sequence[int], question: Sequence[int]) -> int:
        return answer(self.model.model, DynamicCache(), [*before, *question], 1, _PIECE)[0]


def _rest(way: object) -> None:
    """Let a way do what no answer waits for."""
    if isinstance(way, SessionWay):
        way.rest()


def _turned(names: Sequence[str], turn: int) -> Iterator[str]:
    """Yield the names, beginning with another one in each turn."""
    for step in range(len(names)):
        yield names[(turn + step) % len(names)]


def median_width(values: Sequence[float]) -> tuple[float, float]:
    """Return the median, and half its 95 % interval by the quartiles; the width is 0 for fewer than two values."""
    if len(values) < 2:
        return (values[0] if values else 0.0), 0.0
    first, _, third = quantiles(values, n=4, method="inclusive")
    return median(values), 1.57 * (third - first) / len(values) ** 0.5
