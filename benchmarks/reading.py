"""The row `reading` of the benchmarks: a text that is read into a bank, beside forwards of the same blocks alone."""

import os
from collections.abc import Iterator

import torch

import kvbank
from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Skipped, Target, compare, timed, worked
from benchmarks.service import serving
from model_worker.attachment.model_names import SHIPPED
from model_worker.errors import WorkerError
from model_worker.model import MemoryModel
from model_worker.window.chunking import chunks

ROW = "reading"
_STORY = "The sea is wide, and ships come and go over it while captain {} counts the days and the stars above her. "
_TOKENS = 1280


def run(bench: Bench) -> Iterator[Result]:
    """Time the reading of 1,280 tokens, with one thread of torch and with as many as there are cores; the shipped
    model, and SmolLM2-135M where it is in the cache."""
    for name in (SHIPPED, "smollm2"):
        folder = bench.scratch(f"{ROW}-{name}")
        with serving(folder) as service, kvbank.connect(service.address) as client:
            try:
                model = MemoryModel.from_pretrained(name, memory=client, bank=ROW)
            except WorkerError as error:
                bench.skipped.append(Skipped(ROW, name, str(error)))
                continue
            with model:
                for threads in dict.fromkeys((1, os.cpu_count() or 1)):
                    bench.say(f"{ROW}, {name}, {threads}")
                    torch.set_num_threads(threads)
                    yield from _compared(model, f"{name}, torch with {threads} threads: read", bench.n(8))
        bench.clear(folder)


def _compared(model: MemoryModel, title: str, rounds: int) -> Iterator[Result]:
    """Yield tokens a second of reading, and of the forwards alone, each behind what it is read behind.

    Tokens are counted by the clock, and then by the processor time of the worker, which other work beside changes less.
    """
    ids = model.ids("".join(_STORY.format(number) for number in range(100)))[:_TOKENS]

    def forwards() -> None:
        cache = model.cache(memory=False)
        with torch.no_grad():
            for block in chunks(ids, model.chunk, model.ends):
                if model.memory.context == "isolated":
                    cache = model.cache(memory=False)
                tokens = torch.tensor([block])
                model.attachment.decoder(input_ids=tokens, past_key_values=cache, use_cache=True)

    for of, measured, times in (("", timed, rounds), (", of processor time", worked, max(2, rounds // 2))):
        contenders = [
            Contender("ours", "ours", measured(lambda: model.read(ids))),
            Contender(
                "forwards of the same blocks", "floor", measured(forwards), (Target("ratio", 0.95, at_least=True),)
            ),
        ]
        yield from compare(ROW, f"{title}{of}", contenders, times, records=len(ids), unit="tokens/s")
