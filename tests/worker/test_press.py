"""Scorers of kvpress, where it is installed: the tokens that its own compress keeps, and what is refused."""

import importlib.util
import warnings
from collections.abc import Callable

import pytest
import torch
from tiny import VOCABULARY, attached
from transformers import PreTrainedModel

from model_worker.compress import compressor
from model_worker.compress.press import SCORERS
from model_worker.encoding import encode
from model_worker.errors import InputError

Models = Callable[[str], PreTrainedModel]
HAVE = importlib.util.find_spec("kvpress") is not None
SIZE, BUDGET = 90, 72  # more than the 64 tokens that SnapKV keeps at any rate


@pytest.mark.skipif(not HAVE, reason="kvpress is not installed")
@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
@pytest.mark.parametrize("name", SCORERS)
def test_the_press_keeps_the_same(model: Models, name: str, family: str) -> None:
    """Its own compress drops from the cache; the rows that stay are ours, found by their keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kvpress

    net = model(family)
    ids = (3 + torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(1)))[:SIZE].tolist()  # no ties
    with attached(net, "eager" if name == "ObservedAttentionPress" else "sdpa") as attachment:
        payload = compressor(f"press:{name},ratio=0.2").compress(encode(attachment, ids), attachment)
        assert payload.method == f"press:press={name},ratio=0.2"
        chunk = encode(attachment, ids)
        theirs = getattr(kvpress, name)(compression_ratio=0.2)
        for layer, rotated, kept in own_compress(theirs, attachment, ids):
            keys, _, offsets = payload.layers[layer]
            assert keys.shape[1] == offsets.shape[-1] == BUDGET
            assert bool((offsets.diff(dim=-1) > 0).all())
            by_head = offsets if offsets.ndim == 2 else offsets.expand(keys.shape[0], -1)
            for head, row in enumerate(by_head.tolist()):
                same = (kept[0, head][:, None] == rotated[0, head]).all(-1)
                assert row == same.any(0).nonzero()[:, 0].tolist()
                assert torch.equal(keys[head], chunk.layers[layer].keys[head, row])
    assert not hasattr(net.base_model.layers[0].self_attn, "rotary_emb")


def own_compress(press, attachment, ids):  # type: ignore[no-untyped-def]
    """(layer, rotated keys before, rotated keys after) of every layer, by the press's own method."""
    found, decoder = [], attachment.model.base_model

    def hook(module, args, kwargs, output):  # type: ignore[no-untyped-def]
        held = kwargs["past_key_values"].layers[module.layer_idx]
        torch.manual_seed(0)
        kwargs = {**kwargs, "cache_position": torch.arange(len(ids))}
        keys, _ = press.compress(module, kwargs["hidden_states"], held.keys, held.values, output[1], kwargs)
        found.append((module.layer_idx, held.keys, keys))

    press.post_init_from_model(attachment.model)
    layers = [layer.self_attn for layer in decoder.layers]
    for attention in layers:
        attention.rotary_emb = decoder.rotary_emb
    handles = [attention.register_forward_hook(hook, with_kwargs=True) for attention in layers]
    encode(attachment, ids)
    for handle, attention in zip(handles, layers, strict=True):
        handle.remove()
        del attention.rotary_emb
    return found


@pytest.mark.skipif(HAVE, reason="kvpress is installed")
def test_how_to_get_it(model: Models) -> None:
    with attached(model("llama_gqa")) as attachment, pytest.raises(InputError, match="pip install"):
        compressor("press:KnormPress,m=4").compress(encode(attachment, [5, 6, 7]), attachment)


@pytest.mark.skipif(not HAVE, reason="kvpress is not installed")
def test_a_chunk_that_a_press_cannot_score(model: Models) -> None:
    with attached(model("llama_gqa")) as attachment:
        for name in ("SnapKVPress", "ObservedAttentionPress"):
            with pytest.raises(InputError, match=f"{name} cannot score a chunk of 5 tokens"):
                compressor(f"press:{name},m=4").compress(encode(attachment, [5, 6, 7, 8, 9]), attachment)


def test_what_is_refused() -> None:
    for name in ("AdaKVPress", "DuoAttentionPress", "PyramidKVPress", "Nonsense"):
        with pytest.raises(InputError, match=r"(?s)same number of tokens.*SnapKVPress"):
            compressor(f"press:{name},ratio=0.2")
    for spec in ("press:KnormPress", "press:KnormPress,ratio=0.5,m=3"):
        with pytest.raises(InputError, match="either ratio"):
            compressor(spec)
    for spec in ("press:KnormPress,ratio=1", "press:KnormPress,m=0"):
        with pytest.raises(InputError, match="below 1"):
            compressor(spec)
