"""ICAE as a model: two twins over one set of weights, spans and batches, both interfaces, folders, refusals.

References are plain peft and plain transformers on copies of the base; golden vectors are in tests/golden/test_icae.py.
"""

import copy
import gc
import itertools
import json
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from model_worker.attaching import attach
from model_worker.attachment.digest import reader_of, state_token
from model_worker.errors import InputError, ModelNotFound
from model_worker.icae import Icae, IcaeConfig, Slots, answer, combine, continue_, loss, restore, to_kv
from model_worker.icae.decode import generate, logits, losses
from model_worker.icae.expanded import TWINS
from model_worker.icae.layout import answer_row, continue_row, restore_row
from model_worker.icae.official import import_official
from model_worker.window.cache import MemoryCache
from tests.worker.tiny import FAMILIES, VOCABULARY, ListMemory, build, tokens
from tests.worker.tiny import worst as worst_of

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SOFT, KV = IcaeConfig(4, 3), IcaeConfig(4, 3, interface="kv")
SPREAD = IcaeConfig(4, 3, interface="kv", positions="spread")
FORMS = pytest.mark.parametrize("config", [SOFT, KV, SPREAD], ids=["soft", "kv", "spread"])
CLOSE = 2e-4  # of values that are around 1


def made(base: Any, config: IcaeConfig = SOFT, **options: Any) -> Icae:
    """An adapter that does something: a new LoRA is zero."""
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
    """The same LoRA as peft loads it, on a copy of the base."""
    icae.save_pretrained(folder)
    return PeftModel.from_pretrained(copy.deepcopy(icae.base_model), str(folder)).eval()


def span_embeds(icae: Icae, ids: Sequence[int]) -> Tensor:
    table = icae.base_model.get_input_embeddings()
    return torch.cat([table(torch.tensor(ids)), icae.memory[: icae.config.slots].detach()])[None]


def gradients(icae: Icae, total: Tensor) -> dict[str, Tensor]:
    icae.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in icae.named_parameters() if p.grad is not None}


# -- the encoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_slots_are_the_last_hidden_states_of_the_peft_model(family: str, tmp_path: Path) -> None:
    """After the final norm, at the memory rows, LoRA on, positions from 0, and the folder is peft's own."""
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


@FORMS
@torch.no_grad()
def test_each_span_is_alone(config: IcaeConfig) -> None:
    """A long context is its spans, encoded apart and put in order; spread positions count through the source."""
    icae, ids = made(build("llama_gqa"), config), text(29)
    (whole,) = icae.encode([ids])
    parts = icae.encode([ids[:10], ids[10:20], ids[20:]])
    assert whole.lengths == (10, 10, 9)
    same(whole, combine(parts))
    places = list(range(12)) if config.positions == "contiguous" else [1, 3, 6, 8, 11, 13, 16, 18, 21, 23, 25, 27]
    assert whole.positions.tolist() == combine(parts).positions.tolist() == places
    assert whole.next_position == (12 if config.positions == "contiguous" else 29)


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


@FORMS
@pytest.mark.parametrize("family", [*FAMILIES, "llama_gqa eager"])
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


# -- K-V of the encoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [KV, SPREAD], ids=["contiguous", "spread"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_kv_of_the_memory_rows(family: str, config: IcaeConfig, tmp_path: Path) -> None:
    """What the peft model's cache holds at the memory rows, keys before RoPE; the frozen base goes on from it."""
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


# -- the twins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_share_every_weight(family: str) -> None:
    """No weight is there twice; the caller's model keeps its parameters, flags, outputs and digest."""
    base = build(family)
    plain, digest, ids = base(tokens(9)).logits, reader_of(base).digest, tokens(9)
    icae = made(base)
    own = {name: p.data_ptr() for name, p in base.named_parameters()}
    assert {name: p.data_ptr() for name, p in icae.decoder.named_parameters()} == own
    encoder = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): p.data_ptr()
        for name, p in icae.encoder.named_parameters()
        if "lora_" not in name
    }
    assert encoder == own
    assert all(p.requires_grad for p in base.parameters())
    total = loss(icae, icae.encode([text(20)])[0], text(20))
    total.backward()
    torch.optim.SGD([p for p in icae.parameters() if p.requires_grad], lr=0.1).step()
    assert torch.equal(base(ids).logits, plain)
    assert torch.equal(icae.decoder(ids).logits, plain)
    assert all(p.grad is None for p in base.parameters())
    assert reader_of(base).digest == digest == icae.config.base_digest
    assert {n for n, p in icae.named_parameters() if p.requires_grad} == {
        n for n, _ in icae.named_parameters() if "lora_" in n or n == "memory"
    }


