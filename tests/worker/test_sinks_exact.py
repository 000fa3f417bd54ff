"""Windows with sinks and memory give the logits of a computation by hand, in all families and at all positions."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from model_worker.attachment.attachment import Attachment
from model_worker.window.cache import MemoryCache
from model_worker.window.recalled import RecalledChunk
from model_worker.window.tova import TovaRule
from tests.support.diagonal import diagonal
from tests.worker import zoo
from tests.worker.by_hand import Stream, raw_kv
from tests.worker.tiny import ListMemory, attached, tokens

WINDOW, CHUNK, SINKS, PADS = 12, 4, 4, 6
PIECES = (7, 5, *[1] * 9, 6, 1, 4)  # the first pieces fill the window
LENGTH = sum(PIECES)
# Sliding layers; two rotations; a cap on scores; norms of queries and keys; part of the head rotated, twice.
FAMILIES = ["llama", "mistral", "gemma3_text", "gemma2", "qwen3", "phi", "gpt_neox"]
POSITIONS = ["zero", "near:3", "continual", "original"]


def batch() -> tuple[Tensor, Tensor]:
    """Return tokens of two rows, the second of which begins with pads, and their mask."""
    ids, mask = tokens(LENGTH, rows=2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :PADS] = 0
    return ids, mask


def remembered(net: PreTrainedModel) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """Return the K-V of another text, of which the second row has the first three tokens, from offset 2 on."""
    cache, at = DynamicCache(), torch.arange(5).expand(2, -1)
    with torch.no_grad():
        net(tokens(5, seed=12, rows=2), past_key_values=cache)
    there = torch.ones(2, 5, dtype=torch.bool)
    there[1, 3:] = False
    return raw_kv(net, cache, at), at + 2, there


def chunks(memory: Any) -> list[list[RecalledChunk]]:
    """Return what `remembered` gave as chunks that were recalled."""
    kv, _, there = memory
    rows = []
    for row, count in enumerate(there.sum(1).tolist()):
        own = {
            index: (keys[row, :, :count].float(), values[row, :, :count].float(), torch.arange(count))
            for index, (keys, values) in enumerate(kv)
        }
        rows.append([RecalledChunk(1, 2, own)])
    return rows


def worst(attachment: Attachment, cache: MemoryCache, by_hand: Stream) -> float:
    """Return by how much the logits differ, of the largest logit; all pieces of the batch are compared."""
    ids, mask = batch()
    far, end = 0.0, 0
    for count in PIECES:
        begin, end = end, end + count
        seen = attachment.model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits
        expected = by_hand.feed(ids[:, begin:end], mask[:, :end])
        real = mask[:, begin:end].bool()
        far = max(far, float((seen - expected)[real].abs().max() / max(1.0, float(expected[real].abs().max()))))
    return far


@pytest.mark.parametrize("backend", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "several"), diagonal(FAMILIES, {"+".join(own): own for own in (POSITIONS[::3], POSITIONS[1:3])}, every=3)
)
def test_logits_are_those_of_explicit_positions(family: str, several: Sequence[str], backend: str) -> None:
    """Compare at all positions, with a memory and without it, whether chunks leave or single tokens."""
    net, plain = zoo.build(family), zoo.build(family)
    if backend == "sdpa" and not net._supports_sdpa:
        pytest.skip(f"{family} has no sdpa: it caps scores")
    plain.set_attn_implementation("eager")
    memory = remembered(plain)
    for positions in several:
        with attached(net, backend, positions=positions) as attachment, torch.no_grad():
            for recalled, chunk in ((memory, CHUNK), (None, 0), (None, CHUNK), (memory, 0)):
                if recalled is None and positions in ("zero", "near:3"):
                    continue  # the same as `continual`
                port = ListMemory(CHUNK, recalls=False) if chunk else None
                cache = MemoryCache(attachment, port, window=WINDOW, sinks=SINKS)
                if recalled is not None:
                    cache.set_memory(chunks(recalled))
                stream = Stream(plain, WINDOW, chunk, SINKS, positions, recalled)
                assert worst(attachment, cache, stream) <= 1e-5, (positions, recalled is not None, chunk)


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_that_are_moved_back_change_nothing(positions: str) -> None:
    """Positions of the model end at 28, and those of the computation by hand go on to the end of the stream."""
    net, plain = (zoo.build("qwen3", max_position_embeddings=28) for _ in range(2))
    plain.set_attn_implementation("eager")
    memory = remembered(plain)
    with attached(net, positions=positions) as attachment, torch.no_grad():
        cache = MemoryCache(attachment, ListMemory(CHUNK, recalls=False), window=WINDOW, sinks=SINKS)
        cache.set_memory(chunks(memory))
        assert worst(attachment, cache, Stream(plain, WINDOW, CHUNK, SINKS, positions, memory)) <= 1e-5
        assert cache.columns.shift > 0


@pytest.mark.parametrize("sinks", [1, 9])
def test_other_numbers_of_sinks(sinks: int) -> None:
    """Sinks may leave the window one by one, and over several chunks."""
    net, plain = zoo.build("llama"), zoo.build("llama")
    plain.set_attn_implementation("eager")
    memory = remembered(plain)
    for recalled, chunk in ((memory, CHUNK), (None, 0)):
        with attached(net, positions="near:5") as attachment, torch.no_grad():
            port = ListMemory(CHUNK, recalls=False) if chunk else None
            cache = MemoryCache(attachment, port, window=WINDOW, sinks=sinks)
            if recalled is not None:
                cache.set_memory(chunks(recalled))
            assert worst(attachment, cache, Stream(plain, WINDOW, chunk, sinks, "near:5", recalled)) <= 1e-5


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("heads", ["shared", "own"])
def test_a_local_rule_attends_to_sinks_once(heads: str, memory: bool) -> None:
    """Layers with room for all tokens hold old ones at their distance, and the sinks stand before the window."""
    net, plain = zoo.build("qwen3"), zoo.build("qwen3")
    plain.set_attn_implementation("eager")
    recalled = remembered(plain) if memory else None
    with attached(net, positions="continual") as attachment, torch.no_grad():
        port = ListMemory(CHUNK, recalls=False) if memory else None
        cache = MemoryCache(attachment, port, window=WINDOW, sinks=SINKS, local=TovaRule(LENGTH, heads=heads))
        if recalled is not None:
            cache.set_memory(chunks(recalled))
        chunk = CHUNK if memory else 0
        stream = Stream(plain, WINDOW, chunk, SINKS, "continual", recalled, everything=True)
        assert worst(attachment, cache, stream) <= 1e-5


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_a_local_rule_never_chooses_a_sink_to_leave(heads: str) -> None:
    """Sinks in the window are held by every layer and head, however little attention they get, and none later."""
    net = zoo.build("qwen3")
    ids, mask = batch()
    with attached(net) as attachment, torch.no_grad():
        cache = MemoryCache(attachment, None, window=WINDOW, sinks=SINKS, local=TovaRule(SINKS + 1, heads=heads))
        end = 0
        for count in PIECES:
            begin, end = end, end + count
            net(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            held = cache.sinks.held
            for layer in cache.layers:
                there = torch.ones_like(layer.positions, dtype=torch.bool) if layer.valid is None else layer.valid
                early = (there & (layer.positions < SINKS)).sum(-1)
                for row, pads in enumerate((0, PADS)):
                    gone = 0 if held is None else int(held[row])
                    assert set(early[row].tolist()) == {min(SINKS, max(0, end - pads)) - gone}
        assert held is not None
        assert held.tolist() == [SINKS, SINKS]
