"""A prompt is answered greedily here, over a cache that a measurement has made, without `generate`.

`generate` takes no cache that has tokens already, and warns of lengths that are measured here.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from model_worker.window.cache import MemoryCache


@torch.no_grad()
def answer(model: Any, cache: MemoryCache | DynamicCache, ids: Sequence[int], tokens: int, piece: int) -> list[int]:
    """Return at most `tokens` new tokens behind a prompt; an end of the text ends them.

    piece: tokens of the prompt that are fed at once, except that the last piece has all that is left; 0 is all.
    """
    at = 0
    while piece and len(ids) - at > piece:
        _next(model, cache, ids[at : at + piece])
        at += piece
    new = [_next(model, cache, ids[at:])]
    ends = _ends(model)
    while len(new) < tokens and new[-1] not in ends:
        new.append(_next(model, cache, new[-1:]))
    return new


def _next(model: Any, cache: MemoryCache | DynamicCache, ids: Sequence[int]) -> int:
    seen = torch.tensor([list(ids)], device=model.device)
    out = model(input_ids=seen, past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True)
    return int(out.logits[0, -1].argmax())


def _ends(model: Any) -> set[int]:
    """Return the tokens that end a text, as the model's configuration for generation says."""
    end = model.generation_config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def read_plain(model: Any, ids: Sequence[int]) -> DynamicCache:
    """Return the plain cache of a text that is read in one forward; an empty one for no tokens."""
    cache = DynamicCache()
    if ids:
        with torch.no_grad():
            _next(model, cache, ids)
    return cache


def copied(cache: DynamicCache) -> DynamicCache:
    """Return a copy of a cache that a forward may write to."""
    return copy.deepcopy(cache)
