"""K-V of the memory rows: a model goes on from them as if it had read the context."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from model_worker.errors import InputError
from model_worker.icae import Icae, IcaeConfig, Slots, combine, continue_, restore
from model_worker.icae.decode import logits
from model_worker.icae.layout import answer_row, continue_row, restore_row
from tests.support.diagonal import diagonal
from tests.worker.icae.adapters import CLOSE, KV, SPREAD, made, peft_encoder, span_embeds, text, worst
from tests.worker.tiny import FAMILIES, build

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize(("family", "config"), diagonal(FAMILIES, {"contiguous": KV, "spread": SPREAD}, every=2))
@torch.no_grad()
def test_kv_of_the_memory_rows(family: str, config: IcaeConfig, tmp_path: Path) -> None:
    """Slots are what the peft model's cache holds at the memory rows, keys before RoPE; the frozen base goes on from
    them."""
    base = build(family)
    icae, ids = made(base, config), text(11)
    (slots,) = icae.encode([ids])
    assert slots.soft is None
    assert slots.layers is not None
    after = [1, 4, 6, 9] if config is SPREAD else [11, 12, 13, 14]
    cache = DynamicCache()
    peft_encoder(icae, tmp_path)(
        inputs_embeds=span_embeds(icae, ids),
        position_ids=torch.tensor([[*range(11), *after]]),
        attention_mask=torch.ones(1, 15, dtype=torch.long),
        past_key_values=cache,
    )
    assert len(slots.layers) == len(cache.layers)
    for index, layer in enumerate(cache.layers):
        keys, values = slots.layers[index]
        rotated = icae.reader.ropes[index].rotate(keys[None], torch.tensor([after]))
        assert worst(rotated, layer.keys[:, :, -4:]) <= CLOSE
        assert worst(values[None], layer.values[:, :, -4:]) <= CLOSE
    row = restore_row(icae, slots, text(6))
    assert row.start == (11 if config is SPREAD else 4)
    (own,) = logits(icae, [row])
    assert worst(own, going_on(icae, base, slots, row.embeds, row.start)) <= CLOSE


def going_on(icae: Icae, base: Any, slots: Slots, embeds: Tensor, start: int) -> Tensor:
    """Logits of the plain base, with the slots' K-V at their positions in its cache."""
    cache = DynamicCache()
    assert slots.layers is not None
    for index, (keys, values) in slots.layers.items():
        cache.update(icae.reader.ropes[index].rotate(keys[None], slots.positions[None]), values[None], index)
    return base(  # type: ignore[no-any-return]
        inputs_embeds=embeds[None],
        position_ids=torch.arange(start, start + len(embeds))[None],
        attention_mask=torch.ones(1, len(slots) + len(embeds), dtype=torch.long),
        past_key_values=cache,
    ).logits[0]


@torch.no_grad()
def test_several_contexts_of_kv() -> None:
    """Contexts stand one behind the other; the text goes on behind the last."""
    base = build("llama_gqa")
    icae = made(base, SPREAD)
    both = combine(icae.encode([text(11), text(9, 2)]))
    assert both.positions.tolist() == [1, 4, 6, 9, 12, 14, 16, 18]
    row = answer_row(icae, both, text(3))
    assert row.start == 20
    (own,) = logits(icae, [row])
    assert worst(own, going_on(icae, base, both, row.embeds, 20)) <= CLOSE


def test_kv_has_nothing_to_start_from() -> None:
    icae = made(build("llama_gqa"), KV)
    (slots,) = icae.encode([text(5)])
    with pytest.raises(InputError, match="lm_row"):
        continue_(icae, slots)
    assert continue_row(icae, slots, [5, 6, 7], leave=0).labels.tolist() == [-100, 6, 7]  # nothing predicts the first
    with pytest.raises(InputError, match="interface"):
        restore(made(build("llama_gqa")), slots)
