"""The decoder of ICAE: restoring, continuing and answering are plain generation over embeddings or K-V."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from model_worker.attaching import attach
from model_worker.attachment.digest import state_token
from model_worker.errors import InputError
from model_worker.icae import IcaeConfig, answer, continue_, loss, restore, to_kv
from model_worker.icae.decode import generate
from model_worker.icae.expanded import TWINS
from model_worker.icae.layout import answer_row, continue_row, restore_row
from tests.support.diagonal import rotated
from tests.worker.icae.adapters import CLOSE, SOFT, SPREAD, made, text, worst
from tests.worker.tiny import FAMILIES, build

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("family", rotated(FAMILIES, 2))
def test_restoring_is_generate_with_embeddings(family: str) -> None:
    """Restore, continue and answer as transformers' own greedy search on the plain base goes on from the same rows."""
    base = build(family)
    icae = made(base, IcaeConfig(4, 3, lm_row=True, prefix_ids=(5, 6), suffix_ids=(7,)))
    first, second = icae.encode([text(20), text(7, 2)])
    table = base.get_input_embeddings()
    assert first.soft is not None
    assert second.soft is not None

    def greedy(*parts: Tensor) -> list[int]:
        embeds = torch.cat(parts)[None].detach()
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return base.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=9, do_sample=False)[0].tolist()  # type: ignore[no-any-return]

    ae, lm, ft = icae.memory.detach()[4:]
    assert torch.equal(icae.row("lm"), lm)
    assert restore(icae, first, max_new_tokens=9) == greedy(first.soft, ae[None])
    asked = torch.tensor([11, 12])
    assert continue_(icae, second, [11, 12], max_new_tokens=9) == greedy(second.soft, lm[None], table(asked))
    both = greedy(
        table(torch.tensor([5, 6])), first.soft, second.soft, ft[None], table(asked), table(torch.tensor([7]))
    )
    assert answer(icae, [first, second], [11, 12], max_new_tokens=9) == both
    rows = [restore_row(icae, s, (), ends=False) for s in (first, second)]
    assert generate(icae, rows, 9) == [restore(icae, s, max_new_tokens=9) for s in (first, second)]


def test_ends_are_the_configurations() -> None:
    """EOS is scored and stops a text, BOS stands before a plain text; neither is a constant, nor needed."""
    base = build("llama_gqa")
    (slots,) = made(base).encode([text(20)])
    free = restore(made(base), slots, max_new_tokens=8)
    assert len(free) == 8
    stop = next(t for i, t in enumerate(free) if i and t not in free[:i])
    icae = made(base)
    assert (icae.bos, icae.eos) == (None, None)
    assert restore_row(icae, slots, [5, 6]).labels.tolist()[-3:] == [-100, 5, 6]
    base.config.bos_token_id, base.config.eos_token_id = 9, [stop, 1]
    icae = made(base)
    assert (icae.bos, icae.eos) == (9, stop)
    assert restore(icae, slots, max_new_tokens=8) == free[: free.index(stop)]
    assert restore_row(icae, slots, [5, 6]).labels.tolist()[-4:] == [-100, 5, 6, stop]
    assert continue_row(icae, slots, [5, 6, 7], leave=1).labels.tolist()[-3:] == [-100, 6, 7]
    assert answer_row(icae, slots, [5], [8]).labels.tolist()[-3:] == [-100, 8, stop]
    plain = torch.tensor([[9, 5, 6, stop]])
    expected = base(plain, labels=plain).loss
    assert loss(icae, None, [5, 6]).item() == pytest.approx(expected.item(), abs=1e-5)
    assert loss(icae, None, [9, 5, 6]).item() == pytest.approx(expected.item(), abs=1e-5)  # BOS once


@pytest.mark.parametrize("family", rotated(FAMILIES, 0))
@torch.no_grad()
def test_kv_of_slots(family: str) -> None:
    """Slots give K-V as the plain base caches them, keys before RoPE; from the adapter, an attachment, or the base
    alone."""
    base = build(family)
    icae = made(base)
    soft = icae.encode([text(20)])[0].soft
    assert soft is not None
    cache = DynamicCache()
    base(inputs_embeds=soft[None], past_key_values=cache)
    for offset in (0, 50):  # wherever they are put
        moved = DynamicCache()
        places = torch.arange(offset, offset + len(soft))[None]
        base(inputs_embeds=soft[None], position_ids=places, past_key_values=moved)
        for layer, (keys, values) in to_kv(icae, soft).items():
            rotated = icae.reader.ropes[layer].rotate(keys[None], places)
            assert worst(rotated, moved.layers[layer].keys) <= CLOSE
            assert worst(values[None], cache.layers[layer].values) <= CLOSE
    own, bare = to_kv(icae, soft, [2, 1]), to_kv(base, soft, [2, 1])
    attachment = attach(base, memory_layers=[1], retrieval_layers=[1])  # the other layer is not watched
    through = to_kv(attachment, soft, [2, 1])
    attachment.detach()
    assert sorted(own) == sorted(bare) == sorted(through) == [1, 2]
    for layer, pair in own.items():
        for found in (bare, through):
            assert all(worst(a, b) <= CLOSE for a, b in zip(pair, found[layer], strict=True))
    with pytest.raises(InputError, match="layer 4"):
        to_kv(icae, soft, [4])


def test_a_bare_base_is_attached_once_and_left_as_it_is() -> None:
    """K-V from the base alone follow its weights, are had while it has a memory, and do not keep it alive."""
    base = build("llama_gqa")
    icae = made(base)
    soft = icae.encode([text(20)])[0].soft
    assert soft is not None
    state, readers = state_token(base), len(TWINS)
    first = to_kv(base, soft, [1])
    assert all(torch.equal(*pair) for pair in zip(first[1], to_kv(base, soft, [1])[1], strict=True))
    assert len(TWINS) == readers + 1
    reader = TWINS[base][1]
    attachment = attach(base)
    to_kv(base, soft, [1])
    assert TWINS[base][1] is reader
    attachment.detach()
    assert state_token(base) == state
    before = to_kv(base, soft, [0])[0][1]
    with torch.no_grad():
        base.model.layers[0].self_attn.v_proj.weight.mul_(2)
    assert worst(to_kv(base, soft, [0])[0][1], 2 * before) <= CLOSE
    assert TWINS[base][1] is not reader
    gone = weakref.ref(base)
    del base, icae, attachment
    gc.collect()
    assert gone() is None
    assert len(TWINS) == readers


def test_bf16() -> None:
    """Bases are in bf16, LoRA and rows in float32; the loss is close to that of float32."""
    ids = text(20)
    full = made(build("llama_gqa"))
    half = made(build("llama_gqa").bfloat16())
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert half.dtype == half.row("ae").dtype == torch.bfloat16
    with torch.no_grad():
        half.memory.copy_(full.memory)
    total = loss(half, half.encode([ids])[0], ids)
    total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(loss(full, full.encode([ids])[0], ids).item(), abs=0.05)
    for config in (SOFT, SPREAD):
        icae = made(build("llama_gqa").bfloat16(), config)
        assert restore(icae, icae.encode([ids])[0], max_new_tokens=4)
