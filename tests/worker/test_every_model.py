"""No family of the installed transformers gets a wrong memory: each is exact, or refused with the reason."""

from pathlib import Path
from typing import Any

import pytest

from tests.worker import zoo
from tests.worker.exactness import Verdict, judge
from tests.worker.models_table import MARKS, table

FAMILIES = sorted(zoo.NAMES - zoo.UNBUILT.keys())
# Dynamic masks; sinks; norms and two rotations; sliding and full layers; partial rotary; a state beside attention.
SAMPLE = ("gpt_oss", "gemma3_text", "phi", "falcon_h1")

EXACT, REFUSED = True, False
_THETAS = [10000.0, 500.0, 10000.0, 500.0]
VARIANTS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "every head its own": ("llama", EXACT, {"num_key_value_heads": 4}),
    "one K-V head": ("llama", EXACT, {"num_key_value_heads": 1}),
    "wide heads": ("qwen3", EXACT, {"head_dim": 16}),
    "tied": ("llama", EXACT, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "linear": ("llama", EXACT, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3": (
        "llama",
        EXACT,
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
            }
        },
    ),
    "no sliding window": ("mistral", EXACT, {"sliding_window": None}),
    "upper layers sliding": (
        "qwen2",
        EXACT,
        {
            **{"use_sliding_window": True, "max_window_layers": 2},
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "all layers sliding": ("olmo3", EXACT, {"layer_types": ["sliding_attention"] * 4}),
    "no softcap": ("gemma2", EXACT, {"attn_logit_softcapping": None}),
    "all of the head rotated": ("gpt_neox", EXACT, {"rotary_pct": 1.0, "use_parallel_residual": False}),
    "half of the head rotated": ("phi", EXACT, {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "norms of queries and keys": ("cohere", EXACT, {"use_qk_norm": True}),
    "no norms": ("persimmon", EXACT, {"qk_layernorm": False}),
    "clipped": ("olmo", EXACT, {"clip_qkv": 0.2}),
    "sliding and full": ("smollm3", EXACT, {"use_sliding_window": True, "sliding_window": 16, "layer_types": zoo.BOTH}),
    "sinks and sliding": ("laguna", EXACT, {"layer_types": zoo.BOTH}),
    "another base for some layers": ("granite_swa", REFUSED, {"layer_rope_theta": _THETAS}),
    "convolutions": ("lfm2", REFUSED, {"layer_types": ["conv", "full_attention"] * 2}),
    "chosen blocks": ("minimax_m3_vl_text", REFUSED, {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2}),
}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    return {}


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in SAMPLE else pytest.mark.slow, id=f) for f in FAMILIES]
)
def test_every_family_is_exact_or_refused(family: str, verdicts: dict[str, Verdict]) -> None:
    verdicts[family] = judge(zoo.build(family))


@pytest.mark.slow
def test_the_table_is_up_to_date(verdicts: dict[str, Verdict]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "worker.md").read_text()
    judged = {family: verdicts.get(family) or judge(zoo.build(family)) for family in FAMILIES}
    assert text.split(MARKS[0])[1].split(MARKS[1])[0].strip() == table(judged), "python tests/worker/models_table.py"


@pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.slow, id=v) for v in VARIANTS])
def test_other_configurations_of_a_family(variant: str) -> None:
    family, exact, changes = VARIANTS[variant]
    assert bool(judge(zoo.build(family, **changes)).backends) == exact
