"""What the cache hands to the memory: the model's own numbers, with the right ids and offsets."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model_worker.attachment.loading import load_model
from model_worker.window.cache import MemoryCache
from model_worker.window.chunking import chunks
from model_worker.window.encoding import encode, encode_together
from tests.support.diagonal import rotated
from tests.worker.tiny import BACKENDS, FAMILIES, ListMemory, attached, build, tokens, worst

Models = Callable[[str], PreTrainedModel]


def projected_keys(net: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return each layer's key before RoPE `[Hkv, T, D]`, taken from the model's own projections by hooks of this
    test."""
    outputs: dict[int, Tensor] = {}

    def note(layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: outputs.__setitem__(layer, output[0])

    handles = []
    for layer, block in enumerate(net.base_model.layers):
        attention = getattr(block, "self_attn", None) or block.attention
        name = next(n for n in ("k_norm", "k_proj", "query_key_value") if hasattr(attention, n))
        handles.append(getattr(attention, name).register_forward_hook(note(layer)))
    with torch.no_grad():
        net(ids)
    for handle in handles:
        handle.remove()
    config = net.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = []
    for layer in range(config.num_hidden_layers):
        rows = outputs[layer].reshape(ids.shape[1], -1)
        if name == "query_key_value":
            keys.append(
                rows.view(ids.shape[1], config.num_attention_heads, 3 * dim)[..., dim : 2 * dim].transpose(0, 1)
            )
        else:
            keys.append(rows.view(ids.shape[1], -1, dim).transpose(0, 1))
    return keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", rotated(FAMILIES, 2))
def test_keys_are_the_projections(family: str, dtype: torch.dtype) -> None:
    """Bit by bit where the key is a projection's output; within rounding where it has to be un-rotated."""
    net, ids = build(family).to(dtype), tokens(8)
    with attached(net) as attachment:
        own = projected_keys(net, ids)
        chunk = encode(attachment, ids[0].tolist(), needs_queries=True)
        assert {r.capture for r in attachment.reports} == {"unrotated" if family == "gpt_neox" else "projection"}
        for layer, seen in chunk.layers.items():
            if attachment.reports[layer].capture == "projection":
                assert torch.equal(seen.keys, own[layer])
            else:
                scale = float(own[layer].float().abs().max())
                assert worst(seen.keys, own[layer]) <= (1e-6 if dtype == torch.float32 else 2**-7) * scale
            assert seen.queries is not None
            assert seen.queries.shape == (net.config.num_attention_heads, 8, seen.keys.shape[2])


@pytest.mark.parametrize(
    ("name", "backend"), rotated([*product(FAMILIES, BACKENDS), *product(["kvbank-small"], BACKENDS)], 0)
)
def test_chunks_that_are_encoded_together_are_as_if_alone(name: str, backend: str) -> None:
    """Encode chunks of several lengths in one forward: nothing of a row shows in another, nor what fills it up."""
    net = load_model(name, dtype="float32")[0] if name not in FAMILIES else build(name)
    chunks = [(tokens(count, seed=count)[0].tolist(), 100 + count) for count in (9, 16, 1, 13)]
    with attached(net, backend) as attachment:
        together = encode_together(attachment, chunks, needs_queries=True)
        for seen, (ids, start) in zip(together, chunks, strict=True):
            alone = encode(attachment, ids, start, needs_queries=True)
            assert (seen.token_ids, seen.start, seen.context) == (ids, start, "isolated")
            assert seen.layers.keys() == alone.layers.keys()
            for layer, own in alone.layers.items():
                for part in ("keys", "values", "queries"):
                    expected = getattr(own, part)
                    assert worst(getattr(seen.layers[layer], part), expected) <= 1e-5 * float(expected.abs().max())


def test_a_chunk_is_encoded_up_to_the_last_memory_layer(model: Models) -> None:
    """Watch the layers of a forward that encodes: those above the memory do nothing, and go on as ever afterwards."""
    net, ids, ran = model("llama_gqa"), tokens(8), list[int]()
    plain = net(ids).logits
    with attached(net, mode="memlong", memory_layers=[1], retrieval_layers=[2]) as attachment:
        hooks = [
            layer.register_forward_pre_hook(lambda *_, at=at: ran.append(at))
            for at, layer in enumerate(net.model.layers)
        ]
        chunk = encode(attachment, ids[0].tolist())
        for hook in hooks:
            hook.remove()
        assert ran == [0, 1]
        assert chunk.layers.keys() == {1}
        assert torch.equal(net(ids).logits, plain)


def test_chunks_have_their_ids_and_offsets(model: Models) -> None:
    """Windows have two chunks: the oldest leaves when the next would not fit; what is left leaves at the end."""
    net, ids = model("llama_gqa"), tokens(21)
    with attached(net) as attachment, torch.no_grad():
        memory = ListMemory(4)
        cache = MemoryCache(attachment, memory, window=8)
        for part in ids.split(1, dim=1):
            net(part, past_key_values=cache)
            assert cache.physical <= 8
        cache.flush()
    assert [c.token_ids for c in memory.rows[0]] == [part[0].tolist() for part in ids.split(4, dim=1)]
    assert [c.start for c in memory.rows[0]] == [0, 4, 8, 12, 16, 20]
    assert {c.context for c in memory.rows[0]} == {"window"}
    assert cache.get_seq_length() == 21


def test_pads_are_not_captured(model: Models) -> None:
    net, ids = model("llama_gqa"), tokens(8, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with attached(net) as attachment, torch.no_grad():
        memory = ListMemory(4, recalls=False)
        cache = MemoryCache(attachment, memory, window=8)
        net(ids, attention_mask=mask, past_key_values=cache)
        cache.flush()
        alone = encode(attachment, ids[1, 5:].tolist())
    assert [(c.token_ids, c.start) for c in memory.rows[1]] == [(ids[1, 5:].tolist(), 0)]
    assert [c.start for c in memory.rows[0]] == [0, 4]
    for layer, seen in memory.rows[1][0].layers.items():
        assert worst(seen.keys, alone.layers[layer].keys) <= 2e-6
        assert worst(seen.values, alone.layers[layer].values) <= 2e-6


def test_a_chunk_is_isolated_only_when_it_was_alone(model: Models) -> None:
    """Read chunk by chunk it was alone; given as part of a longer piece it saw that piece, and behind sinks these."""
    net, ids = model("llama_gqa"), tokens(20)
    alone, behind = ["isolated"] * 3, ["isolated", "window", "window"]
    with attached(net) as attachment, torch.no_grad():
        for pieces, sinks, contexts in (
            ((8, 8, 4), 0, alone),
            ((5, 8, 7), 0, alone),
            ((8, 8, 4), 4, behind),
            ((20,), 0, ["window"] * 3),
        ):
            memory = ListMemory(8, recalls=False)
            cache = MemoryCache(attachment, memory, window=8, sinks=sinks)
            for part in ids.split(list(pieces), dim=1):
                net(part, past_key_values=cache)
            cache.flush()
            assert [c.context for c in memory.rows[0]] == contexts
            assert [i for c in memory.rows[0] for i in c.token_ids] == ids[0].tolist()


def test_a_key_that_was_not_noted_is_not_replaced_by_one_that_is_rounded() -> None:
    """Exchange a projection after attach, so that it has no hook: the token is refused, and not kept inexactly."""
    net = build("llama_gqa")
    with attached(net) as attachment, torch.no_grad():
        cache = MemoryCache(attachment, ListMemory(4), window=8)
        net(tokens(2), past_key_values=cache)
        attention = net.base_model.layers[1].self_attn
        attention.k_proj = copy.deepcopy(attention.k_proj)
        attention.k_proj._forward_hooks.clear()
        with pytest.raises(KeyError):
            net(tokens(1), past_key_values=cache)


@pytest.mark.parametrize("window", [8, 11, 40])
def test_chunks_are_cut_alike_in_any_window(window: int) -> None:
    """Test that a stream that goes on in another window has the chunks that it had: a bank would store both."""
    ids = tokens(60, seed=4)[0].tolist()
    ends = frozenset(ids[5::7])
    expected = [len(piece) for piece in chunks(ids, 8, ends)]
    assert len(set(expected)) > 2
    with attached(build("llama_gqa")) as attachment:
        memory = ListMemory(chunk=8)
        cache = MemoryCache(attachment, memory, window=window, sinks=0, ends=ends)
        for piece in chunks(ids, min(8, window - 8 + 1)):
            with torch.no_grad():
                attachment.decoder(input_ids=torch.tensor([piece]), past_key_values=cache, use_cache=True)
        left = [len(chunk) for chunk in memory.rows[0]]
        assert len(left) >= 2
        assert left == expected[: len(left)]
