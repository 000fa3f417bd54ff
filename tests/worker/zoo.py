"""Every causal language model of the installed transformers, made tiny from its own configuration class.

`SIZES` shrinks what configurations have in common by the names of their fields; `SPECIAL` holds what one family needs
besides, with the reason. The weights are random and seeded, so that a family runs in a fraction of a second.
"""

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.worker.tiny import VOCABULARY, sharpen

SLIDING, LAYERS, TRAINED = 16, 4, 256
_NAMES = (
    (
        32,
        "hidden_size d_model n_embd dim emb_dim embedding_size embedding_dim word_embed_proj_dim hidden_size_global "
        "input_embedding_size embed_dim backbone_hidden_size lru_width output_embedding_size",
    ),
    (
        48,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_ff d_inner ffn_hidden_size dim_ff "
        "dense_intermediate_size intermediate_size_mlp feed_forward_size dff",
    ),
    (
        16,
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size q_lora_rank kv_lora_rank "
        "hidden_size_per_layer_input laurel_rank router_hidden_size hc_lowrank",
    ),
    (
        8,
        "head_dim dim_head kv_channels d_head linear_key_head_dim linear_value_head_dim linear_head_dim v_head_dim "
        "qk_nope_head_dim qk_rope_head_dim mamba_d_head mamba_head_dim index_head_dim swa_head_dim "
        "state_size mamba_d_state ssm_state_size chunk_size mamba_chunk_size d_kv d_rel",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads attention_heads num_hidden_layers n_layer n_layers "
        "num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers num_experts num_local_experts "
        "n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads rotary_dim index_n_heads index_topk "
        "swa_num_attention_heads depth mamba_n_heads mamba_num_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k moe_topk "
        "linear_num_key_heads swa_num_key_value_heads first_k_dense_replace",
    ),
    (
        1,
        "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups num_expert_group "
        "mamba_n_groups",
    ),
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab "
        "shape_vocab_size pronunciation_vocab_size ngram_vocab_size_base",
    ),
    (TRAINED, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length"),
    (SLIDING, "sliding_window attention_chunk_size local_attention sliding_window_size local_attention_window_len"),
)
SIZES = {name: size for size, names in _NAMES for name in names.split()}
# Fields whose default is None, with which some families cannot be built.
_FILL = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok")
# What the layers of a model are: every kind that the default has is there.
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

BOTH = ["sliding_attention", "full_attention"] * 2
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}  # four layers of the default are of one kind
_DECODER = {"is_decoder": True}  # built as an encoder otherwise, which sees what comes later
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}  # heads times their size are twice the hidden size
_GEMMA4_SHARED = {
    **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2},
    "layer_types": BOTH,
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "global_head_dim": 8, "vocab_size": VOCABULARY, "sliding_window": SLIDING},
}
_INDEXER = {
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8},
    "indexer_compress_ratio": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _MIXED,
    "kimi_linear": _MIXED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},  # no attention in four layers of the default
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},  # no attention without it
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "blenderbot": {"encoder_layers": LAYERS},  # the depth that transformers sees, other than the decoder's
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"qk_nope_head_dim": 8, "v_head_dim": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},  # others for some layers; 8 rotary, 8 not
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "musicgen_decoder": {"num_codebooks": 1},  # one row of tokens, as everywhere
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},  # read, and no fields of it
    "gemma4_unified_assistant": {"text_config": _GEMMA4_SHARED | {"model_type": "gemma4_unified_text"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},  # heads times their size are twice the hidden size
    "qwen4_exp_text": _INDEXER,
    "reformer": _DECODER | {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_n_groups": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": BOTH,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * 4,
    },  # the default shares more layers than there are
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},  # tables of thousands of glyphs
}


def shrunk(cls: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """Make a configuration of class `cls` with the sizes above, and `changes` and `SPECIAL` in place of them."""
    fields: dict[str, Any] = dict(_TOKENS)
    special = SPECIAL.get(cls.model_type, {}) | changes
    default = vars(cls(**{name: special[name] for name in ("text_config",) if name in special}))
    latent = "kv_lora_rank" in default
    for name, value in default.items():
        if name in getattr(cls, "sub_configs", {}) and isinstance(value, PreTrainedConfig) and name not in special:
            fields[name] = shrunk(type(value)).to_dict()
        elif name in SIZES and ((value is None and name in _FILL) or (type(value) is int and value > SIZES[name])):
            fields[name] = SIZES[name]
        elif name in _KINDS and value and isinstance(value[0], str):
            kinds = list(dict.fromkeys(value))
            fields[name] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    if latent and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = SIZES["num_attention_heads"]
    return cls(**fields | special)


# What cannot be made here, and why.
UNBUILT = {
    "gemma3n": "its vision tower needs timm, which is not installed; gemma3n_text is its language model",
    "gemma4_assistant": "this transformers refuses to build it: all its layers must share K-V, and one must not",
}
# By name, because their configurations take seconds to import; gpt-sw3 is another name of gpt2.
NAMES = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {"gpt-sw3"}
# Composite configurations whose causal model is made from the part that describes it.
_PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Make the causal language model of this family, tiny, with the same weights for the same seed."""
    cls = CONFIG_MAPPING[family]
    config = shrunk(cls, **changes)
    torch.manual_seed(seed)
    if family in _PART:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[cls]._from_config(getattr(config, _PART[family]))
    else:
        model = AutoModelForCausalLM.from_config(config)
    sharpen(model, seed)
    return model.eval()
