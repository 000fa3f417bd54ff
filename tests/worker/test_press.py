"""Scorers of kvpress, where it is installed: the tokens that its own compress keeps, and what is refused.

kvpress is not imported here before a model is attached, since it wraps the attention functions that it finds.
"""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvbank
from model_worker.attachment.attachment import Attachment
from model_worker.compress import compressor
from model_worker.compress.press import SCORERS
from model_worker.errors import InputError
from model_worker.remember.memory import Memory
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.encoding import encode
from tests.worker.tiny import BACKENDS, VOCABULARY, ListMemory, attached, bank, tokenizer, tokens

Models = Callable[..., PreTrainedModel]
HAVE = importlib.util.find_spec("kvpress") is not None
have = pytest.mark.skipif(not HAVE, reason="kvpress is not installed")
SIZE = 90  # more than the 64 tokens that SnapKV keeps at any rate
GIVEN: list[tuple[str, dict[str, Any]]] = [  # a press, and parameters by name
    *((name, {}) for name in SCORERS),
    ("SnapKVPress", {"window_size": 16, "kernel_size": 3}),
    ("ExpectedAttentionPress", {"use_covariance": False, "epsilon": 0.01}),
    ("LagKVPress", {"n_sink": 2, "lag_size": 16, "cross_scoring": True}),
    ("RandomPress", {"seed": 3}),
    ("CompactorPress", {"blending": 0.25}),
    ("PyramidKVPress", {"window_size": 4, "beta": 5}),
    ("CriticalKVPress", {"base": "SnapKVPress", "window_size": 16, "first_stage_ratio": 0.25}),
    ("CriticalKVPress", {"base": "KnormPress"}),
]


