"""What a run of MemLong's training trains, leaves alone, resumes, measures and refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model_worker.attachment.loading import load_model
from model_worker.errors import InputError
from model_worker.train.checkpoints import checkpoints
from model_worker.train.memlong.run import train_memlong
from model_worker.train.memlong.settings import MemlongTraining
from tests.train.memlong.runs import SMALL, loader, texts, train, weights
from tests.worker.tiny import build

FULL: dict[str, Any] = {"train": "full", "mode": "memlong", "optimiser": "muon"}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Let sums of floating-point numbers be the same in every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]


def test_what_makes_the_memory_is_left_alone_and_the_rest_learns(tmp_path: Path) -> None:
    report = train(tmp_path / "run", texts(tmp_path), steps=12, lr=2e-2, **FULL)
    before, after = build("llama_gqa").state_dict(), weights(Path(report.product))
    for name, tensor in after.items():
        frozen = name.startswith(("model.embed_tokens", *(f"model.layers.{layer}." for layer in range(3))))
        assert torch.equal(tensor, before[name]) == frozen, name
    trained = sum(after[name].numel() for name in after if not torch.equal(after[name], before[name]))
    everything = sum(p.numel() for p in build("llama_gqa").parameters())
    assert report.trained == pytest.approx(trained / everything, abs=1e-6)
    losses = [line["text_loss"] for line in log(tmp_path / "run") if "text_loss" in line]
    assert losses[-1] < losses[0] - 0.2
    assert report.tokens == 12 * 2 * 16 - _missing(61, 4, 16, 12)


def _missing(tokens: int, chunk: int, row: int, steps: int) -> int:
    """Return the tokens that rows at the ends of documents lack, for two streams that read documents of one length."""
    whole = tokens // chunk * chunk
    lacks = -whole % row
    return 2 * lacks * (steps // -(-whole // row))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(FULL, marks=pytest.mark.slow),
        {**FULL, "optimiser": "adamw", "context": "window", "sinks": 2, "keep_memory": True, "gate": True},
        pytest.param(
            {"train": "full", "mode": "per_layer", "freeze_below": False, "visit": 2, "accumulate": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["memlong", "window and gates", "per_layer"],
)
def test_a_resumed_run_is_the_same_as_one_that_was_not_interrupted(tmp_path: Path, more: dict[str, Any]) -> None:
    """Compare weights, gates and losses bit by bit, after the later checkpoints have been lost."""
    paths, out = texts(tmp_path), tmp_path / "run"
    own = {"steps": 6, "save_every": 2, "lr": 1e-2, "seed": 5, **more}
    whole = train(out, paths, **own)
    expected = weights(Path(whole.product))
    entry = AutoConfig.from_pretrained(whole.product).kvbank
    losses = [line["text_loss"] for line in log(out) if "text_loss" in line]
    shutil.rmtree(whole.product)
    for later in checkpoints(out)[1:]:
        shutil.rmtree(later)
    again = train(out, paths, resume=True, **own)
    assert again.tokens == whole.tokens
    assert [line["text_loss"] for line in log(out) if "text_loss" in line][6:] == losses[4:]
    found = weights(Path(again.product))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert AutoConfig.from_pretrained(again.product).kvbank == entry
    assert ("gates" in entry) == bool(more.get("gate"))


def test_a_run_goes_on_with_its_settings_and_texts_alone(tmp_path: Path) -> None:
    paths, out = texts(tmp_path), tmp_path / "run"
    own = {"steps": 2, "save_every": 2, **FULL}
    train(out, paths, **own)
    for more, said in (
        ({"streams": 1, "memory": 16}, r"other settings: memory \(was 8, is 16\), streams \(was 2, is 1\)"),
        ({"lr": 1e-3}, r"lr \(was None, is 0.001\)"),
        ({"mode": "per_layer"}, "mode"),
        ({"paths": paths[::-1]}, "was made with other texts, or in another order"),
        ({"paths": paths[:1]}, "was made with other texts"),
    ):
        with pytest.raises(InputError, match=said):
            train(out, **{"paths": paths, **own, **more}, resume=True)
    assert train(out, paths, resume=True, **{**own, "steps": 3, "log_every": 2}).steps == 3
    for name in ("trained.safetensors", "course.pt"):
        file = checkpoints(out)[-1] / name
        whole = file.read_bytes()
        file.write_bytes(whole[:100])
        with pytest.raises(InputError, match="cannot be resumed from: "):
            train(out, paths, resume=True, **own)
        file.write_bytes(whole)


def test_held_out_texts_are_measured_and_the_product_says_how_it_is_used(tmp_path: Path) -> None:
    paths = texts(tmp_path, 4, 200)
    own = {"steps": 4, "eval_every": 2, "eval_blocks": 24, **FULL}
    report = train(tmp_path / "run", (tmp_path,), held_out=paths[:2], **own)
    assert [row["memory"] for row in report.held_out] == ["none", "memory", "another text"]
    assert all(len(row) > 3 for row in report.held_out[1:])
    assert report.verdict
    events = [line for line in log(tmp_path / "run") if line.get("event") == "held_out"]
    assert [event["step"] for event in events] == [2, 4, 4]
    assert events[-1]["memories"] == report.held_out
    config = AutoModelForCausalLM.from_pretrained(report.product).config
    assert config.kvbank == {
        **{"mode": "memlong", "positions": "near:32", "memory_layers": [2], "retrieval_layers": [2]},
        **{"chunk": 4, "context": "isolated", "window": 12, "top_k": 1, "recent": 1, "query_tokens": 12, "sinks": 0},
        "embed": "lexical",
    }


def test_a_text_is_measured_alone_as_beside_another(tmp_path: Path) -> None:
    """Test that its own memory is never made while another text's is attended to, in windows whose K-V depend on it."""
    paths = texts(tmp_path, 3, 101)
    own: dict[str, Any] = {"train": "full", "mode": "per_layer", "steps": 1, "eval_blocks": 12, "lr": 1e-9}

    def nats(name: str, *held_out: Path) -> float:
        rows = train(tmp_path / name, paths[2:], held_out=held_out, **own).held_out
        return next(float(row["nats"]) for row in rows if row["memory"] == "memory")

    alone = [nats(path.stem, path) for path in paths[:2]]
    assert nats("both", *paths[:2]) == pytest.approx(sum(alone) / 2, abs=1e-5)


