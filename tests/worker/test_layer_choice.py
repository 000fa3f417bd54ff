"""A file of chosen layers says which layers of one model remember; no other model takes the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import kvbank
from model_worker.attaching import attach
from model_worker.attachment.layer_choice import LayerChoice, named_parts, read_layers
from model_worker.attachment.loading import load_model
from model_worker.errors import BankMismatch, InputError
from model_worker.model import MemoryModel
from tests.support import command
from tests.worker.tiny import attached, bank, build, tokenizer, tokens


@pytest.fixture
def chosen(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes layers 1 and 3 of a tiny model into a file, with some entries replaced."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "layers.json"
        with attached(build("llama_gqa")) as attachment:
            parts = named_parts(attachment.reader)
        some = {"mode": "per_layer", "memory_layers": (1, 3), "retrieval_layers": (1, 3)}
        LayerChoice.model_validate({"model": "tiny", "reader_parts": parts, **some}).write(path)
        if changes:
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return path

    return write


def test_a_model_is_attached_as_the_file_says(chosen: Callable[..., Path]) -> None:
    path = chosen()
    for net, tokens_of in ((build("llama_gqa"), tokenizer()), (build("llama_gqa"), None)):
        attachment = attach(net, tokens_of, layers=str(path), positions="original")
        plan = attachment.plan
        attachment.detach()
        assert (plan.mode, plan.positions) == ("per_layer", "original")
        assert plan.memory_layers == plan.retrieval_layers == (1, 3)


def test_other_layers_are_not_stored_and_another_set_is_refused(
    client: kvbank.Client, chosen: Callable[..., Path]
) -> None:
    path, ids, stored = chosen(), tokens(24)[0].tolist(), {}
    names = {"all": bank(), "chosen": bank()}
    for name, options in (("all", {}), ("chosen", {"layers": path})):
        settings = {"chunk": 8, "window": 16, "attach_options": options}
        with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=names[name], **settings) as model:
            model.read(ids)
            stored[name] = model.memory.stats.bytes_after
        kv = client.get_bank(names[name]).kv
        assert kv is not None
        assert tuple(kv.layers) == {"all": (0, 1, 2, 3), "chosen": (1, 3)}[name]
    assert stored["chosen"] * 2 == stored["all"] == 24 * 4 * 2 * 2 * 8 * 4
    usage = {name: client.get_bank(name).usage.bytes for name in names.values()}
    assert (
        usage[names["all"]] - usage[names["chosen"]] >= 24 * 2 * 2 * 2 * 8 * 4
    )  # on the disk, beside what banks share
    for name, options in (("all", {"layers": path}), ("chosen", {})):  # each bank is its own set's
        other = {"memory": client, "bank": names[name], "chunk": 8, "window": 16, "attach_options": options}
        with pytest.raises(BankMismatch, match=rf"{names[name]}.* layers \(.*\).*\(.*\)"):
            MemoryModel(build("llama_gqa"), tokenizer(), **other)


@pytest.mark.parametrize(
    ("net", "differs"),
    [
        (lambda: build("llama_gqa", seed=1), "weights differ"),
        (lambda: build("llama_mha"), "architecture, weights differ"),
        (lambda: build("llama_gqa").to(torch.bfloat16), "weights differ"),
    ],
)
def test_another_model_is_refused(
    chosen: Callable[..., Path], net: Callable[[], PreTrainedModel], differs: str
) -> None:
    made = net()
    with pytest.raises(InputError, match=rf"another model \(tiny\): .*{differs}"):
        attach(made, layers=chosen())
    attach(made).detach()  # and the model can still be attached


def test_another_reader_part_is_refused(chosen: Callable[..., Path]) -> None:
    path = chosen()
    parts = json.loads(path.read_text())["reader_parts"]
    path = chosen(reader_parts={**parts, "buffers and modules": "0"})
    with pytest.raises(InputError, match="buffers and modules differ"):
        attach(build("llama_gqa"), layers=path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2; this kvbank reads version 1"),
        ({"kind": "another"}, "is no file of kvbank layers --choose"),
        ({"memory_layers": []}, "memory_layers: Tuple should have at least 1 item"),
        ({"memory_layers": [1, "x"]}, "memory_layers.1: Input should be a valid integer"),
        ({"mode": "both"}, "mode: Input should be 'memlong' or 'per_layer'"),
        ({"memory_layers": [1, 7], "retrieval_layers": [1, 7]}, "layer 7 does not exist"),
    ],
)
def test_a_damaged_file_is_refused(chosen: Callable[..., Path], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        attach(build("llama_gqa"), layers=chosen(**changes))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for content in ("", "[]", "{", '"layers"', "[" * 100_000):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(InputError, match=r"x.json is no file of kvbank layers --choose"):
            read_layers(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot read"):
        read_layers(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot write"):
        choice().write(tmp_path / "none" / "x.json")


def choice() -> LayerChoice:
    layers = {"memory_layers": (0,), "retrieval_layers": (0,)}
    return LayerChoice(model="tiny", reader_parts={}, mode="per_layer", **layers)


def test_a_file_goes_with_no_other_layers(chosen: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="layers is a file that says the mode, memory_layers too"):
        attach(build("llama_gqa"), layers=chosen(), mode="memlong", memory_layers=[1])


@pytest.mark.slow
def test_an_evaluation_runs_with_the_layers_of_a_file(tmp_path: Path, chosen: Callable[..., Path]) -> None:
    build("llama_gqa").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    attachment = attach(*load_model(tmp_path / "model"))
    attachment.detach()
    path = chosen(reader_parts=named_parts(attachment.reader))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in tokens(100)[0].tolist()), encoding="utf-8")
    spans = ("--text", text, "--tokens=64", "--score=16", "--memory=32", "--chunk=8", "--window=16", "--other=0")
    stored = []
    for options in ((), ("--layers", path)):
        done = command.run(
            command.application(), "eval", "ppl", "--model", tmp_path / "model", *spans, *options, "--json"
        )
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        stored.append(found["cost"]["stored"])
        assert str(tmp_path) not in done.stdout
    assert found["options"]["layers"] == "layers.json"
    kv = 64 * 4 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, their size, bytes
    assert stored[0] - stored[1] >= kv / 2
