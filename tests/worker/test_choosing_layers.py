"""The smallest set of layers that keeps the recall of all is found, counted on facts that had no part in finding it."""

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.attachment.loading import load_model
from model_worker.errors import InputError
from model_worker.evaluate.choosing_layers import ChoicePlan, LayersChosen, choose_layers
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.layer_search import eliminate
from model_worker.evaluate.planted import WORDINGS, Planting, plant
from model_worker.evaluate.recall_by_layers import RecallByLayers, with_layers
from model_worker.model import MemoryModel
from model_worker.text_files import reference_text
from model_worker.user_text import encode_text

TEXT = reference_text()[:60_000]
MADE_FOR = 2  # the memory layer of kvbank-small


@pytest.fixture(scope="module")
def small() -> Iterator[Attachment]:
    """Yield the shipped model with memory in each of its five layers."""
    attachment = attach(*load_model("kvbank-small"), mode="per_layer")
    yield attachment
    attachment.detach()


# -- the search -------------------------------------------------------------------------------------------------------


def test_sets_that_work_only_together_are_found() -> None:
    """Layers 3, 7 and 11 do something together only, so that no layer alone, nor a pair, says which they are."""
    tried: list[tuple[int, ...]] = []

    def score(layers: tuple[int, ...]) -> float:
        tried.append(layers)
        noise = random.Random(str(layers)).random()
        return 100.0 * ({3, 7, 11} <= set(layers)) + noise

    found = list(eliminate(range(16), score))
    assert [len(own.layers) for own in found] == list(range(16, 0, -1))
    assert found[13].layers == (3, 7, 11)
    assert all(own.score == score(own.layers) for own in found)
    assert all(set(small.layers) < set(large.layers) for large, small in pairwise(found))


def test_layers_that_do_harm_go_first_and_few_sets_are_tried() -> None:
    worth = dict(enumerate([5.0, -3.0, 2.0, 1.0, -0.5, 4.0] * 5))
    tried: list[tuple[int, ...]] = []

    def score(layers: tuple[int, ...]) -> float:
        tried.append(layers)
        return sum(worth[layer] for layer in layers)

    found = list(eliminate(worth, score))
    gone = [set(large.layers) - set(few.layers) for large, few in pairwise(found)]
    assert [worth[layer] for own in gone for layer in own] == sorted(worth.values())[:-1]
    assert len(tried) == len(set(tried)) < 3 * len(worth)


# -- the facts --------------------------------------------------------------------------------------------------------


