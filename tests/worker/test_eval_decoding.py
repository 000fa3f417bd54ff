"""`kvbank eval decoding` reports the losses of the model itself, and of caches that keep what their rule says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from model_worker.errors import InputError
from model_worker.evaluate.decoding import Plan, measure_decoding
from model_worker.evaluate.journal import Journal
from tests.support import command
from tests.worker.tiny import tokens

Models = Callable[[str], PreTrainedModel]
PROMPT, NEW = 48, 12


def documents(count: int = 3) -> list[list[int]]:
    return [tokens(PROMPT + NEW, seed=seed)[0].tolist() for seed in range(count)]


def seen_by(window: int) -> torch.Tensor:
    """Return the mask `[1, 1, T, T]` of a window: a prompt that is read in blocks of an eighth of it, then tokens."""
    length, block = PROMPT + NEW, -(-window // 8)
    begins = [at - at % block if at < PROMPT else at for at in range(length)]
    sizes = [min(block, PROMPT - at + at % block) if at < PROMPT else 1 for at in range(length)]
    query, key = torch.arange(length)[:, None], torch.arange(length)
    oldest = torch.tensor([begin - (window - size) for begin, size in zip(begins, sizes, strict=True)])[:, None]
    seen = (key <= query) & (key >= oldest)
    return torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("family", ["llama_gqa", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_losses_and_sizes_are_those_of_the_caches(model: Models, family: str) -> None:
    """Test the full cache by one forward, a window by one in which tokens see no more than it has, and all bytes."""
    net, made = model(family), documents()
    seen: list[int] = []
    full, tova, sinks, window = measure_decoding(
        net, None, made, Plan(PROMPT, NEW, [4]), progress=lambda done, total: seen.append(done)
    )
    assert seen == list(range(13))
    assert [(row.rule, row.kept) for row in (full, tova, sinks, window)] == [
        *(("full", 48), ("tova", 12), ("sinks", 12), ("window", 12))
    ]
    ids = torch.tensor(made)
    with torch.no_grad():
        logits = net(ids).logits[:, PROMPT - 1 : -1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten())
    assert full.nats == pytest.approx(float(expected), abs=1e-5)
    assert full.above == full.above_width == 0
    with torch.no_grad():
        logits = net(ids, attention_mask=seen_by(window.kept)).logits[:, PROMPT - 1 : -1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten())
    assert window.nats == pytest.approx(float(expected), abs=1e-5)
    token = net.config.num_hidden_layers * 2 * net.config.num_key_value_heads * 8 * 4
    assert full.bytes == (PROMPT + NEW - 1) * token
    assert tova.bytes == sinks.bytes == window.bytes == 12 * token
    for row in (tova, sinks, window):
        assert row.above == pytest.approx(row.nats - full.nats, abs=1e-9)
        assert abs(row.above) > 1e-3
        assert row.rate > 0
    assert len({row.nats for row in (tova, sinks, window)}) == 3


def test_a_cache_that_keeps_everything_is_the_full_one(model: Models) -> None:
    """Test a bound that only the last token passes, which has seen all others by then."""
    ids = [own[:26] for own in documents(2)]
    full, tova = measure_decoding(model("llama_gqa"), None, ids, Plan(24, 2, [1], ("tova",)))
    assert tova.nats == pytest.approx(full.nats, abs=1e-6)
    assert (tova.kept, tova.bytes / full.bytes) == (24, pytest.approx(24 / 25))


def test_what_was_measured_is_not_measured_again(model: Models) -> None:
    journal, made = Journal(None, {}), documents(2)
    first = measure_decoding(model("llama_gqa"), None, made, Plan(PROMPT, NEW, [4], ("tova",)), journal)
    again = measure_decoding(model("llama_gqa"), None, made, Plan(PROMPT, NEW, [4], ("tova", "window")), journal)
    assert again[:2] == first  # with the same seconds
    part = journal.get("document 2, window, 12 tokens")
    assert part is not None
    assert set(part) == {"nats", "seconds", "bytes"}


def test_what_is_wanted_twice_is_measured_once(model: Models) -> None:
    """Test that shares that keep as many tokens, and a rule that is given twice, are one row."""
    plan = Plan(PROMPT, NEW, [4, 6, 5, 6], ("tova", "tova"))
    rows = measure_decoding(model("llama_gqa"), None, documents(2), plan)
    assert [(row.rule, row.kept) for row in rows] == [("full", 48), ("tova", 12), ("tova", 8), ("tova", 9)]


def test_plans_that_make_no_sense(model: Models) -> None:
    for wrong, said in (
        (lambda: Plan(PROMPT, NEW, [4], ("h2o",)), "there is no rule 'h2o'; there are tova"),
        (lambda: Plan(PROMPT, NEW, [16]), "1/16 of 48 tokens is less than 8 tokens"),
        (lambda: measure_decoding(model("llama_gqa"), None, documents(1), Plan(PROMPT, NEW, [4])), "too short"),
        (
            lambda: measure_decoding(model("llama_gqa"), None, documents(), Plan(250, NEW, [4])),
            "262 tokens are more than the 256",
        ),
    ):
        with pytest.raises(InputError, match=said):
            wrong()


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    called = ("eval", "decoding", "--tokens=96", "--new=8", "--documents=2", "--log", tmp_path / "log.jsonl")
    ended = command.run(command.application(), *called, "--json", "--plot", tmp_path / "decoding.svg")
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert [(row["rule"], row["kept"]) for row in found["rows"]] == [
        *(("full", 96), ("tova", 12), ("sinks", 12), ("window", 12))
    ]
    assert "<svg" in (tmp_path / "decoding.svg").read_text(encoding="utf-8")
    assert len((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    assert "tokens/s" in command.run(command.application(), *called).stdout