def wrap(patch: pytest.MonkeyPatch) -> None:
    """Put every registered attention function into one that hands dropout on by place, as kvpress does for good."""

    def wrapper(own):  # type: ignore[no-untyped-def]
        def call(module, query, key, value, attention_mask, dropout, **kwargs):  # type: ignore[no-untyped-def]
            return own(module, query, key, value, attention_mask, dropout, **kwargs)

        return call

    for name in list(ALL_ATTENTION_FUNCTIONS):
        patch.setitem(ALL_ATTENTION_FUNCTIONS, name, wrapper(ALL_ATTENTION_FUNCTIONS[name]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_that_others_wrap_is_the_same(model: Models, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is the same while a model is attached, attached anew, and plain; with something recalled and with
    nothing."""
    net, ids = model("llama_gqa"), tokens(12)

    def logits(attachment: Attachment) -> list[Tensor]:
        found = [net(ids).logits]
        for recalls in (False, True):
            cache = MemoryCache(attachment, ListMemory(4, recalls=recalls), window=8)
            found += [net(part, past_key_values=cache).logits for part in ids.split(4, dim=1)]
        return found

    def same(found: list[Tensor], expected: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    with torch.no_grad():
        plain = net(ids).logits
        with attached(net, backend) as attachment:
            expected = logits(attachment)
            with monkeypatch.context() as patch:
                wrap(patch)
                assert same(logits(attachment), expected)
        with monkeypatch.context() as patch:
            wrap(patch)
            assert torch.equal(net(ids).logits, plain)
            with attached(net, backend) as attachment:
                assert same(logits(attachment), expected)


READER = """
import sys
import warnings

import torch

from model_worker import MemoryModel
from model_worker.attachment.loading import load_model

warnings.simplefilter("ignore")
base, tokenizer = load_model()
ids = torch.tensor([tokenizer.encode("The old man went down to the river with his dog.")])
with torch.no_grad():
    plain = base(ids).logits
assert "kvpress" not in sys.modules
with MemoryModel(base, tokenizer, memory=sys.argv[1], bank="notes", compressor=sys.argv[2], strict=True) as model:
    model.read("The old man went down to the river with his dog. " * 20)
    for chunk in model.memory.client.list_chunks("notes"):
        print((chunk.original_length, chunk.stored_length, chunk.producer.method))
with torch.no_grad():
    assert torch.equal(base(ids).logits, plain)
"""


@have
def test_a_text_is_read_where_kvpress_comes_after_the_model(tmp_path: Path) -> None:
    """Reading runs in a process of its own, which has not imported kvpress before."""
    spec = "press:press=KnormPress,ratio=0.5"
    command = [sys.executable, "-c", READER, str(tmp_path), spec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    assert len(rows) > 3
    assert all(row == (row[0], row[0] // 2, spec) for row in rows)


@have
@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
@pytest.mark.parametrize(("name", "given"), GIVEN)
def test_the_press_keeps_the_same(model: Models, name: str, given: dict[str, Any], family: str) -> None:
    """Compressing by the press itself drops from the cache; the rows that stay are ours, found by their keys."""
    net, ratio = model(family), 0.5 if given else 0.2
    ids = (3 + torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(1)))[:SIZE].tolist()  # no ties
    spec = f"press:press={name},ratio={ratio}" + "".join(f",{key}={value}" for key, value in given.items())
    with attached(net, "eager" if name == "ObservedAttentionPress" else "sdpa") as attachment:
        payload = compressor(spec).compress(encode(attachment, ids), attachment)
        assert payload.method == spec
        chunk, sizes = encode(attachment, ids), []
        for layer, rotated, kept in own_compress(made(name, ratio, **given), attachment, ids):
            keys, _, offsets = payload.layers[layer]
            sizes.append(kept.shape[2])
            assert keys.shape[1] == offsets.shape[-1] == kept.shape[2]
            assert bool((offsets.diff(dim=-1) > 0).all())
            by_head = offsets if offsets.ndim == 2 else offsets.expand(keys.shape[0], -1)
            for head, row in enumerate(by_head.tolist()):
                same = (kept[0, head][:, None] == rotated[0, head]).all(-1)
                assert row == same.any(0).nonzero()[:, 0].tolist()
                assert torch.equal(keys[head], chunk.layers[layer].keys[head, row])
        if name == "PyramidKVPress" and given:
            assert sorted(set(sizes), reverse=True) == sizes  # fewer in each layer
        else:
            assert sizes == [int(SIZE * (1 - ratio))] * 4
    assert not hasattr(net.base_model.layers[0].self_attn, "rotary_emb")


def made(name: str, ratio: float, base: str | None = None, **given: Any) -> Any:
    """Make the press as kvpress's users do."""
    import kvpress

    if base is None:
        return getattr(kvpress, name)(compression_ratio=ratio, **given)
    own = {key: given.pop(key) for key in ("epsilon", "first_stage_ratio") if key in given}
    return getattr(kvpress, name)(made(base, ratio, **given), **own)


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
        vars(attention)["rotary_emb"] = decoder.rotary_emb  # not as a module: that would be another reader
    handles = [attention.register_forward_hook(hook, with_kwargs=True) for attention in layers]
    encode(attachment, ids)
    for handle, attention in zip(handles, layers, strict=True):
        handle.remove()
        del vars(attention)["rotary_emb"]
    return found


@pytest.mark.skipif(HAVE, reason="kvpress is installed")
def test_how_to_get_it(client: kvbank.Client, model: Models) -> None:
    with attached(model("llama_gqa")) as attachment:
        with pytest.raises(InputError, match="pip install"):
            compressor("press:KnormPress,m=2").compress(encode(attachment, [5, 6, 7]), attachment)
        with pytest.raises(InputError, match="pip install"):
            Memory(attachment, client, bank(), tokenizer(), compressor="press:KnormPress,m=2").open()


@have
@pytest.mark.parametrize("name", SCORERS)
def test_a_chunk_that_is_too_short_is_stored_as_it_is(model: Models, name: str) -> None:
    """Chunks are stored under the name of the press where its budget holds all of them; else, where they cannot be
    scored, as `none`."""
    weights = name == "ObservedAttentionPress"
    with attached(model("llama_gqa"), "eager" if weights else "sdpa") as attachment:
        for length in (1, 2, 5, 30):
            ids = tokens(length)[0].tolist()
            alone = encode(attachment, ids)
            specs = {f"press:press={name},ratio=0.0": length, f"press:press={name},ratio=0.5": max(1, length // 2)}
            if name != "PyramidKVPress":
                specs[f"press:press={name},m=80"] = length
            for spec, kept in specs.items():
                payload = compressor(spec).compress(Captured(ids, 0, {}, "isolated"), attachment)
                whole = kept == length or payload.method == "none"
                assert payload.method == spec or (kept < length and payload.method == "none")
                if name in ("SnapKVPress", "PyramidKVPress"):
                    assert whole
                for layer, (keys, values, offsets) in payload.layers.items():
                    assert offsets.shape[-1] == (length if whole else kept)
                    assert not whole or torch.equal(keys, alone.layers[layer].keys)
                    assert not whole or torch.equal(values, alone.layers[layer].values)


@have
def test_what_no_chunk_can_be_scored_with_is_refused_when_the_bank_is_opened(
    client: kvbank.Client, model: Models
) -> None:
    with attached(model("llama_gqa"), tokenizer=tokenizer()) as attachment:

        def opened(spec: str) -> Memory:
            memory = Memory(attachment, client, bank(), tokenizer(), chunk=20, compressor=spec, strict=True)
            memory.open()
            return memory

        for spec, reason in (
            ("press:ObservedAttentionPress,m=4", "load the model with attn_implementation='eager'"),
            ("press:CriticalKVPress,base=ObservedAttentionPress,m=4", "attn_implementation='eager'"),
            (
                "press:SnapKVPress,m=4,window=3",
                "SnapKVPress has no parameter 'window'; it has: window_size, kernel_size",
            ),
            ("press:KnormPress,m=4,window_size=3", "no parameter 'window_size'; it has: none"),
            ("press:KnormPress,m=4,compression_ratio=0.5", "no parameter 'compression_ratio'"),
            ("press:SnapKVPress,m=4,window_size=few", "SnapKVPress does not take .*few"),
            ("press:LagKVPress,m=4,cross_scoring=1", "neither true nor false"),
            ("press:SnapKVPress,m=4,window_size=0", "SnapKVPress cannot score a chunk of 128 tokens"),
            ("press:SnapKVPress,m=4,window_size=999", "SnapKVPress cannot score a chunk of 256 tokens"),
        ):
            with pytest.raises(InputError, match=reason):
                opened(spec)
        with attached(model("qwen2"), tokenizer=tokenizer()) as other:
            spec = "press:CriticalKVPress,base=KnormPress,m=4"
            memory = Memory(other, client, bank(), tokenizer(), compressor=spec)
            with pytest.raises(InputError, match=r"CriticalKVPress cannot score a chunk of .*head_dim"):
                memory.open()
        memory = opened("press:SnapKVPress,m=4,window_size=16")
        for length in (20, 16, 4):
            memory.remember([Captured(tokens(length)[0].tolist(), 0, {}, "isolated")])
        stored = [(c.stored_length, c.producer.method) for c in client.list_chunks(str(memory.bank))]  # type: ignore[union-attr]
        spec = "press:press=SnapKVPress,m=4,window_size=16"
        assert stored == [(4, spec), (16, "none"), (4, spec)]


def test_what_is_refused() -> None:
    for name in ("AdaKVPress", "DuoAttentionPress", "ThinKPress", "Nonsense"):
        with pytest.raises(InputError, match=r"(?s)same number of tokens.*SnapKVPress"):
            compressor(f"press:{name},ratio=0.2")
    for spec in ("press:KnormPress", "press:KnormPress,ratio=0.5,m=3"):
        with pytest.raises(InputError, match="either ratio"):
            compressor(spec)
    for spec in ("press:KnormPress,ratio=1", "press:KnormPress,m=0"):
        with pytest.raises(InputError, match="below 1"):
            compressor(spec)
    for spec in (
        "press:CriticalKVPress,m=3",
        "press:KnormPress,m=3,base=KnormPress",
        "press:CriticalKVPress,m=3,base=A",
    ):
        with pytest.raises(InputError, match="takes base="):
            compressor(spec)
    with pytest.raises(InputError, match=r"another number of tokens in each layer: it takes ratio="):
        compressor("press:PyramidKVPress,m=3")
    for spec in ("press:KnormPress,m=3,window_size=", "press:KnormPress,m=3,a b=4", "press:KnormPress,m=3,k=4,k=5"):
        with pytest.raises(InputError, match="PARAMETER=VALUE"):
            compressor(spec)


def test_parameters_of_a_press_are_part_of_its_name() -> None:
    made = compressor("press:SnapKVPress,ratio=0.00001, window_size=32,kernel_size=7")
    assert made.spec == "press:press=SnapKVPress,ratio=1e-05,window_size=32,kernel_size=7"
    assert compressor(made.spec) == made
    assert compressor("press:CriticalKVPress,base=SnapKVPress,m=5,epsilon=0.5").spec == (
        "press:press=CriticalKVPress,m=5,base=SnapKVPress,epsilon=0.5"
    )
