"""What cannot have a memory is refused with the reason, and left as it was."""

from collections.abc import Callable

import pytest
import torch
from tiny import VOCABULARY, attached, sharpen, tokens
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from model_worker.attach import attach
from model_worker.cache import MemoryCache
from model_worker.errors import InputError, UnsupportedModel

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
