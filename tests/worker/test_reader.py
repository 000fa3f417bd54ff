"""The reader of K-V is told by a digest of its values, and a model that changes after attach is noticed."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import kvbank
from model_worker.attaching import attach
from model_worker.attachment.digest import _sums, reader_of, state_token
from model_worker.errors import ReaderChanged, UnsupportedModel
from model_worker.remember.memory import Memory
from model_worker.window.cache import MemoryCache
from tests.worker import zoo
from tests.worker.tiny import bank, build, tokenizer, tokens

Models = Callable[[str], PreTrainedModel]

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_digest_is_by_value(model: Models, tmp_path: Path) -> None:
    """Readers are one and the same: a folder, a copy in memory, and bf16 values held as float32. Another weight is
    another reader."""
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


class Packed(nn.Module):
    """Weights as BitNet packs them, in a buffer."""

    def __init__(self, out: int, generator: torch.Generator):
        super().__init__()
        self.weight = nn.Buffer(torch.zeros(out // 4, 32, dtype=torch.uint8).random_(0, 256, generator=generator))
        self.weight_scale = nn.Buffer(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [(self.weight >> shift & 3).to(x.dtype) - 1 for shift in (0, 2, 4, 6)]
        return nn.functional.linear(x, torch.cat(rows) / self.weight_scale)


def packed(seed: int) -> PreTrainedModel:
    net, generator = build("llama_mha"), torch.Generator().manual_seed(seed)
    for layer in net.base_model.layers:
        layer.self_attn.k_proj = Packed(32, generator)
    return net


def test_packed_weights_are_weights() -> None:
    own, other = reader_of(packed(0)), reader_of(packed(1))
    assert own == reader_of(packed(0))
    assert own.digest != other.digest
    attach(packed(0)).detach()


def dynamically_quantised(factor: float) -> nn.Module:
    net = build("llama_gqa")
    with torch.no_grad():
        net.base_model.layers[1].self_attn.k_proj.weight.mul_(factor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in this torch, and found in the wild
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def test_weights_that_only_the_state_dict_shows() -> None:
    own, other = reader_of(dynamically_quantised(1.0)), reader_of(dynamically_quantised(0.7))
    assert own == reader_of(dynamically_quantised(1.0))
    assert own.digest != other.digest


def test_integers_count_to_their_last_bit() -> None:
    def coded(last: int) -> nn.Module:
        net = build("llama_gqa")
        net.base_model.layers[0].register_parameter(
            "codes", nn.Parameter(torch.tensor([2**30, 2**30 + last], dtype=torch.int32), requires_grad=False)
        )
        return net

    assert reader_of(coded(0)).digest != reader_of(coded(1)).digest


def shift_router(net: PreTrainedModel) -> None:
    net.base_model.layers[1].mlp.gate.e_score_correction_bias[0] += 0.5


def turn_slower(net: PreTrainedModel) -> None:
    net.base_model.rotary_emb.inv_freq *= 0.5


def scale_embedding(net: PreTrainedModel) -> None:
    net.base_model.embed_tokens.embed_scale *= 2


def change_activation(net: PreTrainedModel) -> None:
    net.base_model.layers[0].mlp.act_fn = nn.ReLU()


def drop_norm(net: PreTrainedModel) -> None:
    net.base_model.norm = nn.Identity()


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("glm4_moe", shift_router),
        ("llama", turn_slower),
        ("gemma3_text", scale_embedding),
        ("qwen3", change_activation),
        ("llama", drop_norm),
    ],
)
def test_all_that_a_forward_reads_counts(family: str, change: Callable[[PreTrainedModel], None]) -> None:
    """Buffers that are saved, those that are not, and modules: each makes another function, so another reader."""
    net, ids = zoo.build(family), tokens(12)
    own, logits = reader_of(net), net(ids).logits
    assert reader_of(zoo.build(family)) == own
    change(net)
    assert not torch.equal(net(ids).logits, logits)
    assert reader_of(net).digest != own.digest


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "gpt_oss"])
def test_what_follows_from_the_configuration_adds_nothing(family: str) -> None:
    """Banks that were written before buffers counted keep their reader."""
    assert set(reader_of(zoo.build(family)).parts) == {"architecture", "weights", "rope", "tokenizer", "adapter"}


def test_a_rotation_that_follows_the_length_is_one_reader() -> None:
    """Frequencies of the moment are left in a buffer by whatever was read last."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    net = zoo.build("llama", rope_parameters=rope, max_position_embeddings=16)
    own, state = reader_of(net), state_token(net)
    net(tokens(30))
    assert reader_of(net) == own
    assert state_token(net) == state


@pytest.mark.parametrize("hold", [lambda x: x, lambda x: [x], lambda x: {"a": (x,)}])
def test_hidden_weights_are_refused_by_name(hold: Callable[[torch.Tensor], Any]) -> None:
    net = build("llama_gqa")
    net.base_model.layers[2].mlp.secret = hold(torch.ones(3))
    with pytest.raises(UnsupportedModel, match=r"layers\.2\.mlp\.secret is a tensor"):
        attach(net)
    net.base_model.layers[2].mlp.secret = hold(net.base_model.layers[2].mlp.up_proj.weight[:1])  # a view of a weight
    attach(net).detach()


