"""The command `kvbank eval icl` asks for labels that stand in demonstrations, in the context and in a memory."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbank
from model_worker.attachment.loading import load_model
from model_worker.errors import InputError
from model_worker.evaluate.facts import make_facts
from model_worker.evaluate.icl_examples import drawn, parted, read_task
from model_worker.evaluate.icl_run import ALL, NOTHING, RANDOM, VOTE, IclRun, Plan
from model_worker.evaluate.journal import Journal
from model_worker.model import MemoryModel
from tests.support import command
from tests.worker.tiny import bank

WORDS = "yes no more less now then here there so not only once".split()
# The label of a text follows from the name in it, which other texts have too.
EXAMPLES = [
    {"text": f"{fact.name} came to the door and said {word}", "label": ("positive", "negative")[at % 2]}
    for at, fact in enumerate(make_facts(0, 10))
    for word in WORDS
]


def write(folder: Path, examples: list[dict[str, str]], name: str = "doors") -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(own) + "\n" for own in examples), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def worker(client: kvbank.Client) -> Iterator[MemoryModel]:
    """Attach the shipped model, which copies what it recalls."""
    options: dict[str, Any] = {"strict": True, "patience": 120.0, "top_k": 1, "embedder": "lexical:idf"}
    with MemoryModel(*load_model(), memory=client, bank=bank(), **options) as model:
        yield model


def test_a_task_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, EXAMPLES)
    doors = read_task(path)
    packed = tmp_path / "doors.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_task(packed) == doors
    assert (doors.name, doors.labels, len(doors.examples)) == ("doors", ("negative", "positive"), 120)
    first = doors.examples[0]
    assert doors.asked(first) == f" Review: {EXAMPLES[0]['text']} Sentiment:"
    assert doors.told(first) == f"{doors.asked(first)} positive ."
    subj = read_task(write(tmp_path, [{"text": "a", "label": "objective"}, {"text": "b", "label": "subjective"}], "s"))
    assert subj.told(subj.examples[1]) == " Input: b Type: subjective ."


def test_a_line_ends_where_the_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    told = [{"text": "a\x85b", "label": "yes"}, {"text": "c\u2028d", "label": "no"}]
    path.write_bytes("\r\n\r\n".join(json.dumps(own, ensure_ascii=False) for own in told).encode())
    assert [own.text for own in read_task(path).examples] == ["a b", "c d"]


@pytest.mark.parametrize(
    "line", ["[]", "{", '{"text": "a"}', '{"text": "a", "label": 1}', '{"text": " ", "label": "a"}']
)
def test_a_line_without_an_example_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(f'{{"text": "a", "label": "b"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 2: no JSON object with a text and a label"):
        read_task(path)


def test_nothing_that_is_asked_for_stands_in_a_memory(tmp_path: Path) -> None:
    task = read_task(write(tmp_path, EXAMPLES))
    shown, others = parted(task, 40, 3)
    assert (shown, others) == parted(task, 40, 3) != parted(task, 40, 4)
    draw = drawn(others, items=15, shots=4, cached=18, chosen=2, of=40, seed=5)
    assert len({*shown, *draw.items, *draw.shots}) == 40 + 15 + 4
    assert all(len(set(own)) == 18 and max(own) < 40 for own in draw.cached)
    assert len({tuple(own) for own in draw.cached}) == 15  # anew for each item
    assert drawn(others, 15, 2, 18, 2, 40, 5).items == draw.items  # as many contexts, the same items
    with pytest.raises(InputError, match="80 examples are left beside the demonstrations; 81 are needed"):
        drawn(others, items=77, shots=4, cached=18, chosen=2, of=40, seed=5)


@pytest.mark.slow
def test_a_label_is_told_by_the_demonstration_that_is_found(worker: MemoryModel, tmp_path: Path) -> None:
    """Test that the memory decides, that the drawn one is smaller, and that a finished run feeds nothing again."""
    task = read_task(write(tmp_path, EXAMPLES))
    plan = Plan((0, 2, 40), cached=4, demonstrations=40, items=10, seeds=1, seed=0)

    def run() -> dict[str, Any]:
        return IclRun(worker, [task], plan, Journal(tmp_path / "run.jsonl", {}), lambda *_: None).report()

    found = run()
    right = {(row["shots"], row["way"]): row["label"]["right"] for row in found["rows"]}
    assert right[0, VOTE] == right[2, VOTE] == 10
    assert right[0, ALL] >= 9
    assert right[0, RANDOM] < right[0, ALL]
    assert right[0, "found of 4"] < right[0, ALL]
    assert right[0, NOTHING] < right[0, ALL]
    assert {shots for shots, _ in right} == {0, 2}
    assert found["left_out"] == [("doors", 40)]  # longer than the model was trained for
    gain = next(row for row in found["differences"] if (row["of"], row["less"]) == (ALL, NOTHING))
    assert gain["mean"] == pytest.approx((right[0, ALL] - right[0, NOTHING]) / 10)
    assert "icl-doors" not in [own.name for own in worker.client.list_banks()]
    again = run()
    assert again["rows"] == found["rows"]
    assert again["cost"] == found["cost"]


def test_what_cannot_be_told_apart_is_refused(worker: MemoryModel, tmp_path: Path) -> None:
    task = read_task(write(tmp_path, [{"text": "a b", "label": "yes sir"}, {"text": "c d", "label": "yes"}]))
    plan = Plan((0,), cached=1, demonstrations=1, items=2, seeds=1, seed=0)
    with pytest.raises(InputError, match="labels 'yes' and 'yes sir' begin with the same token"):
        IclRun(worker, [task], plan, Journal(None, {}), lambda *_: None).report()
    with pytest.raises(InputError, match="5 cached demonstrations cannot be drawn of 4"):
        Plan((0,), cached=5, demonstrations=4, items=2, seeds=1, seed=0)


@pytest.mark.parametrize(
    ("changes", "names", "said"),
    [
        ({}, "doors doors", "two tasks have the name doors"),
        ({"demonstrations": 1}, "doors", "2 hits cannot be had of 1 demonstrations"),
        ({"demonstrations": 110}, "doors", "doors has 120 examples; 110 demonstrations, and 12 items"),
        ({"shots": (60,)}, "doors", "no context fits into the 512 tokens"),
    ],
)
def test_a_plan_that_the_examples_do_not_allow(
    worker: MemoryModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    names: str,
    said: str,
) -> None:
    monkeypatch.setattr(worker.memory, "top_k", 2)
    tasks = [read_task(write(tmp_path, EXAMPLES, name)) for name in names.split()]
    given: dict[str, Any] = {"shots": (2,), "cached": 1, "demonstrations": 20, "items": 10, "seeds": 1, "seed": 0}
    with pytest.raises(InputError, match=said):
        IclRun(worker, tasks, Plan(**{**given, **changes}), Journal(None, {}), lambda *_: None).report()


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    path = write(tmp_path, EXAMPLES)
    options = ["--shots=0", "--cached=2", "--demonstrations=8", "--items=2", "--seeds=2", "--top-k=1"]
    ended = command.run(
        command.application(), "eval", "icl", "--examples", path, *options, "--json", "--plot", tmp_path / "icl.svg"
    )
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [row["way"] for row in found["rows"]] == [NOTHING, RANDOM, "found of 2", ALL, VOTE]
    assert {(row["task"], row["seeds"], row["label"]["asked"]) for row in found["rows"]} == {("doors", 2, 4)}
    assert "<svg" in (tmp_path / "icl.svg").read_text(encoding="utf-8")
    ended = command.run(command.application(), "eval", "icl")
    assert (ended.exit_code, "Missing option '--examples'" in ended.stderr) == (2, True)
