"""`kvbank eval ruler` asks for what stands in its texts and nowhere else, and counts what the answers hold."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbank
from model_worker.attachment.loading import load_model
from model_worker.errors import InputError
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.ruler.counted import COMMON_TIMES, RARE_TIMES
from model_worker.evaluate.ruler.hidden import KEYS
from model_worker.evaluate.ruler.prompt import Prompt, Source
from model_worker.evaluate.ruler.run import Plan, RulerRun
from model_worker.evaluate.ruler.tasks import TASKS, prompt_of
from model_worker.model import MemoryModel
from model_worker.text_files import reference_text
from tests.support import command
from tests.worker.tiny import bank

FILLER = reference_text()[:60_000]
HIDDEN = [name for name in TASKS if not name.endswith("words")]
TOKENS = 4096


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model()


@pytest.fixture(scope="module")
def source(loaded: Any) -> Source:
    return Source(loaded[1], FILLER)


@pytest.fixture(scope="module")
def worker(client: kvbank.Client, loaded: Any) -> Iterator[MemoryModel]:
    with MemoryModel(*loaded, memory=client, bank=bank(), strict=True, patience=120.0) as model:
        yield model


def parts(source: Source, prompt: Prompt) -> tuple[str, str, int]:
    """Return text and question as strings, and the tokens of all, answer included."""
    text = str(source.tokenizer.decode(prompt.text))
    return text, prompt.question, len(prompt.text) + len(source.asked(prompt.question)) + prompt.budget


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_prompt_is_of_its_seed_and_length_and_tells_nothing_early(source: Source, task: str, seed: int) -> None:
    """Test that the length is hit, the same seed gives the same prompt, and no expected string stands elsewhere."""
    first, again, other = (prompt_of(source, task, TOKENS, seed, index) for index in (0, 0, 1))
    assert first == again
    assert (first.text, first.expected) != (other.text, other.expected)
    assert first.expected != prompt_of(source, task, TOKENS, seed + 1, 0).expected
    text, question, tokens = parts(source, first)
    assert tokens == TOKENS if task in HIDDEN else TOKENS - 64 < tokens <= TOKENS
    assert len(set(first.expected)) == len(first.expected)
    for each in first.expected:
        assert each.lower() not in question.lower()
        assert each.lower() not in FILLER.lower()
        assert not any(each in whole for whole in first.expected if whole != each)
    assert first.score(text) == 1
    assert first.score(text.upper()) == 1
    assert first.score("nothing of it") == 0
    assert first.score(f"It is {first.expected[0]}.") == pytest.approx(1 / len(first.expected))


@pytest.mark.parametrize(("task", "names", "asked"), [("single", 1, 1), ("multi-key", KEYS, 1), ("multi-query", 4, 4)])
def test_numbers_stand_in_lines_of_their_own(source: Source, task: str, names: int, asked: int) -> None:
    made = prompt_of(source, task, TOKENS, 3, 0)
    text, question, _ = parts(source, made)
    lines = re.findall(r"\nThe number of (\w+ \w+) is (\d{5})\.\n", text)
    assert len(lines) == names
    told = {name: number for name, number in lines if name in question}
    assert sorted(told.values()) == sorted(made.expected)
    assert len(told) == asked
    assert all(text.count(number) == 1 for number in made.expected)


def test_several_numbers_of_one_name(source: Source) -> None:
    made = prompt_of(source, "multi-value", TOKENS, 3, 0)
    text, question, _ = parts(source, made)
    lines = re.findall(r"\nOne of the numbers of (\w+ \w+) is (\d{5})\.\n", text)
    assert [number for _, number in lines] == list(made.expected)
    assert len(lines) == KEYS
    assert {name for name, _ in lines} == {re.findall(r"of (\w+ \w+) are", question)[0]}


def test_variables_are_a_chain(source: Source) -> None:
    """Test that each variable is set once, behind the one whose value it takes, and that only the first has a value."""
    made = prompt_of(source, "variables", TOKENS, 3, 0)
    text, question, _ = parts(source, made)
    chain = re.findall(r"\nVAR ([A-Z]{5}) = (?:VAR )?(\w{5})\n", text)
    value = re.findall(r"\d{5}", question)[0]
    assert [name for name, _ in chain] == list(made.expected)
    assert [of for _, of in chain] == [value, *made.expected[:-1]]
    assert text.count(value) == 1


def test_lines_stand_behind_sentences_all_over_the_text(source: Source) -> None:
    depths = []
    for index in range(40):
        text, *_ = parts(source, prompt_of(source, "single", 2048, 0, index))
        at = text.index("\nThe number of ")
        assert text[:at].rstrip(" ")[-1] in ".!?\n:;"
        depths.append(at / len(text))
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_common_words_are_the_most_frequent_ones(source: Source) -> None:
    made = prompt_of(source, "common-words", TOKENS, 3, 0)
    listed = re.findall(r"\n(\d+)\. (\w+)", parts(source, made)[0])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    numbers = Counter(word for _, word in listed)
    assert {word for word, times in numbers.items() if times == COMMON_TIMES} == set(made.expected)
    assert {times for word, times in numbers.items() if word not in made.expected} == {RARE_TIMES}


def test_frequent_words_follow_the_dots(source: Source) -> None:
    made = prompt_of(source, "frequent-words", TOKENS, 3, 0)
    words = Counter(parts(source, made)[0].partition("\n")[2].split())
    ranked = words.most_common(5)
    assert [word for word, _ in ranked[:4]] == ["...", *made.expected]
    assert len({times for _, times in ranked}) == 5


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_that_is_too_short_is_refused(source: Source, task: str) -> None:
    with pytest.raises(InputError, match="90 tokens are too few"):
        prompt_of(source, task, 90, 0, 0)


def test_what_is_not_there_is_refused(source: Source, worker: MemoryModel) -> None:
    with pytest.raises(InputError, match="there is no task 'sing'; there are single"):
        prompt_of(source, "sing", TOKENS, 0, 0)
    with pytest.raises(InputError, match="tokens of filler are too few"):
        Source(source.tokenizer, "It rained.")
    known: dict[str, Any] = {"tokens": (900,), "tasks": ("single",), "ways": ("memory",), "prompts": 1, "seed": 0}
    for wrong, said in (
        ({"ways": ("walking",)}, "there is no way 'walking'"),
        ({"tasks": ("single", "single")}, "'single' is given twice"),
    ):
        with pytest.raises(InputError, match=said):
            Plan(**{**known, "local": 0, "stream": False, **wrong})
    plan = Plan(**known, local=250, stream=False)
    with pytest.raises(InputError, match="250 local tokens do not fit into the window"):
        RulerRun(worker, FILLER, plan, Journal(None, {}), lambda *_: None)


def test_what_is_recalled_is_told(worker: MemoryModel) -> None:
    """Test that numbers are told by recall, not by the question alone, and plainly where the model can read so far."""
    plan = Plan((400, 600), ("single",), ("plain", "re-reading", "memory", "nothing"), 1, 0, False, 0)
    found = RulerRun(worker, FILLER, plan, Journal(None, {}), lambda *_: None).report()
    told = {(row["tokens"], row["way"]): row for row in found["rows"]}
    assert all(row["asked"] == 1 for row in told.values())
    for tokens in plan.tokens:
        assert told[tokens, "found"]["share"] == told[tokens, "memory"]["share"] == 1
        assert told[tokens, "nothing"]["share"] == 0
        assert told[tokens, "re-reading"]["share"] > 0
    assert (400, "plain") in told
    assert (600, "plain") not in told  # more than the 512 tokens that the model was trained for
    assert "ruler" not in [own.name for own in worker.client.list_banks()]
    assert found["cost"]["stored"] > 0


@pytest.mark.slow
def test_the_command_goes_on_from_its_log(tmp_path: Path) -> None:
    """Test the whole way: a line for each prompt, the figure, and a run of more prompts that answers only those."""
    log = tmp_path / "run.jsonl"
    called = ("eval", "ruler", "--tokens=400", "--way=memory", "--log", log, "--json")
    ended = command.run(
        command.application(), *called, "--task=variables", "--prompts=1", "--plot", tmp_path / "ruler.svg"
    )
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [(row["task"], row["way"]) for row in found["rows"]] == [("variables", "memory"), ("variables", "found")]
    assert "<svg" in (tmp_path / "ruler.svg").read_text(encoding="utf-8")
    first = log.read_text(encoding="utf-8")
    more = json.loads(
        command.run(command.application(), *called, "--task=single", "--task=variables", "--prompts=1").stdout
    )
    assert log.read_text(encoding="utf-8").startswith(first)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["key"] for line in lines] == ["variables, 400 tokens, prompt 1", "single, 400 tokens, prompt 1"]
    assert set(lines[0]["part"]) == {"expected", "answers", "told", "cost"}
    assert [row for row in more["rows"] if row["task"] == "variables"] == found["rows"]
    assert more["cost"]["tokens"] > found["cost"]["tokens"]
