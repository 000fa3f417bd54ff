"""The row `joint_decode` of the benchmarks: requests to a worker that write their next tokens in one forward, beside
the same requests whose tokens are written one after the other."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Skipped, compare
from model_worker.attachment.model_names import SHIPPED
from model_worker.errors import WorkerError
from model_worker.model import MemoryModel
from model_worker.serve.engine import Engine, Turn

ROW = "joint_decode"
_PROMPT, _NEW, _AT_ONCE = 32, 24, 8
_THEIRS = "one token after the other"


def run(bench: Bench) -> Iterator[Result]:
    """Time 1, 2, 4 and 8 requests that begin together, with prompts of about 32 tokens and answers of 24, greedy, one
    thread.

    Two models: the one that comes with kvbank, and SmolLM2-135M where it is in the cache. Tokens are counted while all
    requests write: from the moment when the last of them has its first token, until the first of them ends.
    """
    torch.set_num_threads(1)
    for name in (SHIPPED, "smollm2"):
        try:
            model = MemoryModel.from_pretrained(name, memory=str(bench.scratch("joint")), bank=())
        except WorkerError as error:
            bench.skipped.append(Skipped(ROW, name, str(error)))
            continue
        with model:
            for sessions in (1, 2, 4, _AT_ONCE):
                bench.say(f"{ROW}, {name}, {sessions}")
                yield from _compared(model, name, sessions, bench.n(8))


def _compared(model: MemoryModel, name: str, sessions: int, rounds: int) -> Iterator[Result]:
    """Yield the results of so many requests at once: all tokens a second, and the slowest request's."""
    ours, theirs = _Requests(model, sessions, _AT_ONCE), _Requests(model, sessions, 1)
    contenders = [Contender("ours", "ours", ours.run), Contender(_THEIRS, "floor", theirs.run)]
    title = f"{name}, {sessions} at once: tokens of all"
    yield from compare(ROW, title, contenders, rounds, records=1, unit="tokens/s")
    slowest = [median(each.slowest[1:]) for each in (ours, theirs)]
    title, load = f"{name}, {sessions} at once: tokens of the slowest", os.getloadavg()[0]
    yield Result(ROW, title, slowest[0], _THEIRS, "floor", slowest[1], "tokens/s", rounds, load)


@dataclass
class _Requests:
    """Requests of one caller that begin together, of which so many may write a token in one forward.

    slowest: tokens a second of the slowest request, by round.
    """

    model: MemoryModel
    count: int
    most_together: int
    slowest: list[float] = field(default_factory=list)

    def run(self) -> float:
        """Answer all requests, and return the seconds for each token that was written while all of them wrote."""
        engine, ready = Engine(most_running=2 * self.count, most_together=self.most_together), threading.Event()
        watches = [_Watch() for _ in range(self.count)]
        jobs = [engine.submit("", number, self._work(number, watch, ready)) for number, watch in enumerate(watches)]
        ready.set()
        for job in jobs:
            job.result.result()
        begin, end = max(watch.tokens[0] for watch in watches), min(watch.tokens[-1] for watch in watches)
        counts = [sum(begin < moment <= end for moment in watch.tokens) for watch in watches]
        self.slowest.append(min(counts) / (end - begin))
        return (end - begin) / sum(counts)

    def _work(self, number: int, watch: "_Watch", ready: threading.Event) -> Callable[[Turn], None]:
        def work(turn: Turn) -> None:
            ready.wait()
            with turn.holding_model():
                self.model.generate(
                    list(range(100, 100 + _PROMPT + number)),
                    cache=self.model.cache(memory=False),
                    progress=turn.progress,
                    step=turn.step,
                    streamer=watch,
                    max_new_tokens=_NEW,
                    min_new_tokens=_NEW,
                    do_sample=False,
                )

        return work


@dataclass
class _Watch:
    """The moments at which the tokens of an answer came, as a streamer of `generate`."""

    tokens: list[float] = field(default_factory=list)
    _prompt: bool = True

    def put(self, value: Any) -> None:
        """Note the moment of a token; the first call hands over the prompt."""
        if self._prompt:
            self._prompt = False
        else:
            self.tokens.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end of an answer."""
