"""The command `kvbank eval ppl` reports the losses of the worker itself, and what follows from them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kvbank
from model_worker.errors import InputError
from model_worker.evaluate import memlong_protocol
from model_worker.evaluate.gains import by_distance, by_document, gains, part
from model_worker.evaluate.interval import Share, interval_of_few
from model_worker.evaluate.journal import Journal
from model_worker.evaluate.last_seen import Seen, bin_of, bins, rare_words, words_of
from model_worker.evaluate.memlong_protocol import protocol_memory, score_windows, segment_of, window_of_protocol
from model_worker.evaluate.memory_span import MemorySpan
from model_worker.evaluate.perplexity import ALL, NONE, OTHER, RECENT, Document, measure_document, sizes_of
from model_worker.evaluate.perplexity_run import PerplexityRun, Plan
from model_worker.model import MemoryModel
from tests.support import command
from tests.worker.tiny import bank, build, tokenizer, tokens

CHUNK, WINDOW, SCORE = 8, 16, 40


@pytest.fixture
def worker(client: kvbank.Client) -> Iterator[MemoryModel]:
    options: dict[str, Any] = {
        "strict": True,
        "patience": 120.0,
        "chunk": CHUNK,
        "window": WINDOW,
        "top_k": 2,
        "context": "isolated",
    }
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=bank(), query="past", **options) as model:
        yield model


@pytest.mark.parametrize("recent", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_losses_are_those_of_the_worker(worker: MemoryModel, recent: int) -> None:
    """Test that one shared reading gives the losses of a stream without a memory, and of one that recalls all along."""
    ids = tokens(160)[0].tolist()
    memory, fresh = (worker.with_bank(bank(), recent=recent) for _ in range(2))
    found = measure_document(worker, memory, Document("a", ids, SCORE), sizes_of(120, [32, 500]))
    assert list(found) == [NONE, *([RECENT] if recent else []), "last 32", ALL]
    none, all_along = (worker.losses(ids, memory=own).nll[-SCORE:] for own in (None, fresh))
    assert torch.allclose(found[NONE], none.double(), atol=1e-5)
    # The window before the scored tokens was computed with the memory, and what was before that window was not.
    assert torch.allclose(found[ALL][WINDOW:], all_along[WINDOW:].double(), atol=1e-4)
    assert torch.allclose(found[ALL], all_along.double(), atol=0.3)
    assert not torch.allclose(found[ALL], found[NONE], atol=1e-2)
    assert not torch.allclose(found[ALL], found["last 32"], atol=1e-2)


def test_another_text_is_recalled_from_its_own_bank(worker: MemoryModel) -> None:
    ids = tokens(160)[0].tolist()
    other = worker.with_bank(bank())
    worker.read(tokens(80, seed=5)[0].tolist(), memory=other)
    found = measure_document(worker, worker.memory, Document("a", ids, SCORE), {ALL: None}, other)
    assert list(found) == [NONE, ALL, OTHER]
    assert not torch.allclose(found[ALL], found[OTHER], atol=1e-2)
    assert other.stats.recalls > 0


def test_a_span_finds_what_left_the_window_and_no_more(worker: MemoryModel) -> None:
    worker.read(tokens(80)[0].tolist())
    query = [tokens(80)[0, -CHUNK:].tolist()]

    def starts(left: int, size: int | None) -> list[int]:
        [found] = MemorySpan(worker.memory, left, size).recall(query) or []
        return [chunk.start for chunk in found]

    assert all(start < 40 for start in starts(40, None))
    assert starts(80, 8) == [72]
    assert starts(40, 8) == [32]
    assert starts(40, 0) == starts(0, None) == []


def test_a_text_that_is_too_short(worker: MemoryModel) -> None:
    with pytest.raises(InputError, match="a has 30 tokens: too few"):
        measure_document(worker, worker.memory, Document("a", tokens(30)[0].tolist(), 10), {ALL: None})


def test_the_protocol_of_memlong(worker: MemoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that the loss without a memory is the model's own, and that the memory is chosen by the segment itself."""
    monkeypatch.setattr(memlong_protocol, "LAST", 64)
    last = segment_of(worker)
    ids = tokens(2 * last, seed=3)[0].tolist()
    memory = protocol_memory(worker)
    [(segment, alone, whole)] = score_windows(worker, memory, ids, 5)
    for expected, own in ((alone, ids[last:]), (whole, ids)):
        seen = torch.tensor([own])
        with torch.no_grad():
            logits = worker.model(seen).logits[0, :-1]
        assert expected == pytest.approx(float(torch.nn.functional.cross_entropy(logits, seen[0, 1:])), abs=1e-5)
    assert segment != pytest.approx(alone, abs=1e-4)
    assert (memory.query, memory.query_tokens, memory.context) == ("with_input", last, "isolated")
    worker.client.delete_bank("memlong")


