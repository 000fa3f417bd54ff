"""The encoder of ICAE: slots are the hidden states that plain peft gives, alone and in batches."""

import itertools
from pathlib import Path

import pytest
import torch

from model_worker.icae import IcaeConfig, combine, loss
from model_worker.icae.decode import losses
from model_worker.icae.layout import continue_row, restore_row
from tests.support.diagonal import diagonal, rotated
from tests.worker.icae.adapters import (
    CLOSE,
    EVERY_FORM,
    FORMS,
    gradients,
    made,
    peft_encoder,
    same,
    span_embeds,
    text,
    worst,
)
from tests.worker.tiny import FAMILIES, build

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("family", rotated(FAMILIES, 1))
@torch.no_grad()
def test_slots_are_the_last_hidden_states_of_the_peft_model(family: str, tmp_path: Path) -> None:
    """Slots are taken after the final norm, at the memory rows, with LoRA on and positions from 0, and the folder is
    peft's own."""
    icae, ids = made(build(family)), text(11)
    reference = peft_encoder(icae, tmp_path)
    own = reference(inputs_embeds=span_embeds(icae, ids), output_hidden_states=True).hidden_states[-1][0, -4:]
    (slots,) = icae.encode([ids])
    assert slots.soft is not None
    assert worst(slots.soft, own) <= CLOSE
    with reference.disable_adapter():
        plain = reference(inputs_embeds=span_embeds(icae, ids), output_hidden_states=True).hidden_states[-1][0, -4:]
    assert worst(plain, own) > 100 * CLOSE  # LoRA matters here
    assert slots.lengths == (11,)
    assert slots.positions.tolist() == [0, 1, 2, 3]


def test_equal_spans() -> None:
    icae = made(build("llama_gqa"))
    assert [icae.spans(13)[i] for i in (0, 1)] == [slice(0, 7), slice(7, 13)]  # capacity + 1: two halves
    for n in range(1, 200):
        cuts = icae.spans(n)
        lengths = [cut.stop - cut.start for cut in cuts]
        assert len(cuts) == -(-n // 12)
        assert sum(lengths) == n
        assert cuts[0].start == 0
        assert all(a.stop == b.start for a, b in itertools.pairwise(cuts))
        assert 0 < lengths[-1] <= lengths[0] <= 12
        assert set(lengths[:-1]) <= {lengths[0]}


@EVERY_FORM
@torch.no_grad()
def test_each_span_is_alone(config: IcaeConfig) -> None:
    """Spans of a long context are encoded apart and put in order; spread positions count through the source."""
    icae, ids = made(build("llama_gqa"), config), text(29)
    (whole,) = icae.encode([ids])
    parts = icae.encode([ids[:10], ids[10:20], ids[20:]])
    assert whole.lengths == (10, 10, 9)
    same(whole, combine(parts))
    places = list(range(12)) if config.positions == "contiguous" else [1, 3, 6, 8, 11, 13, 16, 18, 21, 23, 25, 27]
    assert whole.positions.tolist() == combine(parts).positions.tolist() == places
    assert whole.next_position == (12 if config.positions == "contiguous" else 29)


@pytest.mark.parametrize(("family", "config"), diagonal((*FAMILIES, "llama_gqa eager"), FORMS, first=1, every=2))
def test_a_padded_batch_is_its_rows(family: str, config: IcaeConfig) -> None:
    """Slots, losses and gradients of rows of different lengths, in one batch and one by one."""
    base = build(family.removesuffix(" eager"))
    if family.endswith("eager"):
        base.set_attn_implementation("eager")
    icae = made(base, config)
    rows = [text(n, n) for n in (5, 25, 12)]
    together, alone = icae.encode(rows), [icae.encode([row])[0] for row in rows]
    for a, b in zip(together, alone, strict=True):
        same(a, b)
        assert a.positions.tolist() == b.positions.tolist()
    for a, b in zip(icae.encode(rows, batch=2), alone, strict=True):
        same(a, b)
    # One row has no slots and no memory.
    batch = [restore_row(icae, s, row) for s, row in zip(together, rows, strict=True)]
    batch += [continue_row(icae, together[0], text(14)), restore_row(icae, None, text(3))]
    nats, scored = losses(icae, batch)
    singles = [loss(icae, s, row) * len(row) for s, row in zip(alone, rows, strict=True)]
    singles += [loss(icae, alone[0], text(14), "lm") * 6, loss(icae, None, text(3)) * 2]
    assert scored.tolist() == [5, 25, 12, 6, 2]
    assert worst(nats, torch.stack(singles)) <= 25 * CLOSE
    a, b = gradients(icae, nats.sum()), gradients(icae, torch.stack(singles).sum())
    assert a.keys() == b.keys()
    assert all(worst(a[n], b[n]) <= 1e-3 * float(b[n].abs().max()) + 1e-4 for n in a)
    assert all(bool(torch.isfinite(g).all()) for g in a.values())


@torch.no_grad()
def test_spread_positions_do_not_cut_attention(tmp_path: Path) -> None:
    """Positions with gaps and repeats: as with an explicit causal mask. Without any, transformers sees new texts."""
    config = IcaeConfig(4, 3, positions="spread")
    icae, ids = made(build("llama_gqa"), config), text(11)
    reference, embeds = peft_encoder(icae, tmp_path), span_embeds(icae, text(11))
    positions = torch.tensor([[*range(11), 1, 4, 6, 9]])
    causal = torch.ones(15, 15, dtype=torch.bool).tril()[None, None]
    given = {"inputs_embeds": embeds, "position_ids": positions, "output_hidden_states": True}
    own = reference(**given, attention_mask=causal).hidden_states[-1][0, -4:]
    (slots,) = icae.encode([ids])
    assert slots.soft is not None
    assert worst(slots.soft, own) <= CLOSE
    assert slots.positions.tolist() == [0, 1, 2, 3]  # as embeddings they stand where tokens do
    contiguous = reference(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1][0, -4:]
    assert worst(contiguous, own) > 100 * CLOSE