def test_a_folder_of_texts_that_are_all_held_out_is_refused(tmp_path: Path) -> None:
    texts(tmp_path)
    with pytest.raises(InputError, match="is left to train on: all of them are held out"):
        train(tmp_path / "run", (tmp_path,), held_out=(tmp_path,), steps=1, **FULL)


def test_a_run_by_the_clock_shows_how_far_the_clock_is(tmp_path: Path) -> None:
    settings, shown = MemlongTraining(**{**SMALL, "text": texts(tmp_path), "minutes": 0.001, **FULL}), list[Any]()
    train_memlong(settings, tmp_path / "run", loader(), resume=False, bars=lambda *at: shown.append(at))
    assert [at for at in shown if at[0] == "training"][-1] == ("training", 100, 100)


def test_gates_that_a_model_came_with_stay(tmp_path: Path) -> None:
    paths = texts(tmp_path)
    first = train(tmp_path / "first", paths, steps=2, gate=True, lr=1e-2, **FULL).product
    settings = MemlongTraining(**{**SMALL, "text": paths, "steps": 1, "model": first, **FULL})
    again = train_memlong(
        settings,
        tmp_path / "again",
        lambda name, device: load_model(name, device=device),
        resume=False,
        bars=lambda *at: None,
    )
    gates = [AutoConfig.from_pretrained(folder).kvbank["gates"] for folder in (first, again.product)]
    assert gates[0]["2"] == pytest.approx(gates[1]["2"])


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    paths, out = texts(tmp_path), tmp_path / "run"
    short, empty, full = tmp_path / "short.txt", tmp_path / "empty.txt", tmp_path / "full"
    short.write_text("w3 w4 w5")
    empty.write_text(" \n")
    (tmp_path / "none").mkdir()
    full.mkdir()
    (full / "file").touch()
    for more, said in (
        ({"text": (empty,)}, "empty.txt has no text"),
        ({"text": (short,)}, "short.txt is shorter than a window of 12 tokens"),
        ({"text": (tmp_path / "missing.txt",)}, "cannot read"),
        ({"text": (tmp_path / "none",)}, "there is no text in"),
        ({"held_out": (short,)}, "short.txt is shorter than a window of 12 tokens"),
        ({"window": 10}, "is not two or more chunks of 4"),
        ({"memory": 3}, "a memory of 3 chunks is smaller than the 4 blocks"),
        ({"nothing": 0.9, "itself": 0.3}, "together at most 1"),
        ({"retrieval_layers": "2,x"}, "are numbers between commas"),
        ({"retrieval_layers": "9"}, "layer 9 does not exist"),
        ({"memory_layer": 3}, "no layer is left to train above the memory layer"),
        ({"memory_layer": 9, "context": "window"}, "layer 9 cannot be the memory layer: the model has 4"),
        ({"held_out": paths[1:2]}, "text-1.txt is held out, and cannot be trained on too"),
        ({"new": "hidden=64,layers=2", "train": "lora"}, "--new goes with --train full"),
        ({"new": "hidden=100,layers=2"}, "multiple of 64"),
        ({"resume": True}, "there is no complete checkpoint"),
    ):
        with pytest.raises(InputError, match=said):
            train(out, **{"paths": paths, "steps": 1, **FULL, **more})
        assert not out.exists()
    with pytest.raises(InputError, match="is not empty"):
        train(full, paths, steps=1, **FULL)
