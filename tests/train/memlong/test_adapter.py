"""An adapter of MemLong's training: what it has, how it is used, whose it is, and which banks it can still read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kvbank
from model_worker.attaching import attach
from model_worker.attachment.adapter import ENTRY, WEIGHTS
from model_worker.attachment.digest import reader_of
from model_worker.attachment.loading import load_model
from model_worker.embed import embedder
from model_worker.errors import BankMismatch, InputError, ModelNotFound
from model_worker.model import MemoryModel
from model_worker.train.checkpoints import checkpoints
from model_worker.train.memlong.run import train_memlong
from model_worker.train.memlong.settings import MemlongTraining
from tests.support import command
from tests.support.diagonal import rotated
from tests.train.memlong.runs import SMALL, texts, train
from tests.worker.tiny import bank, build, tokenizer, tokens

LORA: dict[str, Any] = {"mode": "memlong", "memory_layer": 1, "retrieval_layers": "1,3", "rank": 4, "gate": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("llama_gqa").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    report = train(folder / "run", texts(folder), steps=4, lr=1e-2, save_every=2, **LORA, embed="lexical:d=256")
    return Path(report.product)


def test_an_adapter_has_lora_and_norms_above_the_memory_layer(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in tensors if ".layers." in name}
    assert layers == {2, 3}
    projections = {name.split(".self_attn.")[1].split(".")[0] for name in tensors if ".lora_" in name}
    assert projections == {"q_proj", "k_proj", "v_proj", "o_proj"}
    log = [json.loads(line) for line in (adapter.parent / "training_log.jsonl").read_text().splitlines()]
    said = next(line["trained"] for line in log if line.get("event") == "begin")
    # Of two layers with 32 numbers a token, of which keys and values have 16; norms; and the last norm.
    lora = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32))
    assert said["values"] == lora + 2 * 2 * 32 + 32
    assert said["share"] == pytest.approx(said["values"] / said["all_values"])


@pytest.mark.parametrize("more", [LORA, {"train": "full", "optimiser": "adamw"}], ids=["lora", "full"])
def test_what_is_trained_of_a_bfloat16_model_is_float32(tmp_path: Path, more: dict[str, Any]) -> None:
    """Test it by norms near 1, whose steps are smaller than what bfloat16 tells apart."""
    settings = MemlongTraining(**{**SMALL, "text": texts(tmp_path), "steps": 2, "lr": 1e-4, "mode": "memlong", **more})
    product = train_memlong(
        settings,
        tmp_path / "run",
        lambda name, device: (build("llama_gqa").to(torch.bfloat16), tokenizer()),
        resume=False,
        bars=lambda *at: None,
    ).product
    tensors = load_file(next(Path(product).glob("*model.safetensors")))
    norms = {
        name: tensor
        for name, tensor in tensors.items()
        if name.endswith(("layers.3.input_layernorm.weight", "model.norm.weight"))
    }
    assert len(norms) == 2
    assert all(tensor.dtype == torch.float32 and bool((tensor != 1).any()) for tensor in norms.values())


def test_a_resumed_adapter_is_the_same(tmp_path: Path) -> None:
    """Compare it bit by bit, with dropout, whose random numbers go on too."""
    before, paths = torch.get_num_threads(), texts(tmp_path)
    torch.set_num_threads(1)
    own = {"steps": 4, "save_every": 2, "lr": 1e-2, **LORA, "dropout": 0.3}
    expected = load_file(Path(train(tmp_path / "run", paths, **own).product) / WEIGHTS)
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    found = load_file(Path(train(tmp_path / "run", paths, resume=True, **own).product) / WEIGHTS)
    torch.set_num_threads(before)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert any(float(tensor.abs().max()) > 0 for name, tensor in expected.items() if "lora_B" in name)


def test_one_option_loads_it_and_the_bank_of_the_plain_model_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Test that the model is used as it was trained, and that `bank show` tells what a bank is of."""
    own = {"chunk": 4, "window": 12, "embed": "lexical", "strict": True}
    name, text, target = bank(), tokens(40)[0].tolist(), tmp_path / "memory"
    with kvbank.connect(target) as client:
        plain: dict[str, Any] = {"mode": "memlong", "memory_layers": [1], "retrieval_layers": [1, 3]}
        with MemoryModel.from_pretrained(base, memory=client, bank=name, attach_options=plain, **own) as model:
            model.read(text)
            before, parts = model.attachment.reader.digest, model.attachment.reader.parts
        with pytest.raises(BankMismatch, match=r"was written by another model .*; adapter differ"):
            MemoryModel.from_pretrained(base, memory=client, bank=name, adapter=adapter, embed="lexical")
        with MemoryModel.from_pretrained(base, memory=client, bank="its own", adapter=adapter) as model:
            assert model.memory.embedder.digest == embedder("lexical:d=256").digest
            plan, reader = model.attachment.plan, model.attachment.reader
            assert (plan.mode, plan.positions) == ("memlong", "near:32")
            assert (plan.memory_layers, plan.retrieval_layers) == ((1,), (1, 3))
            assert (model.chunk, model.window, model.memory.recent, model.memory.query_tokens) == (4, 12, 1, 12)
            assert reader.digest != before
            assert {part for part in parts if parts[part] != reader.parts[part]} == {"adapter"}
            assert {layer: gate.shape for layer, gate in model.attachment.gates.items()} == {1: (4,), 3: (4,)}
            model.read(text)
            assert torch.isfinite(model.losses(text, memory=model.memory).nll).all()
            assert len(model.generate(text, max_new_tokens=3)) > 0
    ended = command.run(command.application(), "bank", "show", "its own", "--memory", target)
    assert ended.exit_code == 0, ended.output
    shown = ended.stdout.split()
    assert reader.digest in shown
    assert shown[shown.index("adapter") + 1] == reader.parts["adapter"] != "none"