def test_only_new_rows_and_lora_take_memory() -> None:
    base = build("llama_gqa")
    icae = made(base)
    own = {p.untyped_storage().data_ptr() for p in base.parameters()}
    new = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in icae.parameters()}
    lora = 4 * 4 * (32 + 32 + 32 + 16) * 4  # rank 4, in 4 layers: q (32 to 32) and v (32 to 16), float32
    assert sum(size for pointer, size in new.items() if pointer not in own) == lora + 7 * 32 * 4
    moved = icae.double()
    assert moved.decoder.lm_head.weight.data_ptr() == moved.encoder.get_base_model().lm_head.weight.data_ptr()
    assert base.lm_head.weight.dtype == torch.float32


def test_tied_heads_stay_tied() -> None:
    torch.manual_seed(0)
    base = small(tie_word_embeddings=True).eval()
    icae = made(base)
    for model in (icae.decoder, icae.encoder.get_base_model()):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    assert torch.equal(icae.decoder(tokens(7)).logits, base(tokens(7)).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_are_right_and_their_own(family: str) -> None:
    """Rotary frequencies are in no state dict. A twin that made them anew, or shared them, would be found out."""
    base = build(family)
    for buffer in base.buffers():  # not what the configuration says: they are to be taken from the model
        buffer.mul_(1.25)
    expected, plain = {n: b.clone() for n, b in base.named_buffers()}, base(tokens(9)).logits
    icae = made(base)
    assert expected
    for model in (icae.decoder, icae.encoder.get_base_model()):
        have = dict(model.named_buffers())
        assert have.keys() == expected.keys()
        assert all(torch.equal(have[n], expected[n]) for n in expected)
    assert torch.equal(icae.decoder(tokens(9)).logits, plain)
    for buffer in base.buffers():
        buffer.zero_()
    assert torch.equal(icae.decoder(tokens(9)).logits, plain)


class Calls:
    """Counts forwards of the first attention layer."""

    def __init__(self, model: Any):
        self.count = 0
        layer = next(m for m in model.modules() if hasattr(m, "layer_idx"))
        layer.register_forward_pre_hook(self.add)

    def add(self, module: nn.Module, args: object) -> None:
        self.count += 1


@FORMS
@pytest.mark.parametrize("family", ["llama_gqa", "qwen3", "gemma", "gpt_neox"])
def test_checkpointing_gives_the_same_gradients(family: str, config: IcaeConfig) -> None:
    """Layers of encoder and decoder run twice and give what they gave, LoRA on in one and off in the other."""
    icae = made(build(family), config, dropout=0.0)
    icae.train()
    rows = [text(n, n) for n in (7, 25)]

    def total() -> Tensor:
        batch = [restore_row(icae, s, row) for s, row in zip(icae.encode(rows), rows, strict=True)]
        return losses(icae, batch)[0].sum()

    total()  # attaches, which runs the layers too
    encoder, decoder = Calls(icae.encoder), Calls(icae.decoder)
    plain = gradients(icae, total())
    assert (encoder.count, decoder.count) == (1, 1)
    ways = [{"use_reentrant": False}] + [{"use_reentrant": True}] * (config is SOFT)
    for way in ways:
        encoder.count = decoder.count = 0
        icae.activation_checkpointing_enable(way)
        again = gradients(icae, total())
        assert (encoder.count, decoder.count) == (2, 2)
        assert again.keys() == plain.keys()
        assert all(worst(again[n], plain[n]) <= 1e-6 * float(plain[n].abs().max()) for n in plain), way
    icae.activation_checkpointing_disable()
    encoder.count = decoder.count = 0
    gradients(icae, total())
    assert (encoder.count, decoder.count) == (1, 1)
    assert float(plain["memory"][:4].abs().max()) > 0


def test_gradient_is_that_of_the_loss() -> None:
    """Against differences of the loss, through encoder, slots and frozen decoder, where the gradient is largest."""
    for config in (SOFT, SPREAD):
        icae = made(build("llama_gqa"), config, dropout=0.0)
        ids = text(20)
        found = gradients(icae, loss(icae, icae.encode([ids])[0], ids))
        for name, parameter in icae.named_parameters():
            if name not in found or ("layers.0" not in name and name != "memory"):
                continue
            at, step = tuple(int(i) for i in (found[name].abs() == found[name].abs().max()).nonzero()[0]), 3e-3
            moved = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[at] += sign * step
                    moved.append(loss(icae, icae.encode([ids])[0], ids).item())
                    parameter[at] -= sign * step
            expected = (moved[0] - moved[1]) / (2 * step)
            assert found[name][at].item() == pytest.approx(expected, rel=0.02, abs=1e-3), name


def test_reentrant_checkpointing_of_kv_is_refused() -> None:
    with pytest.raises(InputError, match="reentrant"):
        made(build("llama_gqa"), KV).activation_checkpointing_enable({"use_reentrant": True})


@FORMS
def test_checkpointing_does_not_touch_decoding(config: IcaeConfig) -> None:
    """A checkpointed layer in train mode has no cache; texts are greedy all the same."""
    icae = made(build("llama_gqa"), config, dropout=0.0)
    (slots,) = icae.encode([text(20)])
    expected = restore(icae, slots, max_new_tokens=8)
    icae.activation_checkpointing_enable()
    icae.train()
    assert restore(icae, slots, max_new_tokens=8) == expected
    assert icae.decoder.training


def test_the_decoder_has_no_dropout() -> None:
    """Train mode, which checkpointing needs, computes what eval mode does; the base keeps its own dropout."""
    base = small(attention_dropout=0.5).eval()
    icae, expected = made(base), base(tokens(9)).logits
    icae.activation_checkpointing_enable()
    icae.train()
    assert icae.decoder.training
    assert torch.equal(icae.decoder(tokens(9)).logits, expected)
    assert reader_of(icae.decoder).digest == reader_of(base).digest
    assert base.config.attention_dropout == 0.5
    icae.activation_checkpointing_disable()
    assert icae.training
    assert not icae.decoder.training


@FORMS
def test_a_few_steps_of_training(config: IcaeConfig) -> None:
    """LoRA and rows learn a text through the frozen decoder."""
    icae = made(build("llama_gqa"), config, dropout=0.0)
    optimizer = torch.optim.AdamW([p for p in icae.parameters() if p.requires_grad], lr=3e-2)
    ids, seen = text(20), []
    for _ in range(12):
        optimizer.zero_grad()
        now = loss(icae, icae.encode([ids])[0], ids)
        now.backward()
        optimizer.step()
        seen.append(now.item())
    assert min(seen[-3:]) < seen[0] - 0.3, seen


def test_a_base_with_a_memory() -> None:
    """An attached base stays attached, and its twins have no memory."""
    base, called = build("llama_gqa"), []
    expected = made(base).encode([text(20)])[0]
    attachment = attach(base)
    base.model.layers[0].register_forward_hook(lambda *_: called.append(1))
    icae = made(base)
    same(icae.encode([text(20)])[0], expected, 0.0)
    icae.decoder(tokens(4))
    assert not called  # hooks are the base's own
    memory = ListMemory(4)
    base(input_ids=tokens(8), past_key_values=MemoryCache(attachment, memory, window=8))
    base(input_ids=tokens(8), past_key_values=(cache := MemoryCache(attachment, memory, window=8)))
    cache.flush()
    assert len(memory.rows[0]) == 2
    attachment.detach()
    assert base.config._attn_implementation == icae.decoder.config._attn_implementation == "sdpa"


# -- the decoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_kv_of_slots(family: str) -> None:
    """As the plain base caches them, keys before RoPE; from the adapter, an attachment, or the base alone."""
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
    """The base in bf16, LoRA and rows in float32; the loss is close to that of float32."""
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


# -- folders ------------------------------------------------------------------------------------------------------


@FORMS
def test_saved_and_loaded(config: IcaeConfig, tmp_path: Path) -> None:
    """Bit-equal slots, the same digest and configuration; frozen unless it is to be trained further."""
    base = build("llama_gqa")
    icae = made(base, config)
    icae.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("a card")
    icae.save_pretrained(tmp_path / "adapter")  # again, over it
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "icae_config.json",
        "icae_memory.safetensors",
    ]
    assert (tmp_path / "adapter" / "README.md").read_text() == "a card"
    again = Icae.from_pretrained(base, tmp_path / "adapter")
    same(again.encode([text(25)])[0], icae.encode([text(25)])[0], 0.0)
    assert again.config == icae.config
    assert again.digest == icae.digest
    assert not [n for n, p in again.named_parameters() if p.requires_grad]
    further = Icae.from_pretrained(base, tmp_path / "adapter", trainable=True)
    trained = {n for n, p in further.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in icae.named_parameters() if p.requires_grad}
    assert "memory" in trained
    rows = load_file(tmp_path / "adapter" / "icae_memory.safetensors")
    assert torch.equal(rows["memory_token_embed.weight"], icae.memory.detach())


