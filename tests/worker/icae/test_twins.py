"""Encoder and decoder share one set of weights; training moves LoRA and memory rows only."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_worker.attaching import attach
from model_worker.attachment.digest import reader_of
from model_worker.errors import InputError
from model_worker.icae import IcaeConfig, loss, restore
from model_worker.icae.decode import losses
from model_worker.icae.layout import restore_row
from model_worker.window.cache import MemoryCache
from tests.support.diagonal import diagonal, rotated
from tests.worker.icae.adapters import EVERY_FORM, FORMS, KV, SOFT, SPREAD, gradients, made, same, small, text, worst
from tests.worker.tiny import FAMILIES, ListMemory, build, tokens

# peft 0.21 asks transformers 5.23 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("family", rotated(FAMILIES, 2))
def test_twins_share_every_weight(family: str) -> None:
    """Weights are there once; the caller's model keeps its parameters, flags, outputs and digest."""
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


@pytest.mark.parametrize("family", rotated(FAMILIES, 0))
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


@pytest.mark.parametrize(("family", "config"), diagonal(("llama_gqa", "qwen3", "gemma", "gpt_neox"), FORMS))
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


@EVERY_FORM
def test_checkpointing_does_not_touch_decoding(config: IcaeConfig) -> None:
    """Checkpointed layers in train mode have no cache; texts are greedy all the same."""
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


@EVERY_FORM
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
    """Attached bases stay attached, and their twins have no memory."""
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
