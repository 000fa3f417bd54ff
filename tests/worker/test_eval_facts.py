"""The command `kvbank eval facts` counts what a model tells, and asks every way with the same hits."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvbank
from model_worker.attachment.loading import load_model
from model_worker.errors import InputError
from model_worker.evaluate.asking import MEMORY, NOTHING, REREAD, Asker
from model_worker.evaluate.facts_run import FactsRun, Plan
from model_worker.evaluate.greedy import answer, copied, read_plain
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.planting import plant
from model_worker.evaluate.resident import resident_bytes
from model_worker.evaluate.under_pressure import measure_pressure
from model_worker.evaluate.wordings import WORDINGS, WordedFact, worded_facts, wordings_named
from model_worker.model import MemoryModel
from model_worker.text_files import reference_text
from tests.support import command
from tests.worker.tiny import bank, build, tokens

# The whole reference takes a second to encode.
TEXT = reference_text()[:60_000]


@pytest.fixture(scope="module")
def worker(client: kvbank.Client) -> Iterator[MemoryModel]:
    """Attach the shipped model, which can tell a number that it recalls in an empty window."""
    loaded = load_model()
    with MemoryModel(*loaded, memory=client, bank=bank(), strict=True, patience=120.0) as model:
        yield model


def test_facts_are_drawn_and_judged() -> None:
    facts = worded_facts(0, ["number", "city"], 3)
    assert facts == worded_facts(0, ["number", "city"], 3)
    assert facts != worded_facts(1, ["number", "city"], 3)
    assert [own.wording for own in facts] == ["number", "city"] * 3
    assert len({own.name for own in facts}) == 6
    for own in facts:
        assert own.statement == f"{own.beginning} {own.answer}."
        assert own.answered(f" {own.answer}.", "complete")
        assert own.answered(f"It is {own.answer.upper()}!", "chat")
        assert not own.answered(f"It is {own.answer}", "complete")
        assert not own.answered(f" {own.answer}7", "complete")
    with pytest.raises(InputError, match="no wording 'numbr'"):
        worded_facts(0, ["numbr"], 1)
    assert {"number", "colour", "city"} <= WORDINGS.keys()


def test_every_wording_is_asked_for_in_every_form() -> None:
    """Test that a form leads up to the answer, that groups part the wordings, and that 16 of 20 may be trained."""
    trained, held_out = wordings_named(["trained"]), wordings_named(["held-out"])
    assert (len(trained), len(held_out)) == (16, 4)
    assert sorted(trained + held_out) == sorted(WORDINGS)
    assert wordings_named(["number", "held-out"]) == ("number", *held_out)
    for own in worded_facts(2, tuple(WORDINGS), 1):
        assert own.asked("complete") == own.beginning
        assert own.asked("chat") == own.question
        assert own.asked("question").startswith(f"{own.question} ")
        assert own.answered(f" {own.answer}.", "question")
        assert not own.answered(f" It is {own.answer}.", "question")
        assert own.answer not in own.asked("complete") + own.asked("question") + own.asked("chat")


def test_facts_stand_where_the_plan_says(worker: MemoryModel) -> None:
    facts = worded_facts(0, ["number", "colour"], 5)
    made = plant(worker.tokenizer, TEXT[:3000], facts, tokens=4000, within=2000, local=50, seed=3)
    assert (len(made.ids), len(made.filler)) == (4000, 50)
    assert sorted(own.fact.name for own in made.facts) == sorted(own.name for own in facts)
    text = worker.tokenizer.decode(made.ids)
    for own in made.facts:
        assert f"\n{own.fact.statement}\n" in text
        assert own.answer < 2000
        before = worker.tokenizer.decode(made.ids[: own.answer + 1])
        assert before.endswith(f"{own.fact.beginning} {own.fact.answer}")
    places = [own.answer for own in made.facts]
    assert places == sorted(places)
    assert places[-1] > 1500
    with pytest.raises(InputError, match="10 facts do not fit into the first 400 tokens"):
        plant(worker.tokenizer, TEXT, facts, tokens=4000, within=400, local=0, seed=0)
    with pytest.raises(InputError, match="too few"):
        plant(worker.tokenizer, "It rained.", facts, tokens=4000, within=2000, local=0, seed=0)


def test_every_way_has_the_same_hits(worker: MemoryModel) -> None:
    """Test that the number is told by recall and by re-reading, not without, and not where the bank has no chunk."""
    facts = worded_facts(5, ["number"], 3)
    made = plant(worker.tokenizer, TEXT, facts, tokens=900, within=700, local=200, seed=0)
    memory = worker.with_bank(bank(), count=False, top_k=1)
    worker.read(made.ids, memory=memory)
    asker = Asker(worker, memory, [], len(made.ids))
    asked = [asker.ask(own.fact, own.answer, "complete") for own in made.facts]
    assert all(own.found for own in asked)
    assert sum(bool(own.right[MEMORY]) for own in asked) == 3
    assert sum(bool(own.right[REREAD]) for own in asked) >= 2
    assert not any(own.right[NOTHING] for own in asked)
    empty = worker.with_bank(bank(), count=False)
    lost = Asker(worker, empty, [], 0).ask(made.facts[0].fact, made.facts[0].answer, "complete")
    assert (lost.found, lost.right) == (False, {MEMORY: False, REREAD: False, NOTHING: False})
    before = worker.client.get_bank(str(memory.bank)).usage.chunks
    behind = Asker(worker, memory, made.filler[:190], len(made.ids))
    assert behind.ask(made.facts[0].fact, made.facts[0].answer, "complete").found
    assert worker.client.get_bank(str(memory.bank)).usage.chunks == before  # asking writes nothing


@pytest.mark.slow
def test_what_is_asked_for_stays_under_pressure(worker: MemoryModel) -> None:
    made = plant(worker.tokenizer, TEXT, worded_facts(7, ["number"], 6), tokens=1800, within=1000, local=0, seed=0)
    name = bank()
    worker.read(made.ids, memory=worker.with_bank(name, count=False))
    seen: list[int] = []
    found = measure_pressure(worker, made, name, kvbank.Capacity(tokens=800), lambda done, total: seen.append(done))
    asked, never = found["facts"]
    assert (asked["group"], asked["stays"]["right"], asked["stays"]["asked"]) == ("asked for", 3, 3)
    assert asked["recalled"]["right"] >= 2
    assert never["stays"]["right"] < 3
    assert found["evicted"] > 0
    assert found["written"] == worker.client.get_bank(name).usage.chunks == seen[-1]
    assert "facts-under-pressure" not in [own.name for own in worker.client.list_banks()]


def test_greedy_answers_are_those_of_generate() -> None:
    net, ids = build("llama_gqa"), tokens(20)[0].tolist()
    expected = net.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, 20:].tolist()
    assert answer(net, DynamicCache(), ids, 6, 0) == expected
    assert answer(net, DynamicCache(), ids, 6, 7) == expected
    begun = read_plain(net, ids[:12])
    assert answer(net, copied(begun), ids[12:], 6, 0) == expected
    assert answer(net, copied(begun), ids[12:], 6, 0) == expected  # the copy was written to, and not the cache
    net.generation_config.eos_token_id = expected[1]
    try:
        assert answer(net, DynamicCache(), ids, 6, 0) == expected[: expected.index(expected[1]) + 1]
    finally:
        net.generation_config.eos_token_id = None


def test_a_process_knows_its_memory() -> None:
    before = resident_bytes()
    if before is None:
        pytest.skip("this system does not tell the memory of a process")
    held = bytearray(random.Random(0).randbytes(1 << 16) * (1 << 10))  # 64 MiB
    after = resident_bytes()
    assert after is not None
    assert after - before > len(held) // 2


def test_a_text_is_read_once_for_the_same_settings(worker: MemoryModel) -> None:
    """Test that a second run asks without reading, and that one of other settings, or an interrupted one, reads."""
    plan = Plan((600,), 1, ("number",), ("complete",), ("0",), False, 0, 0)

    def stop(stage: str, done: int, total: int) -> None:
        if done > 300:
            raise KeyboardInterrupt

    def run(progress: Any = lambda *_: None, chunk: int = 0) -> dict[str, Any]:
        return FactsRun(worker, TEXT, plan, Journal(None, {}), progress, {"chunk": chunk}).report()

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    first, again, other = run(), run(), run(chunk=1)
    assert first["answers"] == again["answers"] == other["answers"]
    assert first["cost"]["tokens"] > 600 > again["cost"]["tokens"]
    assert first["cost"]["stored"] == again["cost"]["stored"]  # nothing of the interrupted run is left
    assert other["cost"]["tokens"] == first["cost"]["tokens"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"local": ("0", "5000")}, "5000 local tokens do not fit before a question: at most"),
        ({"capacity": 100}, "a capacity of 100 tokens has no room for two chunks of 64"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_text_is_read(
    worker: MemoryModel, wrong: dict[str, Any], said: str
) -> None:
    plan: dict[str, Any] = {"local": ("0",), "capacity": 0, **wrong}
    with pytest.raises(InputError, match=said):
        FactsRun(
            worker,
            TEXT,
            Plan((900,), 1, ("number",), ("complete",), stream=False, seed=0, **plan),
            Journal(None, {}),
            lambda *_: None,
        )


def test_a_chat_needs_a_template(worker: MemoryModel) -> None:
    plan = Plan((900,), 1, ("number",), ("chat",), ("0",), False, 0, 0)
    with pytest.raises(InputError, match="no chat template"):
        FactsRun(worker, TEXT, plan, Journal(None, {}), lambda *_: None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ask": ("sing",)}, "ask 'sing' is not one of"),
        ({"local": ("ful",)}, "local 'ful' is neither"),
        ({"local": ("0", "full", "0")}, "local '0' is given twice"),
    ],
)
def test_plans_that_make_no_sense(wrong: dict[str, Any], said: str) -> None:
    plan: dict[str, Any] = {"tokens": (4096,), "facts": 1, "wording": ("number",), "ask": ("complete",)}
    with pytest.raises(InputError, match=said):
        Plan(**{**plan, "local": ("0",), "stream": False, "capacity": 0, "seed": 0, **wrong})


@pytest.mark.slow
def test_the_command(tmp_path: Any) -> None:
    """Test the whole way: counts by place and wording, the figure, and a second run that asks nothing again."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = [
        "--text",
        tmp_path / "text.txt",
        "--tokens=600",
        "--tokens=700",
        "--facts=1",
        "--wording=number",
        "--local=0",
        "--local=full",
    ]
    called = ("eval", "facts", *options, "--out", tmp_path / "run.jsonl", "--json")
    ended = command.run(command.application(), *called, "--plot", tmp_path / "facts.svg")
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    rows = [row for row in found["answers"] if row["wording"] == "all"]
    assert [(row["tokens"], row["local"]) for row in rows[::4]] == [
        (600, "0"),
        (600, "full"),
        (700, "0"),
        (700, "full"),
    ]
    assert [row["way"] for row in rows[:4]] == ["memory", "re-reading", "nothing", "chunk found"]
    assert rows[0]["right"] == rows[3]["right"] == 1
    assert rows[2]["right"] == 0
    assert "<svg" in (tmp_path / "facts.svg").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4
    again = json.loads(command.run(command.application(), *called).stdout)
    assert again["answers"] == found["answers"]
    assert again["cost"]["tokens"] < found["cost"]["tokens"]


def test_answers_of_a_fact() -> None:
    fact = WordedFact("city", "A B", "A B lives in the city of Rome.", "A B lives in the city of", "?", "Rome")
    assert fact.answered(" Rome, Italy", "complete")
    assert not fact.answered(" Romeo", "complete")
    assert not fact.answered("He lives in Jerome.", "chat")
