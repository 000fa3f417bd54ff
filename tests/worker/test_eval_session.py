"""The command `kvbank eval session` counts what a long text and the questions behind it cost, and goes on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvbank
from model_worker.errors import InputError
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.whole_session import HITS, MEMORY, PLAIN, Plan, WholeSession
from model_worker.model import MemoryModel
from tests.worker.tiny import bank, build, tokenizer, tokens

CHUNK, TOP_K = 8, 3
PLAN = Plan(tokens=160, questions=4, question=6, answer=2, plain_up_to=160, seed=0)
BANK = "whole-session"


@pytest.fixture
def worker(client: kvbank.Client) -> Iterator[MemoryModel]:
    sizes: dict[str, Any] = {"patience": 120.0, "chunk": CHUNK, "window": 16, "top_k": TOP_K}
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=bank(), strict=True, **sizes) as model:
        yield model
        client.delete_bank(BANK)


def run(worker: MemoryModel, log: Path | None = None, plan: Plan = PLAN, progress: Any = None) -> dict[str, Any]:
    text = tokens(100)[0].tolist()
    return WholeSession(worker, text, plan, Journal(log, {}), progress or (lambda *_: None)).report()


def test_each_way_reads_and_is_asked_as_it_says(worker: MemoryModel) -> None:
    rows = {row["way"]: row for row in run(worker)["rows"]}
    usage = worker.client.get_bank(BANK).usage
    assert list(rows) == [MEMORY, HITS, PLAIN]
    answers = PLAN.questions * (PLAN.question + PLAN.answer - 1)
    assert rows[PLAIN]["fed"] == PLAN.tokens + answers
    assert rows[MEMORY]["fed"] == PLAN.tokens + answers
    assert rows[HITS]["fed"] == PLAN.questions * TOP_K * CHUNK + answers
    assert rows[MEMORY]["kept"] == usage.bytes > rows[HITS]["kept"] > 0
    config = worker.model.config
    pair = 2 * config.num_key_value_heads * config.head_dim * 4
    assert rows[PLAIN]["kept"] == PLAN.tokens * pair * config.num_hidden_layers
    assert all(row["after"] == sorted(row["after"]) and row["after"][-1] == row["seconds"] for row in rows.values())
    assert all(row["seconds"] >= row["read_seconds"] + row["answer_seconds"] > 0 for row in rows.values())


class Interrupted(Exception):
    """Ends a run here."""


@pytest.mark.parametrize("kept", [True, False])
def test_it_goes_on_where_it_was_interrupted(worker: MemoryModel, tmp_path: Path, kept: bool) -> None:
    """Interrupt it behind two questions about texts that are re-read: what was done is not done again, but for the
    reading into a bank that was not kept."""

    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == f"{HITS}: questions" and done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(worker, tmp_path / "log", progress=interrupt)
    before = worker.client.get_bank(BANK)
    if not kept:
        worker.client.delete_bank(BANK)
    stages: list[str] = []
    found = run(worker, tmp_path / "log", progress=lambda stage, done, _: stages.append(stage))
    assert (worker.client.get_bank(BANK) == before) is kept
    assert (f"{MEMORY}: reading" not in stages) is kept
    assert f"{HITS}: reading" not in stages
    assert [row["fed"] for row in found["rows"]] == [row["fed"] for row in run(worker)["rows"]]
    assert len((tmp_path / "log").read_text().splitlines()) == 3 * (1 + PLAN.questions) + (not kept)


def test_a_text_that_is_too_long_for_the_plain_cache_or_too_short_for_a_chunk(worker: MemoryModel) -> None:
    short = Plan(tokens=40, questions=1, question=6, answer=1, plain_up_to=39, seed=0)
    assert [row["way"] for row in run(worker, plan=short)["rows"]] == [MEMORY, HITS]
    for text, plan in (([5] * 4, short), ([5] * 40, replace(short, tokens=4))):
        with pytest.raises(InputError, match="4 tokens is shorter than a chunk of 8"):
            WholeSession(worker, text, plan, Journal(None, {}), lambda *_: None).report()