def test_digest_is_of_what_makes_slots(tmp_path: Path) -> None:
    base = build("llama_gqa")
    icae = made(base)
    own = icae.digest
    assert made(base).digest == own
    assert made(base, alpha=16).digest != own
    assert made(base, IcaeConfig(4, 4)).digest != own
    assert made(base, IcaeConfig(4, 3, base="another name")).digest == own
    with torch.no_grad():
        icae.memory[0, 0] += 1
        moved = icae.digest
        assert moved != own
        next(p for n, p in icae.named_parameters() if "lora_A" in n)[0, 0] += 1
        assert icae.digest not in (own, moved)


def test_another_base_is_refused(tmp_path: Path) -> None:
    made(build("llama_gqa")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="trained for another base"):
        Icae.from_pretrained(build("llama_gqa", seed=1), tmp_path)
    said = json.loads((tmp_path / "icae_config.json").read_text())
    (tmp_path / "icae_config.json").write_text(json.dumps(said | {"base_digest": "", "digest": ""}))
    assert Icae.from_pretrained(build("llama_gqa", seed=1), tmp_path).config.base_digest == ""
    narrow = small(hidden_size=16)
    with pytest.raises(InputError, match="32 wide, this model 16"):
        Icae.from_pretrained(narrow, tmp_path)
    deep = small(num_key_value_heads=1)
    with pytest.raises(InputError, match="does not fit this model"):
        Icae.from_pretrained(deep, tmp_path)