def test_offloaded_weights_are_refused_by_name() -> None:
    net = build("llama_gqa")
    net.base_model.layers[2].to("meta")
    with pytest.raises(UnsupportedModel, match=r"layers\.2\.\S+ is not in memory"):
        reader_of(net)


def test_a_trained_copy_of_a_module_is_the_adapters() -> None:
    """peft keeps the model's own module beside the copy that it trains, and chooses."""
    plain = reader_of(build("llama_gqa"))
    net = get_peft_model(build("llama_gqa"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    with torch.no_grad():
        net.get_base_model().base_model.norm.modules_to_save["default"].weight += 0.5
    own, token = reader_of(net), state_token(net)
    assert {part for part in plain.parts if plain.parts[part] != own.parts[part]} == {"adapter"}
    with net.disable_adapter():
        assert state_token(net) != token
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


def write_past_torch(net: nn.Module) -> None:
    next(net.parameters()).data.mul_(1.5)


def replace_data(net: nn.Module) -> None:
    parameter = next(net.parameters())
    parameter.data = parameter.data * 1.5


def replace_module(net: Any) -> None:
    layers = net.get_base_model().base_model.layers
    layers[0].mlp.act_fn = nn.ReLU()


def cast(net: nn.Module) -> None:
    net.to(torch.bfloat16)


def turn_otherwise(net: Any) -> None:
    net.get_base_model().base_model.rotary_emb.inv_freq.data.mul_(0.5)


CHANGES = [
    *(switch, disable, scale, merge, write_weights, write_adapter, load_weights),
    *(write_past_torch, replace_data, replace_module, cast, turn_otherwise),
]


@pytest.fixture
def memory(client: kvbank.Client) -> Iterator[Memory]:
    net = lora(build("llama_gqa"))
    attachment = attach(net, tokenizer())
    memory = Memory(attachment, client, bank(), tokenizer(), chunk=4)
    memory.open()
    yield memory
    attachment.detach()


@pytest.mark.parametrize("change", CHANGES)
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


def test_rows_with_adapters_of_their_own_are_refused(memory: Memory) -> None:
    net, ids = memory.attachment.model, tokens(8)
    for length in (4, 1):
        cache = MemoryCache(memory.attachment, memory, window=4)
        with torch.no_grad(), pytest.raises(ReaderChanged, match="adapter_names"):
            net(input_ids=ids[:, :length], past_key_values=cache, adapter_names=["second"])
    with torch.no_grad():
        net(input_ids=ids, adapter_names=["second"])  # without a memory it is nobody's business
    assert memory.stats.written == 0


def test_change_and_back_is_no_change(memory: Memory) -> None:
    net = memory.attachment.model
    switch(net)
    with pytest.raises(ReaderChanged, match=r"\(adapter\)"):
        memory.recall([[5, 6]])
    net.set_adapter("first")
    assert memory.recall([[5, 6]]) == [[]]


def test_one_value_that_changes_is_noticed_at_the_write(memory: Memory) -> None:
    """Samples of a tensor may not hold the value; nothing is written under the digest of the model before."""
    net, ids = memory.attachment.model, tokens(8)
    with torch.no_grad():
        cache = MemoryCache(memory.attachment, memory, window=8)
        net.get_base_model().base_model.layers[1].mlp.up_proj.weight.data[7, 5] += 0.01
        net(input_ids=ids, past_key_values=cache)
        with pytest.raises(ReaderChanged, match=r"\(weights\)"):
            cache.flush()
    assert memory.stats.written == 0


def test_a_change_for_one_forward_is_noticed_in_it(memory: Memory) -> None:
    """Undone before the chunk is written, it would leave K-V of another model under the digest."""
    net, ids = memory.attachment.model, tokens(4)
    cache = MemoryCache(memory.attachment, memory, window=4)
    with torch.no_grad(), net.disable_adapter(), pytest.raises(ReaderChanged, match=r"\(adapter\)"):
        net(input_ids=ids, past_key_values=cache)
    with torch.no_grad():
        net(input_ids=ids, past_key_values=cache)


def test_the_same_values_elsewhere_are_the_same_reader(memory: Memory) -> None:
    net = memory.attachment.model
    for parameter in net.parameters():
        parameter.data = parameter.data.clone()
    assert memory.recall([[5, 6]]) == [[]]


def test_sums_show_one_value_and_its_place() -> None:
    """Sums stand for the bytes of weights on an accelerator."""
    weights = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    flat = weights.reshape(-1).view(torch.uint8)
    own = bytes(_sums(flat))
    for change in (lambda x: x[2, 4999].add_(1), lambda x: x[0, 1].mul_(1.01), lambda x: x.copy_(x.flip(0))):
        other = weights.clone()
        change(other)
        assert bytes(_sums(other.reshape(-1).view(torch.uint8))) != own
    assert bytes(_sums(weights.clone().reshape(-1).view(torch.uint8))) == own
