"""The command `kvbank eval ttft` feeds each way what it says, and times all ways in turn."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvbank
from model_worker.errors import InputError
from model_worker.evaluate.first_token import ALL, HELD, HITS, MEMORY, SESSION, FirstTokenRun, Plan, median_width
from model_worker.model import MemoryModel
from tests.support import command
from tests.worker.tiny import bank, build, tokenizer, tokens

CHUNK, TOP_K, QUESTION = 8, 3, 6


@pytest.fixture
def worker(client: kvbank.Client) -> Iterator[MemoryModel]:
    sizes: dict[str, Any] = {"patience": 120.0, "chunk": CHUNK, "window": 16, "top_k": TOP_K}
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=bank(), strict=True, **sizes) as model:
        yield model
        client.delete_bank("history")


def test_each_way_is_fed_what_it_says(worker: MemoryModel) -> None:
    plan = Plan(history=(400, 64), question=QUESTION, rounds=4, all_up_to=100, seed=0)
    run = FirstTokenRun(worker, tokens(300)[0].tolist(), plan, lambda *_: None)
    found = run.report()
    rows = {(row["history"], row["way"]): row for row in found["rows"]}
    assert list(rows) == [*((64, way) for way in (MEMORY, HELD, HITS, ALL)), *((400, w) for w in (MEMORY, HELD, HITS))]
    fed = {MEMORY: QUESTION, HELD: QUESTION, HITS: TOP_K * CHUNK + QUESTION, ALL: 64 + QUESTION}
    assert {(length, way): row["tokens"] for (length, way), row in rows.items()} == {
        (length, way): fed[way] for length, way in rows
    }
    assert {row["rounds"] for row in found["rows"]} == {3, 4}
    assert all(row["seconds"] > 0 and row["peak"] > 0 for row in found["rows"])
    assert rows[400, HITS]["ratio"] == 1
    assert rows[64, ALL]["peak"] > rows[64, MEMORY]["peak"]
    assert found["cost"]["stored"] > 0
    usage = worker.client.get_bank("history").usage
    assert (usage.chunks, usage.tokens) == (400 // CHUNK, 400)
    starts = [chunk.start for chunk in worker.client.list_chunks("history", filter=kvbank.Filter(start_before=64))]
    assert starts == list(range(0, 64, CHUNK))


def test_a_session_is_fed_the_question_alone(worker: MemoryModel) -> None:
    """Behind twice the history it is fed no more, and leaves nothing in the service."""
    plan = Plan(history=(128, 256), question=QUESTION, rounds=2, all_up_to=200, seed=0, sessions=True)
    found = FirstTokenRun(worker, tokens(300)[0].tolist(), plan, lambda *_: None).report()
    rows = {(row["history"], row["way"]): row for row in found["rows"]}
    assert rows[128, SESSION]["tokens"] == rows[256, SESSION]["tokens"] < 64 < rows[128, ALL]["tokens"]
    short, long = found["sessions"]
    assert (short["chunks"], long["chunks"], long["faster"]) == (16, 32, None)
    assert min(short["faster"], short["chunk_bytes"], short["window_bytes"]) > 0
    assert found["cost"]["stored"] > 0
    assert list(worker.client.sessions.list()) == []


def test_what_is_recalled_is_of_the_history(worker: MemoryModel) -> None:
    """Test that a shorter history finds nothing that comes later, as attention and the re-reading both show."""
    plan = Plan(history=(CHUNK, 400), question=QUESTION, rounds=1, all_up_to=0, seed=0)
    found = FirstTokenRun(worker, tokens(300)[0].tolist(), plan, lambda *_: None).report()
    rows = {(row["history"], row["way"]): row for row in found["rows"]}
    assert rows[CHUNK, HITS]["tokens"] == CHUNK + QUESTION
    assert rows[400, HITS]["tokens"] == TOP_K * CHUNK + QUESTION


def test_scores_leave_no_hit_out(worker: MemoryModel) -> None:
    """Test that recall attends to as many hits as are read again, though the worker is set to leave most out."""
    worker.settings = replace(worker.settings, min_share=1.0, min_score=0.99)
    run = FirstTokenRun(worker, tokens(300)[0].tolist(), Plan((200,), QUESTION, 1, 0, 0), lambda *_: None)
    history = run._filled()
    memory = run._memory(kvbank.Filter(start_before=200), 1)
    assert [len(hits) for hits in memory.recall([history[:QUESTION]]) or []] == [TOP_K]


def test_a_text_without_chunks(worker: MemoryModel) -> None:
    worker.client.create_bank("history", kv=None, embedding=kvbank.EmbeddingSpec("x", 4))
    with pytest.raises(InputError, match="too short for chunks of 8"):
        FirstTokenRun(worker, [3] * 10, Plan((64,), 4, 1, 0, 0), lambda *_: None).report()


def test_medians() -> None:
    """Test against quartiles by hand: 2 and 4 of five values around 3."""
    assert median_width([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, pytest.approx(1.57 * 2 / 5**0.5))
    assert median_width([7.0]) == (7.0, 0.0)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("llama_gqa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in tokens(300)[0].tolist()), encoding="utf-8")
    options = ["--history=64", "--history=200", "--rounds=2", "--top-k=2", "--chunk=8", "--window=16"]
    called = ("eval", "ttft", "--model", folder, "--text", tmp_path / "a.txt", *options)
    ended = command.run(command.application(), *called, "--plot", tmp_path / "ttft.svg")
    assert ended.exit_code == 0, ended.stderr
    assert ended.stderr == "" or "profiler" not in ended.stderr
    assert "2 hits of 8 tokens" in ended.stdout
    assert [line.split()[0] for line in ended.stdout.splitlines()[2:9]] == ["64"] * 4 + ["200"] * 3
    assert "cost: " in ended.stdout
    assert "<svg" in (tmp_path / "ttft.svg").read_text(encoding="utf-8")