def test_the_dtype_is_part_of_the_base(tmp_path: Path) -> None:
    made(build("llama_gqa")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"another dtype is another base: .* \(now bfloat16\)"):
        Icae.from_pretrained(build("llama_gqa").bfloat16(), tmp_path)


@pytest.mark.parametrize(
    ("interface", "positions", "needed", "most"),
    [("soft", "contiguous", 41, 7), ("soft", "spread", 41, 7), ("kv", "contiguous", 41, 7), ("kv", "spread", 65, 4)],
)
def test_spans_beyond_the_models_positions_are_refused(
    interface: str, positions: str, needed: int, most: int, tmp_path: Path
) -> None:
    """When made and when loaded; what encoder and decoder use fits to the last position."""
    config = IcaeConfig(8, interface=interface, positions=positions)
    fits = small(max_position_embeddings=needed)
    icae = made(fits, config)
    (slots,) = icae.encode([text(config.capacity)])
    row = restore_row(icae, slots, text(config.capacity), ends=False)
    assert row.start + len(row) == needed
    icae.save_pretrained(tmp_path)
    Icae.from_pretrained(fits, tmp_path)
    fits.config.max_position_embeddings = needed - 1
    said = f"8 slots of 4 tokens need {needed} positions, this model has {needed - 1}: at rate 4 at most 7 slots fit"
    with pytest.raises(InputError, match=said):
        made(fits, config)
    with pytest.raises(InputError):
        Icae.from_pretrained(fits, tmp_path)
    assert config.fitting(40) == most
    with pytest.raises(InputError, match="too much for any slot"):
        IcaeConfig(1, 50).check_fits(51)
    IcaeConfig(1000).check_fits(None)


