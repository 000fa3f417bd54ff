"""Tiny models, samples and settings for runs of ICAE's training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model_worker.icae import Icae, IcaeConfig
from model_worker.icae.data import (
    Sample,
    continuation,
    instruction,
    restoration,
)
from model_worker.train.run_log import LOG

VOCABULARY, BOS, EOS = 61, 7, 9  # not 1 and 2, which the authors' code has for all models


def base_model(**more: Any) -> LlamaForCausalLM:
    """Make a model with the same weights each time, large enough that attention is not flat."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "bos_token_id": BOS, "eos_token_id": EOS, **more}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else 1 + 0.1 * noise)
    return model.eval()


def adapter(config: IcaeConfig | None = None, *, dropout: float = 0.0, moved: bool = True, **more: Any) -> Icae:
    """Make an adapter on a model of its own. moved: LoRA is away from its start, where it does nothing."""
    made = Icae.create(
        base_model(**more), config or IcaeConfig(slots=4), rank=4, dropout=dropout, targets="all-linear", seed=3
    )
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in made.encoder.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made


def words(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, VOCABULARY, count).tolist()


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer in which w12 is 12; with special tokens on it would put 1 in front, on which our code must not
    rely."""
    known = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", pad_token="<pad>")


def mixed() -> list[Sample]:
    """Make samples of all objectives, of different lengths, with one to three spans."""
    return [
        restoration(words(16, 1), EOS),
        restoration(words(3, 2), EOS),
        continuation(words(33, 3), words(20, 4), leave=8),
        instruction(words(17, 5), words(4, 6), words(5, 7), EOS),
        continuation(words(5, 8), words(11, 9), leave=2),
    ]


def logged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def weights(icae: Icae) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in icae.named_parameters() if p.requires_grad}


def nats_by_hand(icae: Icae, sample: Sample) -> torch.Tensor:
    """Compute the loss from the plain base: embeddings put together as the paper says, shifted cross entropy, interface
    soft."""
    base, config = icae.base_model, icae.config
    slots = icae.encode([sample.context])[0].soft
    before = list(config.prefix_ids) if sample.objective == "ft" else []
    row = {"ae": icae.row("ae")[None], "ft": icae.row("ft")[None]}.get(sample.objective)
    asked = [*sample.prompt, *(config.suffix_ids if sample.objective == "ft" else ())]
    after = [*asked, *sample.target]
    parts = [icae.embed(before), slots, row, icae.embed(after)]
    embeds = torch.cat([part for part in parts if part is not None])
    logits = base(inputs_embeds=embeds[None]).logits[0]
    scored = len(sample.target) - sample.leave
    return functional.cross_entropy(logits[-scored - 1 : -1], torch.tensor(after[-scored:]), reduction="sum")
