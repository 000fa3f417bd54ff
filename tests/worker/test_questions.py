"""What a memory is asked for: the end of a prompt, or a question of its own, however the prompt is fed."""

from collections.abc import Callable, Iterator

import pytest
from transformers import PreTrainedModel

import kvbank
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from tests.support.noting_embedder import NotingEmbedder
from tests.worker.tiny import bank, build, tokenizer, tokens

Models = Callable[[str], PreTrainedModel]
CHUNK = 8
GREEDY = {"do_sample": False, "max_new_tokens": 2}


@pytest.fixture
def embedder() -> NotingEmbedder:
    return NotingEmbedder()


@pytest.fixture(params=["with_input", "past"])
def model(client: kvbank.Client, embedder: NotingEmbedder, request: pytest.FixtureRequest) -> Iterator[MemoryModel]:
    with MemoryModel(
        build("llama_gqa"),
        tokenizer(),
        memory=client,
        bank=bank(),
        chunk=CHUNK,
        window=64,
        query=request.param,
        embedder=embedder,
    ) as model:
        yield model


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize("length", [3, 8, 9, 11, 16, 17, 27])
def test_the_end_of_a_prompt_is_its_query(model: MemoryModel, embedder: NotingEmbedder, length: int) -> None:
    """Recall last for the prompt's last tokens, in one forward with them, whatever the length leaves over."""
    prompt = tokens(length)[0].tolist()
    model.generate(prompt, **GREEDY)
    assert embedder.noted[-1] == words(prompt[-CHUNK:])
    if model.memory.query == "with_input":
        assert len(embedder.noted) == -(-length // CHUNK)


def test_a_question_of_its_own(model: MemoryModel, embedder: NotingEmbedder) -> None:
    prompt = tokens(29)[0].tolist()
    model.generate(prompt, question="w5 w6", **GREEDY)
    assert embedder.noted == 4 * ["w5 w6"]


def test_the_question_ends_with_its_prompt(model: MemoryModel, embedder: NotingEmbedder) -> None:
    """Answers are recalled for by their own last tokens."""
    text = model.generate(
        tokens(16)[0].tolist(), question="w5 w6", do_sample=False, min_new_tokens=12, max_new_tokens=12
    )
    seen = 9 if model.memory.query == "with_input" else 8
    assert embedder.noted == ["w5 w6", "w5 w6", " ".join(str(text).split()[seen - CHUNK : seen])]


def test_each_row_has_its_own(model: MemoryModel, embedder: NotingEmbedder) -> None:
    rows = [tokens(13)[0].tolist(), tokens(4, seed=2)[0].tolist()]
    model.generate(rows, **GREEDY)
    assert embedder.noted[-2:] == [words(rows[0][-CHUNK:]), words(rows[1])]
    model.generate(rows, question=["w5", "w6"], **GREEDY)
    assert embedder.noted[-2:] == ["w5", "w6"]
    with pytest.raises(InputError, match="there are 1 questions for 2 prompts"):
        model.generate(rows, question="w5", **GREEDY)
    with pytest.raises(InputError, match="the question is empty"):
        model.generate(rows, question=["w5", ""], **GREEDY)