def test_planted_facts_stand_in_their_chunks_and_are_the_same_for_a_seed(small: Attachment) -> None:
    tokenizer: Any = small.tokenizer
    ids, plan = encode_text(tokenizer, TEXT), Planting(chunk=48, local=8)
    facts = plant(tokenizer, ids, plan, 16, seed=3)
    assert facts == plant(tokenizer, ids, plan, 16, seed=3)
    assert not {tuple(fact.chunk) for fact in facts} & {tuple(f.chunk) for f in plant(tokenizer, ids, plan, 16, seed=4)}
    assert {(fact.wording, len(fact.local)) for fact in facts} == {(name, n) for name in WORDINGS for n in (0, 8)}
    for fact in facts:
        assert len(fact.chunk) == 48
        said = tokenizer.decode(fact.question).split("Answer: ")[-1] + tokenizer.decode(fact.answer)
        assert said.removeprefix("The ") in tokenizer.decode(fact.chunk)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Planting(48, wordings=("number", "color")), "no wording 'color'; there are number, code"),
        (lambda: Planting(48, wordings=()), "name a wording"),
        (lambda: plant(load_model("kvbank-small")[1], [7] * 90, Planting(8), 1, 0), "no room for a statement of"),
        (lambda: plant(load_model("kvbank-small")[1], [7] * 20, Planting(64), 1, 0), "too few for a piece of"),
    ],
)
def test_what_cannot_be_planted_is_refused(made: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        made()


# -- recall -----------------------------------------------------------------------------------------------------------


def facts_of(small: Attachment, context: str, count: int = 8, chunk: int = 48) -> RecallByLayers:
    ids = encode_text(small.tokenizer, TEXT)
    facts = plant(small.tokenizer, ids, Planting(chunk, 16, ("number",)), count, seed=1)
    return RecallByLayers(small, facts, ids, context=context, hits=2)


@pytest.mark.parametrize("context", ["isolated", pytest.param("window", marks=pytest.mark.slow)])
def test_only_layers_that_were_given_their_memory_recall(small: Attachment, context: str) -> None:
    asked, plan = facts_of(small, context), small.plan
    every, own, others, none = (asked.told(layers) for layers in (range(5), [MADE_FOR], [0, 1], []))
    assert small.plan == plan
    assert every.right.sum() >= 6
    assert own.right.sum() >= 6
    assert not others.right.any()
    assert not none.right.any()
    assert float(none.nats.min()) > float(every.nats[every.right].max())
    assert torch.equal(asked.told([MADE_FOR]).nats, own.nats)  # a set leaves nothing behind for the next


def test_what_is_told_is_what_the_model_writes(small: Attachment, tmp_path: Path) -> None:
    """Recall that is measured without a bank is that of a `MemoryModel` which reads a chunk and is asked."""
    ids = encode_text(small.tokenizer, TEXT)
    facts = plant(small.tokenizer, ids, Planting(48, 0, ("number", "room")), 6, seed=2)
    told = RecallByLayers(small, facts, ids, context="isolated", hits=1).told([0, 1, MADE_FOR]).right.tolist()
    model, tokenizer = load_model("kvbank-small")
    layers = {"mode": "per_layer", "memory_layers": [0, 1, MADE_FOR]}
    written = []
    for index, fact in enumerate(facts):
        bank = {"memory": tmp_path, "bank": f"fact-{index}", "chunk": 48, "context": "isolated", "recent": 0}
        with MemoryModel(model, tokenizer, **bank, attach_options=layers) as reader:
            reader.read(fact.chunk)
            text = reader.generate(fact.question, max_new_tokens=len(fact.answer) + 1, do_sample=False)
        answer = tokenizer.decode(fact.answer)
        written.append(text.startswith(answer) and not text[len(answer) :][:1].isalnum())
    assert told == written
    assert any(told)


# -- the choice -------------------------------------------------------------------------------------------------------


def chosen(small: Attachment, path: Path | None = None, **changes: Any) -> LayersChosen:
    plan = {"planting": Planting(48, 16, ("number",)), "context": "isolated", "hits": 2, "facts": 8, "fresh": 12}
    journal = Journal(path, {"test": 1})
    return choose_layers(small, TEXT, ChoicePlan(**{**plan, **changes}), journal=journal)


@pytest.mark.slow
def test_the_layer_that_the_model_was_made_with_is_enough(small: Attachment) -> None:
    found = chosen(small)
    assert MADE_FOR in found.chosen.layers
    assert len(found.chosen.layers) <= 2
    assert found.every.stored * len(found.chosen.layers) == found.chosen.stored * 5
    assert found.every.stored == 5 * 2 * small.kv_heads * small.head_dim * 4
    assert found.chosen.kept.mean >= 0.95
    assert found.frontier[0].layers == (0, 1, 2, 3, 4)
    assert not found.spent


@pytest.mark.slow
def test_a_choice_goes_on_from_its_journal(small: Attachment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    first = chosen(small, path).document()
    lines = path.read_text().splitlines(keepends=True)
    assert {json.loads(line)["key"].split()[0] for line in lines} == {"search", "choice", "confirmation", "cost"}
    monkeypatch.setattr("model_worker.evaluate.recall_by_layers.RecallByLayers.told", None)
    assert chosen(small, path).document() == first  # nothing was asked again
    monkeypatch.undo()
    path.write_text("".join(lines[:4]))
    again = chosen(small, path).document()
    assert again["cost"]["tokens"] > 8 * 48
    assert {**again, "cost": 0} == {**first, "cost": 0}
    assert parts(path.read_text().splitlines()) == parts(lines)


def parts(lines: list[str]) -> list[Any]:
    """Return the finished parts of a journal, without what they cost."""
    return [found for found in map(json.loads, lines) if found["key"] != "cost"]


def test_the_search_ends_by_its_time_with_what_it_has(small: Attachment) -> None:
    found = chosen(small, minutes=0)
    assert found.spent
    assert list(found.nats) == [(0, 1, 2, 3, 4)]
    assert found.chosen.layers == (0, 1, 2, 3, 4)


def test_a_model_that_recalls_nothing_is_refused(small: Attachment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "plan", with_layers(small.plan, (0, 1)))
    with pytest.raises(InputError, match="tells 0 of 4 facts: there is no recall"):
        chosen(small, facts=4)