@FORMS
@torch.no_grad()
def test_what_runs_beyond_the_models_positions_is_refused(config: IcaeConfig) -> None:
    """Slots of three spans, text and new tokens fit to the last position, whoever asks; a default is what fits."""
    ids, before = text(25), 25 if config is SPREAD else 12
    last = before + 1 + 25  # the slots, a row, the text
    icae = made(small(max_position_embeddings=last, eos_token_id=None), config)
    (slots,) = icae.encode([ids])
    assert (icae.limit, icae.config.before(25), icae.config.restoring(25)) == (last, before, last)
    assert len(restore(icae, slots)) == 26
    assert torch.isfinite(loss(icae, slots, ids))
    assert torch.isfinite(loss(icae, slots, [*ids, 5, 5], "lm"))  # no row, and the last token is read by nothing
    assert len(continue_(icae, slots, [5])) == len(answer(icae, [slots], [])) == 26
    said = f"need {last + 1} positions, this model has {last}"
    with pytest.raises(InputError, match=said):
        restore(icae, slots, max_new_tokens=27)
    with pytest.raises(InputError, match=said):
        loss(icae, slots, [*ids, 5, 5])
    with pytest.raises(InputError, match=said):
        logits(icae, [restore_row(icae, slots, [*ids, 5])])
    with pytest.raises(InputError, match=said):
        continue_(icae, slots, [5], max_new_tokens=27)
    with pytest.raises(InputError, match=f"need {before + 27} positions"):
        answer(icae, [slots], [5] * 26)
    several = [slots] * 5
    with pytest.raises(InputError, match=f"need {5 * before + 3} positions") as caught:
        answer(icae, several, [5, 6])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="60 slots stand on more than the 38 positions"):
        to_kv(made(small(max_position_embeddings=38)), torch.zeros(60, 32))


def test_a_context_is_as_long_as_can_be_restored() -> None:
    for config in (SOFT, KV, SPREAD, IcaeConfig(5, 1), IcaeConfig(3, 7)):
        for positions in range(config.needed(), 3 * config.needed()):
            most = config.longest(positions)
            assert config.restoring(most) <= positions < config.restoring(most + 1)
    assert SOFT.longest(1) == 0


ENTRIES = ("slots", "rate", "interface", "positions", "base_digest", "format")
WRONG_ENTRIES = (
    ({"format": 2}, "format 2"),
    ({"colour": "red"}, "colour"),
    ({"slots": 5}, "need 8"),
    ({"interface": "lines"}, "interface"),
    ({"rate": 4.0}, "rate is 4.0"),
    ({"rate": True}, "rate is True"),
    ({"lm_row": "false"}, "lm_row is 'false'"),
    ({"prefix_ids": "123"}, "prefix_ids is '123'"),
    ({"prefix_ids": [99999]}, "not 99999"),
    ({"suffix_ids": [-1]}, "not -1"),
    ({"positions": "spread"}, "do not belong together"),
    ({"digest": 5}, "digest is 5"),
)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    base = build("llama_gqa")
    with pytest.raises(ModelNotFound, match="no adapter folder"):
        Icae.from_pretrained(base, tmp_path / "missing")
    made(base).save_pretrained(tmp_path)
    config = (tmp_path / "icae_config.json").read_text()
    for wrong, match in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ("\x80", "damaged"),
        *((json.dumps(json.loads(config) | wrong), match) for wrong, match in WRONG_ENTRIES),
        *((json.dumps({n: v for n, v in json.loads(config).items() if n != name}), name) for name in ENTRIES),
    ):
        (tmp_path / "icae_config.json").write_text(wrong)
        with pytest.raises(InputError, match=match):
            Icae.from_pretrained(base, tmp_path)
    (tmp_path / "icae_config.json").write_text(config)
    (tmp_path / "icae_memory.safetensors").write_bytes(b"not at all")
    with pytest.raises(InputError, match="damaged"):
        Icae.from_pretrained(base, tmp_path)
    (tmp_path / "icae_config.json").unlink()  # as a kill in the middle of a save leaves it
    with pytest.raises(ModelNotFound, match=r"no icae_config\.json"):
        Icae.from_pretrained(base, tmp_path)


