"""A text is fed to a model as a stream, block by block, in a local window as the worker has it; losses come back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.model import MemoryModel
from model_worker.window.cache import MemoryCache
from model_worker.window.memory_port import MemoryPort


def window_of(model: MemoryModel, port: MemoryPort, start: int = 0) -> MemoryCache:
    """Make a fresh local window as `model` has it, over any memory. start: offset of its first token in the source."""
    return MemoryCache(
        model.attachment,
        port,
        window=model.window,
        start=start,
        local=model.local,
        sinks=model.sinks,
        ends=model.ends,
    )


@dataclass(frozen=True, slots=True)
class Fed:
    """The losses of fed tokens `[T]` (`[T - 1]` at the beginning of a text), and the logits behind the last of them."""

    nats: Tensor
    last: Tensor


@torch.no_grad()
def feed(
    model: MemoryModel,
    ids: Sequence[int],
    cache: MemoryCache,
    expected: Tensor | None = None,
    tell: Callable[[int], None] | None = None,
) -> Fed:
    """Feed tokens in blocks of a chunk, and return their losses.

    expected: the logits behind the token before the first, `[1, vocabulary]`. tell: called with the tokens of a block.
    """
    found, net = [], model.model
    for at in range(0, len(ids), model.chunk):
        seen = torch.tensor([list(ids[at : at + model.chunk])], device=net.device)
        logits = net(input_ids=seen, past_key_values=cache, use_cache=True, return_dict=True).logits[0].float()
        predicted = logits[:-1] if expected is None else torch.cat([expected, logits[:-1]])
        found.append(
            torch.nn.functional.cross_entropy(predicted, seen[0, -len(predicted) :], reduction="none").double().cpu()
        )
        expected = logits[-1:]
        if tell is not None:
            tell(seen.shape[1])
    assert expected is not None
    return Fed(torch.cat(found), expected)