# -- words ------------------------------------------------------------------------------------------------------------


def test_rare_words_and_when_they_were_seen() -> None:
    text = words_of(tokenizer(), " ".join(f"w{i}" for i in (3, 40, 41, 3, 42, 40)))
    assert text.ids == [3, 40, 41, 3, 42, 40]
    assert text.words[:2] == ["w3", "w40"]
    assert text.between(1, 4).spans == [(0, 1), (1, 2), (2, 3)]
    assert rare_words(text, 0) == []  # two letters and digits are no rare words
    words = ["captain", "the", "captain", "whale", "whale", "captain"]
    own = type(text)(list(range(12)), [(2 * i, 2 * i + 2) for i in range(6)], words)
    assert rare_words(own, 4) == [Seen(4, 6, 3), Seen(6, 8, None), Seen(8, 10, 1), Seen(10, 12, 5)]
    assert bins([10, 20]) == ["below 10", "10 to 20", "20 and more", "never seen"]
    assert [bin_of(each, [10, 20]) for each in (9, 10, 19, 20, 999, None)] == [
        *("below 10", "10 to 20", "10 to 20", "20 and more", "20 and more", "never seen"),
    ]


# -- the report -------------------------------------------------------------------------------------------------------


def test_gains_are_paired() -> None:
    """Test against a calculation by hand of a memory that is better by 0.5 in one document and by 0.1 in the other."""
    none = torch.rand(1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [
        part("a", 64, {NONE: none, ALL: none - 0.5}, [Seen(70, 72, 10)], 64),
        part("b", 64, {NONE: none, ALL: none - 0.1, OTHER: none}, [Seen(70, 71, None)], 64),
    ]
    first, second = gains(parts)  # another text's memory was not measured everywhere
    assert (first["memory"], second["memory"]) == (NONE, ALL)
    assert second["gain"] == pytest.approx(0.3, abs=1e-4)
    assert second["width_documents"] == pytest.approx(12.706 * 0.2, abs=1e-2)  # Student's t of two documents
    assert second["width_blocks"] == pytest.approx(3.182 * 0.230940 / 2, abs=1e-3)  # of four groups of 512
    assert [row["gains"][0]["gain"] for row in by_document(parts)] == pytest.approx([0.5, 0.1], abs=1e-4)
    near, never = by_distance(parts, [16])
    assert (near["seen"], near["words"], near["width"]) == ("below 16", 1, None)
    assert near["gain"] == pytest.approx(1.0, abs=1e-3)  # two tokens of 0.5
    assert (never["seen"], never["gain"]) == ("never seen", pytest.approx(0.1, abs=1e-3))


def test_intervals() -> None:
    """Test against figures of other programs: scipy's t interval, and Wilson's of 9 in 10."""
    own = interval_of_few(torch.tensor([1.0, 2.0, 4.0]))
    assert (own.mean, own.width) == (pytest.approx(7 / 3), pytest.approx(3.7944, abs=1e-3))
    assert interval_of_few(torch.tensor([2.0])).known_width is None
    nine = Share(9, 10)
    assert (nine.low, nine.high) == (pytest.approx(0.5958, abs=1e-3), pytest.approx(0.9821, abs=1e-3))
    thirty_two = torch.tensor([-1.0, 1.0] * 16)
    assert interval_of_few(thirty_two).width == pytest.approx(2.0395 * (32 / 31) ** 0.5 / 32**0.5, abs=1e-4)
    assert Share(0, 10).low == pytest.approx(0, abs=1e-9)
    assert Share(10, 10).high == pytest.approx(1, abs=1e-9)
    assert (Share(3, 5) + Share(1, 5)).share == 0.4


def test_a_journal_knows_its_own_run(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    first = Journal(path, {"seed": 0})
    first.put("a", [1, 2])
    first.put("b", {"x": None})
    with path.open("a") as file:
        file.write('{"run": "cut off')  # the run was killed here
    assert Journal(path, {"seed": 1}).get("a") is None
    again = Journal(path, {"seed": 0})
    assert (again.get("a"), again.get("b"), again.get("c")) == ([1, 2], {"x": None}, None)
    again.put("c", 3)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    for wrong in ("no json\n", "[1]\n", '{"key": 1}\n', "A book that has no line end."):
        path.write_text(wrong)
        with pytest.raises(InputError, match=r"cannot go on with .*: line 1 is no line of a journal"):
            Journal(path, {})
        assert path.read_text() == wrong


# -- the run ---------------------------------------------------------------------------------------------------------


def run_of(worker: MemoryModel, texts: dict[str, str], journal: Journal, **changes: int) -> PerplexityRun:
    plan = {"tokens": 48, "score": 16, "spans": 1, "other": 0, "memlong": 0, "seed": 0, **changes}
    return PerplexityRun(worker, texts, Plan(sizes=(), **plan), journal, lambda *_: None)


def words(count: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in tokens(count, seed=seed)[0].tolist())


@pytest.mark.slow
def test_spans_of_a_text_differ(worker: MemoryModel) -> None:
    """Test that a document never counts twice: a text of 66 tokens has three spans of 64, one of 60 a single one."""
    run = run_of(worker, {"a": words(66, 1), "b": words(60, 2)}, Journal(None, {}), spans=9)
    found = run.report()["documents"]
    assert sorted(row["text"] for row in found) == ["a", "a from 1", "a from 2", "b"]


def test_a_short_text_is_refused_before_another_is_measured(worker: MemoryModel, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with pytest.raises(InputError, match="b has 20 tokens: too few"):
        run_of(worker, {"a": words(64, 1), "b": words(20, 2)}, Journal(path, {})).report()
    with pytest.raises(InputError, match="no text is long enough for a window of MemLong"):
        run_of(worker, {"a": words(64, 1)}, Journal(path, {}), memlong=1).report()
    assert not path.exists()


@pytest.mark.slow
def test_an_interrupted_protocol_begins_again(
    worker: MemoryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test that windows find all windows before them, also where the run was interrupted between two texts."""
    monkeypatch.setattr(memlong_protocol, "LAST", 32)
    length = window_of_protocol(worker)
    texts = {"a": words(length, 1), "b": words(length, 2)}

    def stop(stage: str, done: int, total: int) -> None:
        if stage.endswith("protocol, b"):
            raise KeyboardInterrupt

    whole = run_of(worker, texts, Journal(None, {}), memlong=1).report()
    journal = Journal(tmp_path / "run.jsonl", {})
    run = run_of(worker, texts, journal, memlong=1)
    run.progress = stop
    with pytest.raises(KeyboardInterrupt):
        run.report()
    worker.client.delete_bank("memlong")  # the service of a run ends with it
    again = run_of(worker, texts, Journal(tmp_path / "run.jsonl", {}), memlong=1).report()
    assert again["memlong"] == whole["memlong"]
    assert "memlong" not in [own.name for own in worker.client.list_banks()]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_goes_on_from_its_file(tmp_path: Path) -> None:
    """Test the whole way on a tiny model: a second run measures nothing, and says the same."""
    folder = tmp_path / "model"
    build("llama_gqa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for name, seed in (("a", 1), ("b", 2)):
        words = " ".join(f"w{i}" for i in tokens(400, seed=seed)[0].tolist())
        (tmp_path / f"{name}.txt").write_text(words, encoding="utf-8")
    options = ["--tokens=200", "--score=64", "--memory=64", "--chunk=8", "--window=24", "--other=48", "--memlong=1"]
    texts = [f"--text={tmp_path / name}.txt" for name in "ab"]
    called = ("eval", "ppl", "--model", folder, *texts, *options, "--out", tmp_path / "run.jsonl", "--json")
    first = command.run(command.application(), *called, "--plot", tmp_path / "ppl.svg")
    assert first.exit_code == 0, first.stderr
    found = json.loads(first.stdout)
    assert [row["memory"] for row in found["gains"]] == [NONE, "last 64", ALL, OTHER]
    assert [row["text"] for row in found["documents"]] == ["a.txt", "b.txt"]
    assert found["command"].startswith("kvbank eval ppl --model model --window 24 --chunk 8 --text a.txt --text b.txt")
    assert str(tmp_path) not in first.stdout
    assert found["cost"]["tokens"] > 2 * (264 + 3 * 64)
    assert found["cost"]["stored"] > 0
    assert "<svg" in (tmp_path / "ppl.svg").read_text(encoding="utf-8")
    lines = (tmp_path / "run.jsonl").read_text(encoding="utf-8")
    second = command.run(command.application(), *called)
    assert json.loads(second.stdout) == found
    assert (tmp_path / "run.jsonl").read_text(encoding="utf-8") == lines