def test_the_model_that_was_trained_is_the_one_that_is_loaded(base: Path, adapter: Path) -> None:
    """Loaded twice, it is one reader; the weights below the adapter are those of the base."""
    loaded, plain = (load_model(base, adapter=each)[0] for each in (adapter, None))
    again = load_model(base, adapter=adapter)[0]
    assert reader_of(loaded).digest == reader_of(again).digest != reader_of(plain).digest
    assert reader_of(loaded).parts["weights"] == reader_of(plain).parts["weights"]
    ids = tokens(8)
    with torch.no_grad():
        assert not torch.allclose(loaded(ids).logits, plain(ids).logits, atol=1e-3)
        assert torch.equal(loaded(ids).logits, again(ids).logits)


def test_gates_that_do_not_fit_the_model_are_one_line() -> None:
    net, half = build("llama_gqa"), [0.5] * 4
    for gates in (
        {"1": half[1:]},
        {"9": half},
        {"x": half},
        {"1": [2.0] * 4},
        {"1": [float("nan")] * 4},
        [half],
        {"1": 3},
    ):
        net.config.kvbank = {"mode": "memlong", "gates": gates}
        with pytest.raises(InputError, match="are not 4 numbers between 0 and 1 for each of some layers"):
            attach(net)
    net.config.kvbank = {"mode": "memlong", "gates": {"1": half}}
    attachment = attach(net)
    assert attachment.gates[1].tolist() == half
    attachment.detach()


def test_an_adapter_that_is_none_or_another_models_is_one_line(base: Path, adapter: Path, tmp_path: Path) -> None:
    other, damaged, late, empty, anyones = (
        tmp_path / name for name in ("other", "damaged", "late", "empty", "anyones")
    )
    build("llama_gqa", seed=1).save_pretrained(other)
    tokenizer().save_pretrained(other)
    empty.mkdir()
    for folder in (damaged, late, anyones):
        shutil.copytree(adapter, folder)
    (damaged / WEIGHTS).write_bytes(b"no weights")
    (late / ENTRY).write_text((late / ENTRY).read_text().replace('"version": 1', '"version": 2'))
    entry = json.loads((anyones / ENTRY).read_text())
    (anyones / ENTRY).write_text(json.dumps({**entry, "base_parts": {}}))
    for model, given, said, kind in (
        (other, adapter, "was trained on another model .*: weights differ", InputError),
        (base, damaged, "is damaged", InputError),
        (base, late, "version", InputError),
        (base, anyones, "weights, rope differ", InputError),
        (base, empty, "is no adapter of kvbank train memlong: it has no adapter_config.json", ModelNotFound),
        (base, tmp_path / "missing", "there is no adapter folder", ModelNotFound),
    ):
        with pytest.raises(kind, match=said) as raised:
            load_model(model, adapter=given)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "words", rotated(["layers", "eval ppl", "eval compression", "eval passkey", "eval decoding", "eval facts"], 0)
)
def test_commands_that_measure_a_model_take_it(base: Path, words: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    ended = command.run(command.application(), *words.split(), "--model", base, "--adapter", missing)
    assert (ended.exit_code, ended.stderr) == (1, f"kvbank: there is no adapter folder '{missing}'\n")


def test_layers_are_measured_with_it(base: Path, adapter: Path) -> None:
    measure = ("layers", "--model", base, "--span", 16, "--trials", 1, "--json")
    ended = [command.run(command.application(), *measure, *more) for more in ((), ("--adapter", adapter))]
    plain, adapted = (json.loads(each.stdout)["loss_without_memory"] for each in ended)
    assert plain != adapted


def test_a_chat_session_goes_on_with_its_adapter_and_refuses_another_one(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    def chat(*more: object, typed: str = "") -> command.Ended:
        own = ("--memory", tmp_path / "memory", "--max-new-tokens", 1)
        return command.run(command.application(), "chat", *own, *more, stdin=f"w3 w4\n{typed}")

    begun = chat("--model", base, "--adapter", adapter)
    assert begun.exit_code == 0, begun.stderr
    again = chat(typed="/fork new\n")
    assert again.exit_code == 0, again.stderr
    other = Path(train(tmp_path / "run", texts(tmp_path), steps=1, lr=1e-2, save_every=1, **LORA).product)
    refused = chat("--adapter", other)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert f"was begun with model {base} and adapter {adapter} (" in refused.stderr
    assert f"this one is with adapter {other} (" in refused.stderr
    plain = ("-s", "plain", "--window", 64, "--top-k", 1)  # the base, which was made for no memory, has long chunks
    assert chat(*plain, "--model", base).exit_code == 0
    refused = chat(*plain, "--adapter", adapter)
    assert f"was begun with model {base} and no adapter (" in refused.stderr
    assert chat("-s", "new").exit_code == 0
    with kvbank.connect(tmp_path / "memory") as client:
        assert client.sessions.get(name="new").settings["adapter"] == str(adapter)
