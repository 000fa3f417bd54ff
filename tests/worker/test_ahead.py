"""A recall that is asked for before it is due: the model goes on meanwhile, and what it writes depends on its tokens
alone."""

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedModel

import kvbank
from kvbank.embed.lexical import LexicalEmbedder
from memory_service.api.embedded import LocalServer
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.remember.service_link import ServiceLink
from model_worker.serve.engine import Engine, Turn
from model_worker.window.trace import Trace
from tests.support.stalling import StallingProxy
from tests.support.waiting import wait_until
from tests.worker.tiny import bank, tokenizer, tokens

Models = Callable[[str], PreTrainedModel]
CADENCE, NEW = 8, 20
PROMPT = tokens(20, seed=3)[0].tolist()
READ = tokens(64, seed=2)[0].tolist()


class Gate(LexicalEmbedder):
    """The lexical embedder, which lets questions that are asked in other threads than `thread` wait until `open`."""

    def __init__(self) -> None:
        super().__init__()
        self.thread, self.open, self.waiting = threading.get_ident(), threading.Event(), 0
        self.refuses = False
        self.open.set()

    def embed_queries(self, texts: list[str]) -> NDArray[np.float32]:
        """Embed the texts once the gate is open; where it refuses, return no vectors."""
        if threading.get_ident() != self.thread:
            self.waiting += 1
            self.open.wait()
            self.waiting -= 1
            if self.refuses:
                return np.full((len(texts), self.dimension), np.nan, np.float32)
        return self.embed(texts)


@contextmanager
def reader(net: PreTrainedModel, client: kvbank.Client, **options: Any) -> Iterator[MemoryModel]:
    """Let a model read into a bank of its own, and then ask it ahead as the options say."""
    made = {"chunk": CADENCE, "window": 64, "top_k": 3, "context": "window", "min_share": None}
    with MemoryModel(net, tokenizer(), memory=client, bank=bank(), **(made | options)) as model:
        model.read(READ)
        yield model


def written(model: MemoryModel, streamer: Any = None) -> tuple[list[int], Trace]:
    """Return the tokens that the model writes behind the prompt, and why."""
    cache = model.cache()
    with model.trace(cache) as recorder:
        asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "streamer": streamer}
        text = model.generate(PROMPT, cache=cache, **asked)
    assert isinstance(text, str)
    return model.ids(text), recorder.trace()


class Tokens:
    """A streamer that counts the tokens that were written."""

    count = -1  # the first call hands over the prompt

    def put(self, value: object) -> None:
        """Count a token that was written."""
        self.count += 1

    def end(self) -> None:
        """Do nothing at the end."""


@pytest.mark.parametrize("ahead", [0, 3])
def test_the_query_is_the_last_tokens_of_so_many_tokens_ago(client: kvbank.Client, model: Models, ahead: int) -> None:
    with reader(model("llama_gqa"), client, ahead=ahead) as own:
        made, trace = written(own)
        answers = [step for step in trace.steps if step.kind == "answer"]
        asked = {step.begin: step for step in answers[1:]}  # the first one goes on with what the prompt has found
        assert len(asked) == NEW // CADENCE
        for number, step in enumerate(asked.values(), 1):
            known = [*PROMPT, *made][: len(PROMPT) + CADENCE * number + 1 - ahead]
            assert list(step.query_ids) == known[-CADENCE:]
            [found] = own.memory.recall([known[-CADENCE:]]) or []
            assert [trace.chunks[at.chunk].chunk_id for at in step.chunks] == [chunk.chunk_id for chunk in found]


def test_the_model_goes_on_while_the_service_does_not_answer(client: kvbank.Client, model: Models) -> None:
    """Hold the answer to the first question back: tokens are written until it is due, and the text stays the same."""
    gate, shown, results = Gate(), Tokens(), []
    with reader(model("llama_gqa"), client, ahead=3, embedder=gate) as own:
        quick, _ = written(own)

        def write() -> None:
            gate.thread = threading.get_ident()
            results.append(written(own, shown)[0])

        gate.open.clear()
        thread = threading.Thread(target=write)
        thread.start()
        try:
            wait_until(lambda: shown.count == CADENCE + 1)
            assert gate.waiting == 1
        finally:
            gate.open.set()
            thread.join()
    assert results == [quick]


