"""The row `recall_ahead` of the benchmarks: decoding with a memory whose service is some milliseconds away, with
recalls that are asked for when they are due and some tokens ahead, beside the same window without a memory."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import kvbank
from benchmarks.bench import Bench
from benchmarks.lines import Worker
from benchmarks.pair import Contender, Result, Skipped, Target, compare
from benchmarks.service import serving
from model_worker.attachment.model_names import SHIPPED
from model_worker.errors import WorkerError
from model_worker.model import MemoryModel

ROW = "recall_ahead"
# Milliseconds by model; the larger one takes two minutes for each.
_DELAYS_MS = {SHIPPED: (0, 5, 20, 100), "smollm2": (0, 20)}
# A recall brings as many chunks as are asked for, however little they have to do with the query.
_ALL_HITS = {"min_share": 0.0, "min_score": -1.0}
_AHEAD, _TOP_K, _PROMPT, _NEW, _STORIES = 16, 16, 192, 129, 140
# Without the end of a sentence, at which a chunk would end: so all chunks have 64 tokens.
_STORY = "The sea is wide, and ships come and go over it while captain {} counts the days and the stars above her, "


def run(bench: Bench) -> Iterator[Result]:
    """Time 128 greedy tokens behind a prompt of 192, with 1,024 recalled tokens and a recall every 64 tokens, one
    thread; the shipped model, and SmolLM2-135M where it is in the cache."""
    torch.set_num_threads(1)
    for name, delays in _DELAYS_MS.items():
        folder = bench.scratch(f"{ROW}-{name}")
        with (
            serving(folder) as service,
            Worker("benchmarks.slow_link", service.address.split(":")[1], log=folder / "link.log") as link,
            kvbank.connect(f"127.0.0.1:{link.call('listen')}") as client,
        ):
            try:
                model = MemoryModel.from_pretrained(name, memory=client, bank=ROW, top_k=_TOP_K, **_ALL_HITS)
            except WorkerError as error:
                bench.skipped.append(Skipped(ROW, name, str(error)))
                continue
            with model:
                model.read("".join(_STORY.format(number) for number in range(_STORIES)))
                for delay in delays:
                    bench.say(f"{ROW}, {name}, {delay} ms")
                    link.call("delay", delay / 1000)
                    yield from _compared(model, f"{name}, {delay} ms more latency", bench.n(6))
        bench.clear(folder)


def _compared(model: MemoryModel, title: str, rounds: int) -> Iterator[Result]:
    """Yield tokens a second of the ways to decode."""
    prompt = model.ids("".join(_STORY.format(number) for number in range(90, 110)))[:_PROMPT]

    def writing(ahead: int | None) -> Callable[[], float]:
        """Return what writes an answer, and returns the seconds from its first token to its last."""
        memory = None if ahead is None else model.with_bank(ROW, ahead=ahead, strict=True)

        def write() -> float:
            watch = _Watch()
            cache = model.cache(False if memory is None else memory)
            model.generate(
                prompt, cache=cache, streamer=watch, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False
            )
            return watch.at[-1] - watch.at[0]

        return write

    contenders = [
        Contender(f"asked {_AHEAD} tokens ahead", "ours", writing(_AHEAD)),
        Contender("asked when due", "ours", writing(0), judged=False),
        Contender(
            "the same window without memory", "floor", writing(None), (Target("ratio", 1 / 1.05, at_least=True),)
        ),
    ]
    yield from compare(ROW, f"{title}: decode", contenders, rounds, records=_NEW - 1, unit="tokens/s")


@dataclass
class _Watch:
    """The moments at which the tokens of an answer came, as a streamer of `generate`."""

    at: list[float] = field(default_factory=list)
    _prompt: bool = True

    def put(self, value: Any) -> None:
        """Note the moment of a token; the first call hands over the prompt."""
        if self._prompt:
            self._prompt = False
        else:
            self.at.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing at the end of an answer."""
