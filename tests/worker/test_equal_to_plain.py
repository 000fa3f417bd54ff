"""A memory changes nothing where it holds nothing, and is exact where exactness is possible."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from model_worker.window.cache import MemoryCache
from tests.support.diagonal import diagonal, rotated
from tests.worker.tiny import BACKENDS, FAMILIES, SLIDING, ListMemory, attached, build, recalled, tokens, worst

Models = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize(("family", "backend"), diagonal(FAMILIES, BACKENDS, every=2))
def test_empty_memory_is_the_plain_model(model: Models, family: str, backend: str) -> None:
    net, ids = model(family), tokens(SLIDING // 2, rows=2)
    net.set_attn_implementation(backend)
    options = {"max_new_tokens": SLIDING // 2, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits, text = net(ids).logits, net.generate(ids, **options)
        with attached(net, backend) as attachment:
            empty = ListMemory(chunk=8)
            assert worst(net(ids, past_key_values=MemoryCache(attachment, empty)).logits, logits) <= 1e-6
            assert worst(net(ids).logits, logits) == 0  # attached, and used without a memory
            assert torch.equal(net.generate(ids, past_key_values=MemoryCache(attachment, empty), **options), text)
    assert net.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert worst(net(ids).logits, logits) <= 5e-6


def test_sliding_window_is_the_models_own(model: Models) -> None:
    """Tokens leave one for each that comes where there is no memory, as in the model's own cache."""
    net, ids = model("mistral_sliding"), tokens(10)
    options = {"max_new_tokens": 2 * SLIDING, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    text = net.generate(ids, **options)
    with attached(net) as attachment:
        cache = MemoryCache(attachment)
        assert torch.equal(net.generate(ids, past_key_values=cache, **options), text)
        assert cache.physical == SLIDING


@pytest.mark.parametrize(
    ("family", "backend", "positions"), diagonal(FAMILIES, BACKENDS, ["original", "continual"], every=2)
)
def test_all_layers_remembering_everything_is_one_long_forward(
    model: Models, family: str, backend: str, positions: str
) -> None:
    """Texts are read chunk by chunk, each chunk alone in the window. In `continual` the memory lies at other
    positions."""
    net = model(family)
    sliding = family == "mistral_sliding"
    chunk, ids = (4, tokens(SLIDING)) if sliding else (8, tokens(40))
    with attached(net, backend, positions=positions) as attachment, torch.no_grad():
        plain = net(ids).logits
        memory = ListMemory(chunk)
        cache = MemoryCache(attachment, memory, window=chunk)
        parts = [net(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
        assert worst(torch.cat(parts, 1), plain) <= 5e-6
        assert cache.physical == chunk
        assert [c.start for c in memory.rows[0]] == list(range(0, ids.shape[1] - chunk, chunk))


def test_original_positions_hold_while_the_service_is_away(model: Models) -> None:
    """Blocks set once stay where they belong, although the window begins anew with every chunk."""
    net, ids = model("llama_gqa"), tokens(24)
    with attached(net, positions="original") as attachment, torch.no_grad():
        plain = net(ids).logits
        memory = ListMemory(8)
        first = MemoryCache(attachment, memory, window=8)
        net(ids[:, :8], past_key_values=first)
        first.flush()
        cache = MemoryCache(attachment, ListMemory(8, recalls=False), window=16)
        for part in ids[:, :8].split(8, 1):
            net(part, past_key_values=cache)
        cache.flush()
        cache.set_memory([recalled(memory.rows[0])])
        near = net(ids[:, 8:16], past_key_values=cache).logits
        assert worst(near, plain[:, 8:16]) <= 5e-6
        cache.flush()
        cache.set_memory([recalled(memory.rows[0])])
        expected = net(ids[:, 16:], past_key_values=cache).logits
        again = MemoryCache(attachment, ListMemory(8, recalls=False), window=8, sinks=0)
        again.set_memory([recalled(memory.rows[0])])
        for part in ids.split(8, 1):
            far = net(part, past_key_values=again).logits
        assert worst(far, expected) <= 5e-6


@pytest.mark.parametrize("family", rotated(FAMILIES, 0))
def test_bfloat16_runs(family: str) -> None:
    net, ids = build(family).to(torch.bfloat16), tokens(16)
    with attached(net) as attachment, torch.no_grad():
        cache = MemoryCache(attachment, ListMemory(4), window=4)
        for part in ids.split(4, 1):
            logits = net(part, past_key_values=cache).logits
        assert cache.retrieved_tokens == 12
        assert logits.dtype == torch.bfloat16
        assert bool(logits.isfinite().all())


def test_trained_model(stories: object) -> None:
    """Trained models go through the whole loop."""
    from model_worker.attachment.loading import load_model

    net, tokenizer = load_model(str(stories))
    ids = torch.tensor([tokenizer.encode("Once upon a time there was a little girl who liked to play outside.")])
    with attached(net) as attachment, torch.no_grad():
        plain = net(ids).logits
        cache = MemoryCache(attachment, ListMemory(8), window=8, sinks=0)
        parts = [net(part, past_key_values=cache).logits for part in ids.split(6, dim=1)]
        assert worst(torch.cat(parts, 1), plain) <= 2e-5