def test_what_leaves_the_window_meanwhile_is_not_found(client: kvbank.Client, model: Models) -> None:
    """Compare the chunks that the recalls for the 8th and the 16th token find, of which one more is stored meanwhile:
    those of the 4th and the 12th."""
    found = {}
    for ahead in (0, 5):
        with reader(model("llama_gqa"), client, ahead=ahead, window=16, top_k=20) as own:
            _, trace = written(own)
            recalls = [step for step in trace.steps if step.kind == "answer"][1:]
            found[ahead] = [len(step.chunks) for step in recalls]
    assert found[5] == [count - 1 for count in found[0]]


def test_what_goes_wrong_ahead_is_raised_where_the_recall_is_due(client: kvbank.Client, model: Models) -> None:
    gate, shown = Gate(), Tokens()
    with reader(model("llama_gqa"), client, ahead=3, embedder=gate) as own:
        gate.refuses = True
        with pytest.raises(InputError, match="finite"):
            written(own, shown)
        assert shown.count == CADENCE + 1


def test_a_recall_is_asked_for_within_its_cadence(client: kvbank.Client, model: Models) -> None:
    with (
        pytest.raises(InputError, match="ahead is 8, and has to be less than the cadence of 8 tokens"),
        reader(model("llama_gqa"), client, ahead=8),
    ):
        pass


class StallsAt(Tokens):
    """A streamer that lets a proxy hang when so many tokens were written, and calls to the service end soon then."""

    def __init__(self, proxy: StallingProxy, link: ServiceLink, count: int):
        self._proxy, self._link, self._at = proxy, link, count

    def put(self, value: object) -> None:
        super().put(value)
        if self.count == self._at:
            self._link.patience = 0.2
            self._proxy.stall()


def test_a_service_that_hangs_is_told_of_once_and_nothing_of_it_stays(tmp_path: Path, model: Models) -> None:
    """Let the service hang before the first recall of an answer is asked for ahead: the answer goes on to its end with
    what the prompt had recalled."""
    before = set(threading.enumerate())
    with LocalServer(tmp_path / "data", f"unix:{tmp_path / 'socket'}"):
        proxy = StallingProxy(str(tmp_path / "socket"))
        try:
            with (
                kvbank.connect(f"127.0.0.1:{proxy.port}") as client,
                reader(model("llama_gqa"), client, ahead=3, retry_after=600) as own,
                warnings.catch_warnings(record=True) as told,
            ):
                warnings.simplefilter("always")
                _, trace = written(own, StallsAt(proxy, own.memory.link, 3))
                proxy.go_on()
                failed = own.memory.stats.failed_recalls
            answers = [step for step in trace.steps if step.kind == "answer"]
            assert failed == NEW // CADENCE
            assert [step.answered for step in answers] == [True, *[False] * failed]
            assert len({tuple(at.chunk for at in step.chunks) for step in answers}) == 1
            assert [str(each.message).partition(":")[0] for each in told] == ["the memory service is away"]
        finally:
            proxy.close()
    del own
    gc.collect()
    wait_until(lambda: not [each for each in threading.enumerate() if "memory" in each.name and each not in before])


def test_rows_that_are_written_together_do_not_wait_for_the_recall_of_one(client: kvbank.Client, model: Models) -> None:
    """Hold back what one of three requests has asked for ahead: the others write to their end in joint forwards, and
    each writes what it writes alone."""
    gate, engine, there = Gate(), Engine(), threading.Barrier(3)
    with reader(model("llama_gqa"), client, ahead=3) as own:
        slow = own.with_bank(own.memory.bank, embedder=gate, ahead=3, chunk=CADENCE, top_k=3, context="window")

        def alone(number: int, turn: Turn | None = None, streamer: Any = None) -> str:
            ids = tokens(20, seed=number)[0].tolist()
            cache = own.cache(slow if number == 0 else own.memory)
            asked = {"do_sample": False, "max_new_tokens": NEW, "streamer": streamer}
            if turn is not None:
                asked |= {"step": turn.step, "progress": turn.progress}
            return str(own.generate(ids, cache=cache, **asked))

        made = [alone(number) for number in range(3)]
        shown = [Tokens() for _ in made]

        def work(number: int) -> Callable[[Turn], str]:
            def run(turn: Turn) -> str:
                there.wait()
                with turn.holding_model(0):
                    if number == 0:
                        gate.thread = threading.get_ident()
                    return alone(number, turn, shown[number])

            return run

        gate.open.clear()
        jobs = [engine.submit("caller", str(number), work(number)) for number in range(3)]
        try:
            assert [job.result.result(60) for job in jobs[1:]] == made[1:]
            wait_until(lambda: shown[0].count == CADENCE + 1)
            assert gate.waiting == 1
        finally:
            gate.open.set()
        assert jobs[0].result.result(60) == made[0]
