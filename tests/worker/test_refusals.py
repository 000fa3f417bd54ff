"""What cannot have a memory is refused with the reason, and left as it was."""

from collections.abc import Callable

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from model_worker.attaching import attach
from model_worker.errors import InputError, UnsupportedModel
from model_worker.window.cache import MemoryCache
from tests.worker.tiny import VOCABULARY, ListMemory, attached, build, sharpen, tokens

Models = Callable[[str], PreTrainedModel]

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "gpt2": (GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4), "no rotary positions"),
    "falcon": (FalconConfig(**SMALL), "does not"),
    "bloom": (BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), "does not"),
    "deepseek_v3": (
        DeepseekV3Config(
            **SMALL,
            intermediate_size=48,
            moe_intermediate_size=16,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "latent",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_models(family: str) -> None:
    config, reason = REFUSED[family]
    net = AutoModelForCausalLM.from_config(config).eval()
    sharpen(net, 0)
    backend = net.config._attn_implementation
    with torch.no_grad():
        before = net(tokens(6)).logits
        with pytest.raises(UnsupportedModel, match=reason):
            attach(net)
        assert net.config._attn_implementation == backend
        assert torch.equal(net(tokens(6)).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "memlog"}, "memlog"),
        ({"positions": "one"}, "one"),
        ({"mode": "memlong", "memory_layers": [0, 1]}, "one memory layer"),
        ({"memory_layers": [0], "retrieval_layers": [1]}, "the same"),
        ({"mode": "memlong", "memory_layers": [1], "retrieval_layers": [4]}, "layer 4 does not exist"),
        ({"memory_layers": [-1]}, "layer -1 does not exist"),
    ],
)
def test_options_that_make_no_sense(model: Models, options: dict[str, object], reason: str) -> None:
    net = model("llama_gqa")
    with pytest.raises(InputError, match=reason):
        attach(net, **options)
    assert net.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks so
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_with_a_prompt_are_refused(kind: type) -> None:
    net = get_peft_model(build("llama_gqa"), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModel, match="a prompt of its own"):
        attach(net)


def test_attached_twice(model: Models) -> None:
    net = model("llama_gqa")
    with attached(net), pytest.raises(InputError, match="attached already"):
        attach(net)


def test_what_a_cache_cannot_follow(model: Models) -> None:
    net, ids = model("llama_gqa"), tokens(6)
    with attached(net) as attachment, torch.no_grad():
        cache = MemoryCache(attachment)
        with pytest.raises(InputError, match="input_ids"):
            net(inputs_embeds=net.get_input_embeddings()(ids), past_key_values=cache)
        net(ids, past_key_values=cache)
        with pytest.raises(InputError, match="all 8 tokens"):
            net(ids[:, :2], attention_mask=torch.ones(1, 2, dtype=torch.long), past_key_values=cache)
        with pytest.raises(InputError, match="beam"):
            net.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=MemoryCache(attachment),
                num_beams=2,
                max_new_tokens=4,
            )


def test_hybrid_models_are_refused() -> None:
    config = Qwen3NextConfig(
        **SMALL,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    net = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match="not keys and values alone"):
        attach(net)


def test_a_cache_is_of_no_use_without_its_attachment(model: Models) -> None:
    """Caches without it would attend to nothing that was remembered, and that would not be noticed."""
    net, other, ids = model("llama_gqa"), build("llama_gqa"), tokens(6)
    with attached(net) as attachment, torch.no_grad():
        cache = MemoryCache(attachment, ListMemory(4), window=8)
        net(ids, past_key_values=cache)
        with attached(other), pytest.raises(InputError, match="another attachment"):
            other(ids, past_key_values=cache)
        with pytest.raises(InputError, match="without its memory"):
            other(ids, past_key_values=cache)
        net.set_attn_implementation("eager")
        with pytest.raises(InputError, match="after attach"):
            net(ids, past_key_values=cache)
    with torch.no_grad():
        for used in (cache, MemoryCache(attachment, window=8)):
            with pytest.raises(InputError, match="without its memory"):
                net(ids, past_key_values=used)
    assert cache.physical == 6


def test_detached_twice(model: Models) -> None:
    """Detaching a second time must not take the attention of another attachment made in between."""
    net = model("llama_gqa")
    first = attach(net)
    first.detach()
    with attached(net):
        first.detach()
        assert str(net.config._attn_implementation).startswith("kvbank_")
    assert net.config._attn_implementation == "sdpa"


def test_a_failed_forward_spoils_its_cache(model: Models) -> None:
    """Interrupted between two layers, ids and K-V no longer agree: nothing of it may be attended to or remembered."""
    net, ids = model("llama_gqa"), tokens(4)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with attached(net) as attachment, torch.no_grad():
        memory = ListMemory(4)
        cache = MemoryCache(attachment, memory, window=8)
        net(ids, past_key_values=cache)
        handle = net.base_model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            net(ids, past_key_values=cache)
        handle.remove()
        for use in (lambda: net(ids, past_key_values=cache), cache.flush):
            with pytest.raises(InputError, match="failed; start a new one"):
                use()
        assert memory.rows == []


def test_windows_that_make_no_sense(model: Models) -> None:
    with attached(model("llama_gqa")) as attachment:
        for window in (0, -1):
            with pytest.raises(InputError, match="smaller than a chunk"):
                MemoryCache(attachment, window=window)
