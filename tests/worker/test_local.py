"""TOVA at decode time: the local cache holds m tokens of whatever age, and what leaves the window is remembered still.

Its numbers are compared with the authors' code in tests/golden/test_tova.py.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvbank
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.window.cache import MemoryCache
from model_worker.window.tova import TovaRule
from tests.support.diagonal import diagonal, rotated
from tests.worker.tiny import BACKENDS, ListMemory, attached, bank, build, tokenizer, tokens, worst

Models = Callable[[str], PreTrainedModel]
FAMILIES = ["llama_mha", "llama_gqa", "llama_yarn", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox"]


@pytest.mark.parametrize(("family", "backend"), diagonal(FAMILIES, BACKENDS, first=1, every=2))
def test_within_the_budget_nothing_changes(model: Models, family: str, backend: str) -> None:
    net, ids = model(family), tokens(20, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with torch.no_grad(), attached(net, backend) as attachment:
        plain = net(ids, attention_mask=mask).logits
        cache = MemoryCache(attachment, local=TovaRule(20))
        found = [
            net(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
            for a, b in ((0, 9), (9, 13), (13, 20))
        ]
    assert worst(torch.cat(found, 1)[0], plain[0]) <= 5e-6
    assert worst(torch.cat(found, 1)[1, 6:], plain[1, 6:]) <= 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("last", [1, 4])
def test_a_padded_row_is_as_it_is_alone(model: Models, last: int, heads: str, backend: str) -> None:
    """Rows keep their own tokens, and pads leave first."""
    net, ids = model("llama_gqa"), tokens(32, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    steps = [(0, 16), *((i, i + 1) for i in range(16, 24)), (24, 32)]
    with torch.no_grad(), attached(net, backend) as attachment:
        batch = MemoryCache(attachment, local=TovaRule(6, last, heads))
        rows = [MemoryCache(attachment, local=TovaRule(6, last, heads)) for _ in range(2)]
        for a, b in steps:
            together = net(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=batch).logits
            for row, (cache, pads) in enumerate(zip(rows, (0, 7), strict=True)):
                alone = net(ids[row : row + 1, max(a, pads) : b], past_key_values=cache).logits[0]
                assert worst(together[row, -alone.shape[0] :], alone) <= 5e-6
        for held, *alone in zip(batch.layers, *(cache.layers for cache in rows), strict=True):
            assert held.keys.shape[2] == 6
            for row, one in enumerate(alone):
                assert torch.equal(held.positions[row], one.positions[0])


@pytest.mark.parametrize(
    ("pads_and_heads", "backend", "positions"),
    diagonal(
        {f"{pads} {heads}": (pads, heads) for pads in (0, 7, 15) for heads in ("shared", "own")},
        BACKENDS,
        {"28": 28, "256": 256},
        every=2,
    ),
)
def test_the_order_in_which_tokens_are_held_does_not_show(
    positions: int, pads_and_heads: tuple[int, str], backend: str
) -> None:
    """Caches that write new tokens over old ones are compared with caches that are put in order after every step; also
    when they are moved back (28 positions), among pads, and when a prompt comes after single tokens."""
    pads, heads = pads_and_heads
    net, ids = build("llama_gqa", positions=positions), tokens(44, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    steps = [(0, 16), *((i, i + 1) for i in range(16, 25)), (25, 30), *((i, i + 1) for i in range(30, 44))]
    disordered = 0
    with torch.no_grad(), attached(net, backend) as attachment:
        loose, tidy = (MemoryCache(attachment, window=16, local=TovaRule(6, heads=heads)) for _ in range(2))
        for a, b in steps:
            found, expected = (
                net(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits for cache in (loose, tidy)
            )
            real = mask[:, a:b].bool()
            assert worst(found[real], expected[real]) <= 5e-6
            for one, other in zip(loose.layers, tidy.layers, strict=True):
                other.settle()
                assert torch.equal(one.positions.sort(dim=2).values, other.positions)
                disordered += not torch.equal(one.positions, other.positions)
        assert (loose.columns.shift > 0) == (positions == 28)
        assert disordered > 20
        for one, other in zip(loose.layers, tidy.layers, strict=True):
            one.settle()
            assert torch.equal(one.positions, other.positions)
            assert worst(one.keys, other.keys) <= 2e-6
            assert worst(one.values, other.values) <= 2e-6


class Level(TovaRule):
    """All tokens are equal."""

    def scores(self, weights: Tensor, kv_heads: int, valid: Tensor | None = None) -> Tensor:
        return torch.zeros_like(super().scores(weights, kv_heads, valid))


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_among_equals_the_later_token_stays_wherever_it_is_held(model: Models, heads: str) -> None:
    net, ids, at = model("llama_gqa"), tokens(60), 0
    with attached(net) as attachment:
        cache = MemoryCache(attachment, local=Level(6, heads=heads))
        for new, with_grad in [(8, False), *[(1, False)] * 5, (3, False), *[(1, False)] * 8, (1, True), (7, True)]:
            with torch.set_grad_enabled(with_grad):
                net(ids[:, at : at + new], past_key_values=cache)
            at += new
            for layer in cache.layers:
                assert (layer.positions.sort(dim=2).values == torch.arange(at - 6, at)).all()
    assert at == 32


def test_a_decoded_token_copies_nothing_else(model: Models) -> None:
    net, ids = model("llama_gqa"), tokens(24, rows=2)
    with torch.no_grad(), attached(net) as attachment:
        cache = MemoryCache(attachment, local=TovaRule(6))
        net(ids[:, :12], past_key_values=cache)
        places = set()
        for part in ids[:, 12:].split(1, dim=1):
            net(part, past_key_values=cache)
            places.add(tuple((layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers))
    assert len(places) == 1


@pytest.mark.parametrize("taken", ["state", "copy"])
def test_what_was_taken_of_a_cache_stays_as_it_was(model: Models, taken: str) -> None:
    """Columns of one row and one head are contiguous even before a free one."""
    net, ids = model("gemma"), tokens(24)
    with torch.no_grad(), attached(net) as attachment:
        cache = MemoryCache(attachment, window=24, local=TovaRule(6))
        for part in ids[:, :16].split(1, dim=1):
            net(part, past_key_values=cache)
        state = cache.state() if taken == "state" else vars(copy.deepcopy(cache.layers[1]))
        held = {name: part for name, part in state.items() if isinstance(part, Tensor)}
        before = {name: part.clone() for name, part in held.items()}
        for part in ids[:, 16:].split(1, dim=1):
            net(part, past_key_values=cache)
    assert len(held) >= 3
    assert all(torch.equal(held[name], part) for name, part in before.items())


@pytest.mark.parametrize("other", [torch.inference_mode, torch.enable_grad])
def test_steps_in_other_grad_modes(other: Callable[[], AbstractContextManager[None]]) -> None:
    """Tensors that torch forbids to be written, or that a backward pass needs, are not written."""
    net, ids = build("llama_gqa"), tokens(24)
    with attached(net) as attachment:
        caches = [MemoryCache(attachment, local=TovaRule(6)) for _ in range(2)]
        losses = []
        for index, part in enumerate(ids.split(1, dim=1)):
            with torch.no_grad():
                expected = net(part, past_key_values=caches[0]).logits
            with torch.no_grad() if index // 3 % 2 else other():  # the first that leaves does so under `other`
                found = net(part, past_key_values=caches[1]).logits
            assert worst(found.detach(), expected) <= 5e-6
            losses += [found.square().sum()] if found.requires_grad else []
        if losses:
            torch.stack(losses).sum().backward()
            assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
        assert bool(losses) == (other is torch.enable_grad)


@pytest.mark.parametrize("family", rotated(FAMILIES, 1))
def test_backends_agree(model: Models, family: str) -> None:
    """Attention of one query is taken with sdpa from the weights that choose; with eager both are the backend's."""
    net, ids, logits = model(family), tokens(24, rows=2), []
    for backend in BACKENDS:
        with torch.no_grad(), attached(net, backend) as attachment:
            cache = MemoryCache(attachment, local=TovaRule(6))
            logits.append(torch.cat([net(part, past_key_values=cache).logits for part in ids.split(1, dim=1)], 1))
    assert worst(*logits) <= 5e-6


