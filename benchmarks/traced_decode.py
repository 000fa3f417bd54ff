"""The row `traced_decode` of the benchmarks: decoding in a session while it is noted why the answer comes, beside the
same session when nothing is noted."""

import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Target, compare
from memory_service.api.embedded import LocalServer
from model_worker.attachment.model_names import SHIPPED
from model_worker.model import MemoryModel
from model_worker.session.preset import SessionPreset
from model_worker.session.session import Session

ROW = "traced_decode"
_STORY = "The sea is wide, and ships come and go over it while the captain counts the days and the stars above her. "
_EVERY = 8


def run(bench: Bench) -> Iterator[Result]:
    """Time answers of the shipped model behind some 1,400 tokens, of which the window holds the last ones and the bank
    the others; the processor time of the thread that decodes, so that other work on the machine counts little."""
    torch.set_num_threads(1)
    tokens, folder = (16 if bench.quick else 64), bench.scratch(ROW)
    bench.say(ROW)
    with (
        LocalServer(folder / "data", listen="127.0.0.1:0", durability="os") as server,
        MemoryModel.from_pretrained(SHIPPED, memory=server.address, bank=()) as model,
    ):
        preset = SessionPreset.of(model.model, model.chunk)
        with Session.open(model, window=preset.window, **preset.memory) as session:
            for _ in range(10):
                session.tell(5 * _STORY, "Yes.")
            contenders = [
                Contender(f"one token in {_EVERY} is looked at", "ours", _answering(session, _EVERY, tokens)),
                Contender("each token is looked at", "ours", _answering(session, 1, tokens), judged=False),
                Contender(
                    "nothing is noted",
                    "peer",
                    _answering(session, 0, tokens),
                    (Target("ratio", 0.95, at_least=True),),
                ),
            ]
            rounds = bench.n(24)
            yield from compare(ROW, "decode", contenders, rounds, records=tokens - 1, unit="tokens/s")
    bench.clear(folder)


def _answering(session: Session, every: int, tokens: int) -> Callable[[], float]:
    """Return a function that lets a session answer, and returns the seconds from the first token to the last.

    every: one in so many tokens is looked at; 0: none is.
    """

    def answer() -> float:
        at: list[float] = []
        session.why = every
        session.say(
            "And then?",
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            stopped=lambda: at.append(time.thread_time()) is not None,
        )
        return at[-1] - at[0]

    return answer