def test_weights_that_are_not_those_of_the_adapter_are_refused_and_the_base_stays(tmp_path: Path) -> None:
    """peft leaves a missing one untrained, and copies one with a name of the base into the base."""
    base = build("llama_gqa")
    made(base).save_pretrained(tmp_path)
    file, digest = tmp_path / "adapter_model.safetensors", reader_of(base).digest
    whole = load_file(file)
    some = next(name for name in whole if "lora_A" in name)
    for wrong, match in (
        ({name: t for name, t in whole.items() if name != some}, "it has nothing, the model takes"),
        ({**whole, some.replace("layers.0", "layers.9"): whole[some].clone()}, "the model takes nothing"),
        ({**whole, "base_model.model.model.norm.weight": torch.zeros(32)}, "the model takes nothing"),
        ({**whole, some: whole[some][:1].clone()}, r"it has \(1, 32\), the model takes \("),
        ({**whole, some: whole[some].to(torch.int8)}, "is of torch.int8"),
        ({**whole, some: whole[some].flip(0).contiguous()}, "do not belong together"),
        ({name: t.half() for name, t in whole.items()}, "do not belong together"),
    ):
        save_file(wrong, file)
        with pytest.raises(InputError, match=match):
            Icae.from_pretrained(base, tmp_path)
        assert reader_of(base).digest == digest
    save_file(whole, file)
    Icae.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [5, 6]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("bias", "all"),
        ("modules_to_save", ["embed_tokens"]),
        ("use_dora", True),
        ("an_option_of_a_later_peft", 1),
        ("peft_type", "IA3"),
        ("lora_alpha", None),
        ("lora_alpha", 640.0),
        ("use_rslora", True),
        ("target_modules", "((("),
        ("target_modules", [["q_proj"]]),
        ("layers_pattern", "layers"),
        ("rank_pattern", None),
        ("lora_alpha", 10**400),
    ],
)
def test_settings_that_would_make_other_slots_of_the_same_weights_are_refused(
    name: str, value: Any, tmp_path: Path
) -> None:
    base = build("llama_gqa")
    made(base).save_pretrained(tmp_path)
    file, digest = tmp_path / "adapter_config.json", reader_of(base).digest
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(InputError, match=f"{name}|no LoRA|alpha is a number|do not belong|damaged|does not fit"):
        Icae.from_pretrained(base, tmp_path)
    assert reader_of(base).digest == digest


@pytest.mark.parametrize(
    ("name", "value"),
    [("init_lora_weights", "gaussian"), ("auto_mapping", {"base_model_class": "L"}), ("use_dora", None)],
)
def test_settings_that_do_not_touch_slots_are_taken(name: str, value: Any, tmp_path: Path) -> None:
    base = build("llama_gqa")
    icae = made(base)
    icae.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    assert Icae.from_pretrained(base, tmp_path).digest == icae.digest


def test_the_digest_follows_what_is_set_afterwards() -> None:
    icae = made(build("llama_gqa"))
    own = icae.digest
    icae.encoder.disable_adapter_layers()
    assert icae.digest != own
    icae.encoder.enable_adapter_layers()
    assert icae.digest == own
    icae.memory.data.add_(1)  # as a fused optimiser does, without a new version
    icae.requires_grad_(False)
    assert icae.digest != own
    own = icae.digest
    icae.config = replace(icae.config, positions="spread")
    assert icae.digest != own


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hub id, here from the hub's local cache; an id that is not there is one error."""
    base, commit = build("llama_gqa"), "0" * 40
    icae = made(base)
    cached = tmp_path / "hub" / "models--some--adapter"
    icae.save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Icae.from_pretrained(base, "some/adapter").digest == icae.digest
    with pytest.raises(ModelNotFound, match="adapter 'some/thing' cannot be loaded: ") as caught:
        Icae.from_pretrained(base, "some/thing")
    assert "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_adapter(tmp_path: Path) -> None:
    base = build("llama_gqa")
    icae = made(base)
    icae.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    icae.memory = nn.Parameter(icae.memory.detach().to("meta"))  # cannot be written
    with pytest.raises(NotImplementedError):
        icae.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_that_ends_half_way_is_refused(tmp_path: Path) -> None:
    """Some files are the new ones, some the old: such a folder is no adapter until it is saved again."""
    base = build("llama_gqa")
    icae = made(base)
    icae.save_pretrained(tmp_path)
    rows = tmp_path / "icae_memory.safetensors"
    rows.rename(tmp_path / "aside")
    (rows / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="icae_memory"):
        icae.save_pretrained(tmp_path)
    (rows / "in the way").rmdir()
    rows.rmdir()
    (tmp_path / "aside").rename(rows)
    with pytest.raises(ModelNotFound, match=r"no icae_config\.json"):
        Icae.from_pretrained(base, tmp_path)
    icae.save_pretrained(tmp_path)
    assert Icae.from_pretrained(base, tmp_path).digest == icae.digest