@pytest.mark.parametrize(("heads", "piece"), [("shared", 1), ("own", 3)])
def test_local_cache_and_memory_are_both_bounded(model: Models, heads: str, piece: int) -> None:
    """Chunks leave with the window, whole and in order, though old tokens of them may still be attended to."""
    net, ids = model("llama_gqa"), tokens(41)
    with torch.no_grad(), attached(net) as attachment:
        memory = ListMemory(4, queries=True)
        cache = MemoryCache(attachment, memory, window=8, local=TovaRule(6, heads=heads))
        for part in ids.split(piece, dim=1):
            net(part, past_key_values=cache)
            assert cache.physical <= 8
            assert {layer.held for layer in cache.layers} <= set(range(7))
            assert all(layer.raw_keys.shape[2] == cache.physical for layer in cache.layers)
        assert any(int(layer.positions.min()) < 33 for layer in cache.layers)
        cache.flush()
        assert {layer.held for layer in cache.layers} == {0}
    assert [i for c in memory.rows[0] for i in c.token_ids] == ids[0].tolist()
    assert [c.start for c in memory.rows[0]] == list(range(0, 41, 4))
    assert all(len(c) == c.layers[2].keys.shape[1] == c.layers[2].values.shape[1] for c in memory.rows[0])


def test_captured_keys_and_values_are_the_models_own(model: Models) -> None:
    """Captured K-V of a layer are those of the plain window where the budget holds all."""
    net, ids = model("qwen3"), tokens(24)
    kept = []
    with torch.no_grad(), attached(net) as attachment:
        for local in (None, TovaRule(24)):
            memory = ListMemory(8, recalls=False)
            cache = MemoryCache(attachment, memory, window=24, local=local)
            for part in ids.split(6, dim=1):
                net(part, past_key_values=cache)
            cache.flush()
            kept.append(memory.rows[0])
    for plain, tova in zip(*kept, strict=True):
        for layer, seen in plain.layers.items():
            assert worst(seen.keys, tova.layers[layer].keys) <= 2e-6
            assert worst(seen.values, tova.layers[layer].values) <= 2e-6


