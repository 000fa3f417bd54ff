"""Who reads: the digest by value, and a model that changes after attach is noticed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import bank, build, tokenizer, tokens
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvbank
from model_worker.attachment import attach
from model_worker.cache import MemoryCache
from model_worker.digest import reader_of
from model_worker.errors import ReaderChanged
from model_worker.memory import Memory

Models = Callable[[str], PreTrainedModel]

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_digest_is_by_value(model: Models, tmp_path: Path) -> None:
    """A folder, a copy in memory, and bf16 values held as float32 are one reader; another weight is another."""
    net = model("llama_gqa")
    own = reader_of(net)
    net.save_pretrained(tmp_path)
    assert reader_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == own
    assert reader_of(build("llama_gqa")) == own
    half = build("llama_gqa").to(torch.bfloat16)
    assert reader_of(half).digest == reader_of(build("llama_gqa").to(torch.bfloat16).float()).digest != own.digest
    other = reader_of(build("llama_gqa", seed=1))
    assert {part for part in own.parts if own.parts[part] != other.parts[part]} == {"weights"}
    longer = reader_of(build("llama_gqa", positions=512))
    assert {part for part in own.parts if own.parts[part] != longer.parts[part]} == {"architecture"}
    with_words = reader_of(net, tokenizer())
    assert with_words.parts["tokenizer"] != own.parts["tokenizer"]
    assert reader_of(net, tokenizer()) == with_words


def test_digest_is_of_what_is_computed(model: Models) -> None:
    """Same weights, another function: another reader. Pads, and how a tokenizer was called last, are no matter."""
    net, words = model("llama_gqa"), tokenizer()
    own = reader_of(net, words)
    for name, other in {"hidden_act": "gelu", "layer_types": ["sliding_attention"] * 4}.items():
        changed = build("llama_gqa")
        setattr(changed.config, name, other)
        assert reader_of(changed).parts["architecture"] != own.parts["architecture"]
    padded = build("llama_gqa")
    padded.config.pad_token_id, padded.config.output_hidden_states = 1, True
    words(["w3", "w4 w5"], padding=True, truncation=True, max_length=4)
    assert reader_of(padded, words) == own


def lora(net: PreTrainedModel) -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = get_peft_model(net, config, adapter_name="first")
    wrapped.add_adapter("second", config)
    return wrapped.eval()


def test_digest_knows_the_adapter() -> None:
    plain = reader_of(build("llama_gqa"))
    net = lora(build("llama_gqa"))
    first = reader_of(net)
    assert {part for part in plain.parts if plain.parts[part] != first.parts[part]} == {"adapter"}
    net.set_adapter("second")
    assert reader_of(net).digest not in (first.digest, plain.digest)
    net.set_adapter("first")
    assert reader_of(net).digest == first.digest
    with net.disable_adapter():
        assert reader_of(net).digest == plain.digest


def switch(net: Any) -> None:
    net.set_adapter("second")


def disable(net: Any) -> None:
    net.base_model.disable_adapter_layers()


def scale(net: Any) -> None:
    for module in net.modules():
        if hasattr(module, "base_layer"):
            module.scale_layer(2.0)


def merge(net: Any) -> None:
    net.merge_adapter()


def write_weights(net: nn.Module) -> None:
    with torch.no_grad():
        next(net.parameters()).add_(1)


def write_adapter(net: nn.Module) -> None:
    with torch.no_grad():
        next(p for name, p in net.named_parameters() if "lora_B.first" in name).add_(1)


def load_weights(net: nn.Module) -> None:
    changed = {name: tensor + 0.5 for name, tensor in net.state_dict().items()}
    net.load_state_dict(changed)


@pytest.fixture
def memory(client: kvbank.Client) -> Iterator[Memory]:
    net = lora(build("llama_gqa"))
    attachment = attach(net, tokenizer())
    memory = Memory(attachment, client, bank(), tokenizer(), chunk=4)
    memory.open()
    yield memory
    attachment.detach()


@pytest.mark.parametrize("change", [switch, disable, scale, merge, write_weights, write_adapter, load_weights])
def test_change_after_attach_is_noticed(memory: Memory, change: Callable[[Any], None]) -> None:
    net = memory.attachment.model
    ids = tokens(8)
    with torch.no_grad():
        cache = MemoryCache(memory.attachment, memory, window=4)
        for part in ids.split(4, 1):
            net(input_ids=part, past_key_values=cache)
        change(net)
        with pytest.raises(ReaderChanged, match="attach again"):
            net(input_ids=ids[:, :4], past_key_values=cache)
        with pytest.raises(ReaderChanged):
            memory.recall([[5, 6]])
        with pytest.raises(ReaderChanged):
            cache.flush()
    assert memory.stats.written == 1


def test_change_and_back_is_no_change(memory: Memory) -> None:
    net = memory.attachment.model
    switch(net)
    with pytest.raises(ReaderChanged, match=r"\(adapter\)"):
        memory.recall([[5, 6]])
    net.set_adapter("first")
    assert memory.recall([[5, 6]]) == [[]]
