"""Tiny random models with sharp attention, a tokenizer, and a memory in a list."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk

VOCABULARY, SLIDING = 97, 16
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama_mha": LlamaConfig,
    "llama_gqa": lambda **sizes: LlamaConfig(**sizes, num_key_value_heads=2),
    "llama_yarn": lambda **sizes: LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        rope_parameters={  # cosines and sines carry a scale
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": lambda **sizes: MistralConfig(**sizes, num_key_value_heads=2, sliding_window=None),
    "mistral_sliding": lambda **sizes: MistralConfig(**sizes, num_key_value_heads=2, sliding_window=SLIDING),
    "qwen2": lambda **sizes: Qwen2Config(**sizes, num_key_value_heads=2),
    "qwen3": lambda **sizes: Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8),
    "gemma": lambda **sizes: GemmaConfig(**sizes, num_key_value_heads=1, head_dim=8),
    "gpt_neox": GPTNeoXConfig,
}
FAMILIES = sorted(CONFIGS)
BACKENDS = ("sdpa", "eager")


def build(name: str, seed: int = 0, positions: int = 256) -> PreTrainedModel:
    """Make a model with the same weights for the same seed, in every process."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**_SIZES, max_position_embeddings=positions))
    sharpen(model, seed)
    return model.eval()


def sharpen(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.1 * noise)


def tokens(count: int, seed: int = 1, rows: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one word a token: w3 is 3."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@contextmanager
def attached(model: PreTrainedModel, backend: str = "sdpa", **options: Any) -> Iterator[Attachment]:
    """`attach` with another attention backend, undone at the end."""
    model.set_attn_implementation(backend)
    attachment = attach(model, **options)
    try:
        yield attachment
    finally:
        attachment.detach()
        with suppress(ValueError):  # a model that has eager attention only
            model.set_attn_implementation("sdpa")


def bank() -> str:
    return f"bank-{uuid.uuid4().hex[:12]}"


class ListMemory:
    """Remembers everything that leaves the window, and recalls all of it, or nothing."""

    query, query_tokens, recent = "with_input", 8, 0

    def __init__(self, chunk: int, *, recalls: bool = True, queries: bool = False, cadence: int | None = None):
        self.chunk, self.recalls, self.needs_queries, self.cadence = chunk, recalls, queries, cadence or chunk
        self.rows: list[list[Captured]] = []
        self.asked: list[list[list[int]]] = []

    def remember(self, rows: Sequence[Captured | None]) -> None:
        self.rows = self.rows or [[] for _ in rows]
        for row, captured in zip(self.rows, rows, strict=True):
            if captured is not None:
                row.append(captured)

    def recall(self, rows: Sequence[Sequence[int]], without: object = None) -> list[list[RecalledChunk]] | None:
        self.asked.append([list(row) for row in rows])
        return [recalled(row) for row in self.rows or [[] for _ in rows]] if self.recalls else None


def recalled(row: Sequence[Captured]) -> list[RecalledChunk]:
    """Captured chunks as a memory without compression gives them back."""
    return [
        RecalledChunk(
            i, c.start, {n: (layer.keys, layer.values, torch.arange(len(c))) for n, layer in c.layers.items()}
        )
        for i, c in enumerate(row)
    ]


def worst(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; shapes must be equal."""
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().max())