@pytest.mark.parametrize("piece", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_beyond_the_trained_length(model: Models, piece: int) -> None:
    """Positions are moved back; attention sees differences only, so nothing else changes."""
    ids, logits = tokens(96), []
    for positions in (40, 4096):
        net = build("llama_gqa", positions=positions)
        with torch.no_grad(), attached(net) as attachment:
            cache = MemoryCache(attachment, window=8, local=TovaRule(6))
            logits.append(torch.cat([net(p, past_key_values=cache).logits for p in ids.split(piece, dim=1)], 1))
            assert (cache.columns.shift > 0) == (positions == 40)
            assert cache.get_seq_length() == 96
    assert worst(*logits) <= 2e-5


def test_a_state_goes_on_in_another_cache(model: Models) -> None:
    net, ids = model("llama_gqa"), tokens(30)
    with torch.no_grad(), attached(net) as attachment:
        first = MemoryCache(attachment, ListMemory(4, recalls=False), window=8, local=TovaRule(5, heads="own"))
        for part in ids[:, :20].split(2, dim=1):
            net(part, past_key_values=first)
        gone = first.count_from_window()
        second = MemoryCache(attachment, ListMemory(4, recalls=False), window=8, start=gone, local=first.local)
        second.restore(first.state())
        for part in ids[:, 20:].split(2, dim=1):
            assert torch.equal(net(part, past_key_values=first).logits, net(part, past_key_values=second).logits)


def test_generate_with_a_model_and_a_service(client: kvbank.Client) -> None:
    options = {"memory": client, "chunk": 8, "window": 16, "top_k": 1}
    text = " ".join(f"w{i}" for i in tokens(40)[0].tolist())
    said = {}
    for local in (None, "tova:m=1000", "tova:m=5"):
        with MemoryModel(build("llama_gqa"), tokenizer(), bank=bank(), local=local, **options) as chat:
            cache = chat.cache()
            said[local] = chat.generate(text, cache=cache, max_new_tokens=20, do_sample=False)
            assert {layer.held for layer in cache.layers} == {{None: 11, "tova:m=1000": 59, "tova:m=5": 5}[local]}
            assert chat.memory.stats.written == 6
            assert chat.losses(text, memory=None).nll.shape == (39,)
    assert len(said["tova:m=5"].split()) == 20


def test_what_is_refused(model: Models, client: kvbank.Client) -> None:
    with attached(model("mistral_sliding")) as attachment, pytest.raises(InputError, match="sliding"):
        MemoryCache(attachment, local=TovaRule(4))
    for local in ("window:m=4", "tova:m=4,block=1"):
        with pytest.raises(InputError, match="write tova:m=N"):
            MemoryModel(model("llama_gqa"), tokenizer(), memory=client, bank=bank(), local=local)
