"""Adapters that do something, and the plain models that they are compared with."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model_worker.icae import Icae, IcaeConfig, Slots
from tests.worker.tiny import VOCABULARY, tokens
from tests.worker.tiny import worst as worst_of

SOFT, KV = IcaeConfig(4, 3), IcaeConfig(4, 3, interface="kv")


SPREAD = IcaeConfig(4, 3, interface="kv", positions="spread")


FORMS = {"soft": SOFT, "kv": KV, "spread": SPREAD}
EVERY_FORM = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS)


CLOSE = 2e-4  # of values that are around 1


def made(base: Any, config: IcaeConfig = SOFT, **options: Any) -> Icae:
    """Make an adapter that does something: a new LoRA is zero."""
    options.setdefault(
        "targets", ("query_key_value",) if base.config.model_type == "gpt_neox" else ("q_proj", "v_proj")
    )
    icae = Icae.create(base, config, rank=4, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in icae.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return icae


def small(**options: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_hidden_layers": 2, **options}))


def worst(a: Tensor, b: Tensor) -> float:
    return worst_of(a.detach(), b.detach())


def text(count: int, seed: int = 1) -> list[int]:
    return tokens(count, seed)[0].tolist()


def peft_encoder(icae: Icae, folder: Path) -> Any:
    """Load the same LoRA as peft does, on a copy of the base."""
    icae.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(icae.base_model), str(folder)).eval()


def span_embeds(icae: Icae, ids: Sequence[int]) -> Tensor:
    table = icae.base_model.get_input_embeddings()
    return torch.cat([table(torch.tensor(ids)), icae.memory[: icae.config.slots].detach()])[None]


def gradients(icae: Icae, total: Tensor) -> dict[str, Tensor]:
    icae.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in icae.named_parameters() if p.grad is not None}


def same(a: Slots, b: Slots, bound: float = CLOSE) -> None:
    if a.soft is not None:
        assert b.soft is not None
        assert worst(a.soft, b.soft) <= bound
        return
    assert a.layers is not None
    assert b.layers is not None
    assert list(a.layers) == list(b.layers)
    for layer in a.layers:
        assert all(worst(x, y) <= bound for x, y in zip(a.layers[layer], b.layers[layer], strict=True))
