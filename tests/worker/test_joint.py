"""Several conversations write a token each in one forward, and each writes what it would write alone."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvbank
from model_worker.attachment.attachment import Attachment
from model_worker.model import MemoryModel
from model_worker.serve.engine import Engine, Turn
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.joint import forward, may_join, row_of
from model_worker.window.recalled import RecalledChunk
from model_worker.window.tova import TovaRule
from tests.support.diagonal import diagonal
from tests.support.waiting import wait_until
from tests.worker import zoo
from tests.worker.tiny import BACKENDS, FAMILIES, ListMemory, attached, bank, build, tokenizer, tokens, worst

Models = Callable[[str], PreTrainedModel]
STEPS = 6
# Rotated halves and neighbours, norms of keys, one projection for all three, sliding windows.
QUICK = ("llama_gqa", "qwen3", "gpt_neox", "mistral_sliding")
CASES = [
    *diagonal(QUICK, BACKENDS, ["per_layer", "memlong"]),
    *(pytest.param(family, "sdpa", "per_layer", marks=pytest.mark.slow) for family in FAMILIES if family not in QUICK),
]


def conversations(attachment: Attachment) -> list[tuple[MemoryCache, ListMemory]]:
    """Make caches that differ in length, memory, sinks and rules, of which most let chunks go while they write."""
    sliding = any(report.sliding_window for report in attachment.reports)
    rule = None if sliding else TovaRule(5)
    made = [
        {"window": 16, "sinks": 0},
        {"window": 8},
        {"window": 12, "sinks": 2},
        {"window": 8, "sinks": 0 if sliding else 2, "local": rule},
    ]
    memories = [ListMemory(4, recalls=number > 0) for number in range(len(made))]
    return [(MemoryCache(attachment, m, **options), m) for m, options in zip(memories, made, strict=True)]


def fed(net: PreTrainedModel, cache: MemoryCache, ids: Tensor) -> None:
    for part in ids.split(3, 1):
        net(part, past_key_values=cache)


@pytest.mark.parametrize(("family", "backend", "mode"), CASES)
def test_a_joint_step_is_the_steps_alone(model: Models, family: str, backend: str, mode: str) -> None:
    """Compare what is remembered and recalled meanwhile too, and where attention went in a conversation."""
    net = model(family)
    gates = {2: torch.linspace(0.2, 0.8, 4), 3: torch.full((4,), 0.6)} if mode == "memlong" else None
    layers = {"memory_layers": [1], "retrieval_layers": [2, 3]} if mode == "memlong" else {}
    with attached(net, backend, mode=mode, gates=gates, **layers) as attachment, torch.no_grad(), ExitStack() as stack:
        alone, together = conversations(attachment), conversations(attachment)
        traces = [stack.enter_context(own[1][0].trace(tokenizer(), every=2)) for own in (alone, together)]
        for number, pair in enumerate(zip(alone, together, strict=True)):
            for cache, _ in pair:
                fed(net, cache, tokens(5 + 4 * number, seed=number))
        for step in range(STEPS):
            ids = [tokens(1, seed=100 * step + number) for number in range(len(alone))]
            inputs = [{"input_ids": i, "past_key_values": c} for i, (c, _) in zip(ids, together, strict=True)]
            assert all(may_join(net, each) for each in inputs)
            joined = forward(net, [row_of(each) for each in inputs])
            for made, token, (cache, _) in zip(joined, ids, alone, strict=True):
                assert worst(made.logits, net(token, past_key_values=cache).logits) <= 1e-5
        for (one, first), (other, second) in list(zip(alone, together, strict=True))[1:]:
            assert one.retrieved_tokens == other.retrieved_tokens > 0
            assert captured_apart(first.rows[0], second.rows[0]) <= 1e-5
        made = [recorder.trace() for recorder in traces]
        masses = [[*trace.window, *(mass for chunk in trace.chunks for mass in chunk.mass)] for trace in made]
        assert len(masses[0]) > 4
        assert masses[0] == pytest.approx(masses[1], abs=1e-5)


def captured_apart(first: Sequence[Captured], second: Sequence[Captured]) -> float:
    """Return the largest difference between the keys and values of two lists of chunks."""
    assert [(c.start, c.token_ids) for c in first] == [(c.start, c.token_ids) for c in second]
    pairs = [(a.layers[n], b.layers[n]) for a, b in zip(first, second, strict=True) for n in a.layers]
    return max(max(worst(a.keys, b.keys), worst(a.values, b.values)) for a, b in pairs)


def test_what_needs_a_mask_goes_alone(model: Models) -> None:
    net = model("llama_gqa")
    with attached(net) as attachment, torch.no_grad():

        def joins(ids: Tensor, mask: Tensor | None, **options: object) -> bool:
            cache = MemoryCache(attachment, window=16)
            net(ids, attention_mask=mask, past_key_values=cache)
            return may_join(net, {"input_ids": ids[:, -1:], "past_key_values": cache, "use_cache": True, **options})

        one, padded = tokens(6), torch.tensor([[0, 0, 1, 1, 1, 1]])
        assert joins(one, None)
        assert joins(one, None, output_attentions=False)
        assert not joins(one, None, output_attentions=True)
        assert not joins(one, padded)
        assert not joins(tokens(6, rows=2), None)
        assert not may_join(net, {"input_ids": one[:, :1]})
    both = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    net = zoo.build("qwen2", use_sliding_window=True, max_window_layers=2, layer_types=both)
    with attached(net) as attachment, torch.no_grad():
        caches = [MemoryCache(attachment), MemoryCache(attachment, window=zoo.SLIDING)]
        for cache in caches:
            net(one, past_key_values=cache)
        asked = [may_join(net, {"input_ids": tokens(1), "past_key_values": cache}) for cache in caches]
        assert asked == [False, True]


# Damages of a window, each of which would fail a forward with it.
DAMAGES: dict[str, Callable[[Any], Any]] = {
    "keys that are too short": lambda layer: setattr(layer, "keys", layer.keys[..., :4]),
    "values that are too short": lambda layer: setattr(layer, "values", layer.values[..., :4]),
    "values of another type": lambda layer: setattr(layer, "values", layer.values.double()),
    "all of another type": lambda layer: (
        setattr(layer, "keys", layer.keys.double()) or setattr(layer, "values", layer.values.double())
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_row_that_fails_fails_alone(model: Models, damage: str) -> None:
    net = model("qwen2")
    with attached(net) as attachment, torch.no_grad():
        caches = [MemoryCache(attachment) for _ in range(3)]
        for number, cache in enumerate(caches):
            fed(net, cache, tokens(4 + number, seed=number))
        DAMAGES[damage](caches[1].layers[2])
        token = tokens(1)
        made = forward(net, [row_of({"input_ids": token, "past_key_values": cache}) for cache in caches])
        assert isinstance(made[1], Exception)
        again = MemoryCache(attachment)
        fed(net, again, tokens(6, seed=2))
        assert worst(made[2].logits, net(token, past_key_values=again).logits) <= 1e-5


# -- requests of an engine ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(client: kvbank.Client) -> Iterator[MemoryModel]:
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=bank(), chunk=8, window=24, top_k=2) as made:
        yield made


class Failing(ListMemory):
    """A memory that cannot be asked any more after some time."""

    def recall(self, rows: Sequence[Sequence[int]], without: object = None) -> list[list[RecalledChunk]] | None:
        if len(self.asked) > 3:
            raise ConnectionError("the memory has gone")
        return super().recall(rows, without)


@contextmanager
def rows_of(chat: MemoryModel) -> Iterator[list[int]]:
    """Yield a list to which the number of rows of each forward is added that goes through the model."""
    seen: list[int] = []

    def note(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(len(kwargs["input_ids"]))

    handle = chat.attachment.decoder.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def written(
    chat: MemoryModel, seed: int, turn: Turn | None = None, memory: ListMemory | None = None, **options: object
):
    """Go on with a text of its own; with a turn, where other requests write too."""
    ids = tokens(9 + 5 * seed, seed=seed)[0].tolist()
    cache = chat.cache(memory or ListMemory(8))
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False} | options
    if turn is None:
        torch.manual_seed(seed)
        return chat.generate(ids, cache=cache, **options)
    with turn.holding_model(seed):
        return chat.generate(ids, cache=cache, progress=turn.progress, step=turn.step, **options)


@pytest.mark.parametrize(
    "drawn",
    [
        pytest.param({}, marks=pytest.mark.slow, id="greedy"),
        pytest.param({"do_sample": True, "temperature": 0.8}, id="drawn"),
    ],
)
def test_requests_write_together_what_they_write_alone(chat: MemoryModel, drawn: dict[str, object]) -> None:
    alone = [written(chat, seed, **drawn) for seed in range(4)]
    engine, there = Engine(), threading.Barrier(4)

    def work(seed: int) -> Callable[[Turn], str]:
        def run(turn: Turn) -> str:
            there.wait()
            return written(chat, seed, turn, **drawn)

        return run

    with rows_of(chat) as rows:
        jobs = [engine.submit("caller", str(seed), work(seed)) for seed in range(4)]
        assert [job.result.result(60) for job in jobs] == alone
    assert rows.count(4) >= 7


def test_the_rows_of_one_forward_are_bounded(chat: MemoryModel) -> None:
    engine, there = Engine(most_together=2), threading.Barrier(5)

    def work(turn: Turn) -> str:
        there.wait()
        return written(chat, 1, turn)

    with rows_of(chat) as rows:
        jobs = [engine.submit("caller", str(number), work) for number in range(5)]
        assert len({job.result.result(60) for job in jobs}) == 1
    assert max(rows) == 2


def test_a_request_that_fails_and_one_whose_caller_leaves_end_alone(chat: MemoryModel) -> None:
    alone = [written(chat, seed) for seed in range(2)]
    engine, there = Engine(), threading.Barrier(4)

    def work(seed: int, memory: ListMemory | None = None, **options: object) -> Callable[[Turn], str]:
        def run(turn: Turn) -> str:
            there.wait()
            ends = [lambda ids, scores: torch.full((1,), turn.left)]
            return written(chat, seed, turn, memory, stopping_criteria=ends, **options)

        return run

    failing = engine.submit("caller", "fails", work(2, Failing(8), max_new_tokens=200))
    leaving = engine.submit("caller", "leaves", work(3, max_new_tokens=10_000))
    lasting = [engine.submit("caller", str(seed), work(seed)) for seed in range(2)]
    with pytest.raises(ConnectionError, match="the memory has gone"):
        failing.result.result(60)
    assert [job.result.result(60) for job in lasting] == alone
    engine.forget(leaving)
    assert len(leaving.result.result(60).split()) < 10_000


def test_who_reads_a_prompt_has_its_share_beside_requests_that_write_together(chat: MemoryModel) -> None:
    """Six sessions of one caller write in each forward; another caller's pieces come about as often as forwards do."""
    engine, there, over = Engine(), threading.Barrier(7), threading.Event()
    pieces = list[int]()

    def write(turn: Turn) -> str:
        there.wait()
        ends = [lambda ids, scores: torch.full((1,), over.is_set())]
        return written(chat, 1, turn, max_new_tokens=5000, stopping_criteria=ends)

    def read(turn: Turn) -> None:
        there.wait()
        wait_until(lambda: 6 in rows, "six sessions have written together")
        with turn.holding_model():
            while len(pieces) < 40:
                turn.progress(0, 1)
                pieces.append(len(rows))
        over.set()

    with rows_of(chat) as rows:
        jobs = [engine.submit("big", str(number), write) for number in range(6)] + [engine.submit("small", "a", read)]
        for job in jobs:
            job.result.result(60)
    steps = pieces[-1] - pieces[16]
    assert 12 <= steps <= 40  # 23 pieces
    assert rows.count(6) > 10
