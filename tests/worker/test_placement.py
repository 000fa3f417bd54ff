"""Where memory and sinks stand before a window: pure arithmetic of positions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model_worker.errors import InputError
from model_worker.window.cache import MemoryCache
from model_worker.window.encoding import encode
from model_worker.window.placement import Place, memory_positions, sink_positions
from tests.worker.tiny import attached, build, recalled, tokens, worst

# Two rows: the first has three recalled tokens, the second one, behind a pad.
VALID = torch.tensor([[True, True, True], [False, True, False]])
OFFSETS = torch.tensor([[[10, 11, 30]], [[0, 5, 0]]])


def place(first: int, new: int, origin: int = 0) -> Place:
    return Place(torch.tensor([first, first + 1]), torch.tensor([new, new + 1]), origin)


@pytest.mark.parametrize(
    ("positions", "new", "expected"),
    [
        ("zero", 150, [[99, 99, 99], [100, 100, 100]]),
        ("continual", 150, [[97, 98, 99], [100, 100, 100]]),
        ("near:16", 150, [[133, 133, 133], [134, 134, 134]]),
        ("near:64", 150, [[99, 99, 99], [100, 100, 100]]),  # not before the window's beginning
        ("near:0", 150, [[149, 149, 149], [150, 150, 150]]),
        ("near:16", 100, [[99, 99, 99], [100, 100, 100]]),
    ],
)
def test_memory(positions: str, new: int, expected: list[list[int]]) -> None:
    found = memory_positions(positions, place(100, new), OFFSETS, VALID)
    assert found.expand_as(VALID)[VALID].tolist() == torch.tensor(expected)[VALID].tolist()


def test_memory_where_it_stood() -> None:
    assert memory_positions("original", place(100, 150, 7), OFFSETS, VALID).tolist() == (OFFSETS - 7).tolist()


def test_sinks_stand_just_before_what_follows_them() -> None:
    offsets, held, follows = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 0]]), torch.tensor([4, 2]), torch.tensor([97, 100])
    found = sink_positions("continual", 0, offsets, held, follows)
    assert found[0].tolist() == [93, 94, 95, 96]
    assert found[1, :2].tolist() == [98, 99]
    assert sink_positions("original", 50, offsets, held, follows).tolist() == (offsets - 50).tolist()


def logits(net: Any, positions: str, feed: list[int], ids: Tensor, **attach: Any) -> Tensor:
    """Return the logits of tokens that are fed in pieces, with a chunk of six tokens before them."""
    with attached(net, positions=positions, **attach) as attachment, torch.no_grad():
        cache = MemoryCache(attachment, None)
        cache.set_memory([recalled([encode(attachment, tokens(6, seed=9)[0].tolist())])])
        return torch.cat([net(part, past_key_values=cache).logits for part in ids.split(feed, 1)], 1)


@pytest.mark.parametrize("mode", ["per_layer", "memlong"])
def test_near_is_zero_as_long_as_the_window_is_short(mode: str) -> None:
    """Memory moves with the tokens that are processed, and is at `zero` until these are N tokens from the beginning."""
    net, ids = build("llama_gqa"), tokens(24)
    feed = [8, *[1] * 16]
    zero, near = (logits(net, positions, feed, ids, mode=mode) for positions in ("zero", "near:12"))
    assert torch.equal(zero[:, :13], near[:, :13])
    assert worst(zero[:, 13:], near[:, 13:]) > 1e-3
    assert torch.equal(logits(net, "near", feed, ids, mode=mode), logits(net, "near:32", feed, ids, mode=mode))


def test_what_stands_near_is_at_its_distance_from_every_token() -> None:
    """Attention to memory alone is the same at every step: a window of other tokens changes the distance to none."""
    net, ids = build("llama_gqa"), tokens(20)
    with attached(net, positions="near:3") as attachment, torch.no_grad():
        cache = MemoryCache(attachment, None)
        cache.set_memory([recalled([encode(attachment, tokens(6, seed=9)[0].tolist())])])
        for part in ids.split(1, 1):
            net(part, past_key_values=cache)
            new = int(cache.columns.first_new())
            raw, held = cache.recalled.blocks[1].keys, cache.recalled.retrieved(cache.columns)[1].keys
            expected = attachment.ropes[1].rotate(raw, torch.full((1, 6), max(-1, new - 4)))
            assert worst(held, expected) <= 1e-6
        assert new == 19


@pytest.mark.parametrize("positions", ["nearby", "near:", "near:-1", "near:x", "near:1.5", "near:1234567", 3])
def test_positions_that_there_are_not(positions: Any) -> None:
    with pytest.raises(InputError, match="is not one of"), attached(build("llama_gqa"), positions=positions):
        pass


def test_a_model_may_be_made_for_near() -> None:
    net = build("llama_gqa")
    net.config.kvbank = {"mode": "per_layer", "positions": "near"}
    with attached(net) as attachment:
        assert attachment.plan.positions == "near:32"
