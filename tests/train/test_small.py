"""The program that trains the small model: rows, facts, and a tiny run of every stage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_worker.evaluate.facts import TRAINING_SEEDS, make_facts
from model_worker.train.books import book_paths
from model_worker.train.lookup import ChunkLookup
from model_worker.train.memory_stage import encode_chunks, hidden_states
from model_worker.train.small import Run, SmallTraining, make_model
from model_worker.train.tasks import CHUNK, Batch, Tasks
from model_worker.train.tokenizer import train_tokenizer

ASSETS = Path(__file__).parents[2] / "model_worker" / "assets"
WORDS = "the sea was calm and the old captain of the ship looked at his number 1234567890 again. "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS * 20, *(fact.statement for fact in make_facts(3, 200))], size=400)


@pytest.fixture(scope="module")
def books(tokenizer):
    rng = np.random.default_rng(0)
    return [rng.integers(3, len(tokenizer), 3000).astype(np.int16) for _ in range(2)]


def test_facts_are_seeded_unique_and_answerable():
    facts = make_facts(5, 300)
    assert facts == make_facts(5, 300)
    assert len({fact.name for fact in facts}) == len({fact.number for fact in facts}) == 300
    for fact in facts:
        assert fact.statement.startswith(fact.question + fact.answer)
        assert fact.answer == f" {fact.number}"


def test_facts_of_training_and_evaluation_do_not_meet():
    ours = {fact.name for fact in make_facts(0, 2000)}
    assert not ours & {fact.name for fact in make_facts(TRAINING_SEEDS, 2000)}


def test_digits_stay_apart_and_text_survives(tokenizer):
    ids = tokenizer.encode("calm 48213", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids[-5:]] == list("48213")
    text = "naïve — “quoted”\n\tdef f(x): return 12"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id


def rows_of(tokenizer, books, seed: int) -> list[Batch]:
    tasks = Tasks(tokenizer, books, seed)
    return [tasks.copying(4, 64), tasks.copying(4, 64, memory=False), tasks.facts(4), tasks.natural(2)]


def test_rows_are_seeded(tokenizer, books):
    for one, same, other in zip(*(rows_of(tokenizer, books, seed) for seed in (1, 1, 2)), strict=True):
        assert torch.equal(one.local, same.local)
        assert not torch.equal(one.local, other.local)


def test_rows_are_well_formed(tokenizer, books):
    for batch in rows_of(tokenizer, books, 1):
        assert batch.local.shape == batch.loss.shape
        assert batch.loss.any()
        assert not batch.loss[:, 0].any()
        assert int(batch.local.min()) >= 0
        assert int(batch.local.max()) < len(tokenizer)
        if batch.chunks is not None:
            assert batch.chunks.shape[0] == len(batch.local)
            assert batch.chunks.shape[2] == CHUNK


def test_asked_facts_are_in_the_memory(tokenizer, books):
    batch = Tasks(tokenizer, books, 4).facts(8)
    for local, loss, chunks in zip(batch.local, batch.loss, batch.chunks, strict=True):
        memory = " ".join(tokenizer.decode(chunk) for chunk in chunks)
        for number in tokenizer.decode(local[loss]).split(".")[:-1]:
            assert number.strip() in memory


def test_lookup_finds_the_chunk_that_shares_most(books):
    lookup = ChunkLookup(books[0][:2560].reshape(-1, CHUNK))
    found = lookup.best(books[0][640:700], before=15, count=1)
    assert np.array_equal(found[0], books[0][640:704])


def test_held_back_novels_are_not_trained_on(tmp_path: Path):
    for name in ("emma", "frankenstein", "treasure-island"):
        (tmp_path / f"{name}.txt").write_text("text")
    assert [path.name for path in book_paths(tmp_path)] == ["emma.txt"]
    assert len(book_paths(tmp_path, held_back=True)) == 2


def test_chats_with_the_model_go_as_with_the_one_that_ships(tokenizer):
    shipped = json.loads((ASSETS / "kvbank-small" / "config.json").read_text())["kvbank"]
    assert (
        make_model(len(tokenizer), memory_layer=1, layers=3, hidden=64).config.kvbank["session"] == shipped["session"]
    )


def test_forward_without_memory_is_the_models_own(tokenizer):
    model = make_model(len(tokenizer), memory_layer=1, layers=3, hidden=64).eval()
    ids = torch.randint(3, len(tokenizer), (2, 20))
    with torch.no_grad():
        ours = model.lm_head(hidden_states(model, ids))
        assert torch.allclose(ours, model(input_ids=ids).logits, atol=1e-4)


def test_order_of_chunks_does_not_matter_and_gradients_reach_the_memory(tokenizer):
    model = make_model(len(tokenizer), memory_layer=1, layers=3, hidden=64)
    ids, chunks = torch.randint(3, len(tokenizer), (2, 10)), torch.randint(3, len(tokenizer), (2, 3, 16))
    one = hidden_states(model, ids, encode_chunks(model, chunks, 1), (1, 2))
    other = hidden_states(model, ids, encode_chunks(model, chunks.flip(1), 1), (1, 2))
    assert torch.allclose(one, other, atol=1e-5)
    one.sum().backward()
    assert model.model.layers[0].self_attn.v_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("library", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tiny_run_of_all_stages_resumes(tmp_path: Path, library: bool):
    """Token ids are those of a file that an earlier run has left, or of the standard library's source, which takes
    seconds."""
    books, out = tmp_path / "books", tmp_path / "out"
    books.mkdir()
    out.mkdir()
    if not library:
        np.savez(out / "texts.npz", one=np.random.default_rng(0).integers(3, 300, 3000).astype(np.int16))
    for name in ("one", "two"):
        (books / f"{name}.txt").write_text(WORDS * 100)
    settings = SmallTraining(
        books=books,
        out=out,
        hidden=64,
        layers=2,
        memory_layer=1,
        copy_steps=3,
        mixed_steps=3,
        memory_steps=3,
        log_every=1,
        threads=1,
    )
    Run(settings).stages()
    checkpoint = out / "checkpoint"
    below = AutoModelForCausalLM.from_pretrained(checkpoint).model.layers[0].self_attn.q_proj.weight.clone()

    Run(settings.model_copy(update={"memory_steps": 6, "resume": checkpoint})).stages()
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "rate" in entry] == [1, 2, 3] * 3 + [4, 5, 6]
    assert any(entry.get("event") == "resume" for entry in log)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, below)  # frozen in the last stage
    assert AutoTokenizer.from_pretrained(checkpoint).bos_token_id == model.config.bos_token_id
    assert model.config.kvbank["memory_layers"] == [1]