def test_official_files(tmp_path: Path) -> None:
    """What is no such checkpoint. The numbers of an import are compared in tests/golden."""
    with pytest.raises(ModelNotFound, match="no file"):
        import_official(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "text").write_text("words")
    with pytest.raises(InputError, match="not a safetensors file"):
        import_official(tmp_path / "text", tmp_path / "out")
    save_file({"model.weight": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(InputError, match="no official ICAE"):
        import_official(tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- refusals -----------------------------------------------------------------------------------------------------


def test_the_vocabulary_stays_as_it_is() -> None:
    base = build("llama_gqa")
    icae = made(base)
    for model in (base, icae.decoder, icae.encoder.get_base_model()):
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == VOCABULARY
        assert model.get_output_embeddings().out_features == VOCABULARY
    for wrong in ([VOCABULARY], [-1]):
        with pytest.raises(InputError, match="token ids"):
            icae.encode([wrong])
    with pytest.raises(InputError, match="empty"):
        icae.encode([[5], []])
    assert icae.encode([]) == []


def test_created_alike_from_a_seed() -> None:
    """The rows are as wide as the base's embeddings, or standard normal where asked; the caller's generator stays."""
    base = build("llama_gqa")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    icae = Icae.create(base, IcaeConfig(63, 3), rank=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert icae.digest == Icae.create(base, IcaeConfig(63, 3), rank=4).digest
    assert icae.digest != Icae.create(base, IcaeConfig(63, 3), rank=4, seed=1).digest
    width = base.get_input_embeddings().weight.std().item()
    assert icae.memory.std().item() == pytest.approx(width, rel=0.1)
    normal = Icae.create(base, IcaeConfig(63, 3, memory_init="normal"), rank=4)
    assert normal.memory.std().item() == pytest.approx(1, rel=0.1)
    wide = Icae.create(base, IcaeConfig(63, 3), rank=4, targets="all-linear")
    assert len([n for n, _ in wide.named_parameters() if "lora_A" in n]) == 7 * 4
    with pytest.raises(InputError, match="LoRA cannot be put"):
        Icae.create(base, SOFT, rank=4, targets=["nothing_like_it"])


def test_a_base_that_is_none() -> None:
    wrapped: Any = get_peft_model(build("llama_gqa"), LoraConfig(r=2, target_modules=["q_proj"]))
    for base in (wrapped, wrapped.get_base_model()):
        with pytest.raises(InputError, match="adapter already"):
            Icae.create(base, SOFT, rank=4)
    with pytest.raises(InputError, match="not a causal LM"):
        Icae.create(build("llama_gqa").model, SOFT, rank=4)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package imports; making an adapter says what is missing."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'kvbank\[icae\]'"):
        Icae.create(build("llama_gqa"), SOFT, rank=4)
    with pytest.raises(InputError, match=r"pip install 'kvbank\[icae\]'"):
        Icae.from_pretrained(build("llama_gqa"), "somewhere")


@pytest.mark.parametrize(
    "wrong", [{"slots": 0}, {"rate": 0}, {"positions": "far"}, {"memory_init": "ones"}, {"format": 0}], ids=str
)
def test_configurations_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        IcaeConfig(**{"slots": 4, **wrong})
