"""A chunk is encoded on its own: by one forward without a memory, or by a chain of small ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.model_parts import device_of
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.tova import TovaLayer, TovaRule


@dataclass
class _Keeper:
    """The memory of a forward whose only purpose is what it captures."""

    chunk: int
    needs_queries: bool
    captured: Captured | None = None
    cadence, query_tokens, query, recent = 1, 0, "past", 0

    def remember(self, rows: Sequence[Captured | None]) -> None:
        self.captured = rows[0]

    def recall(self, rows: Sequence[Sequence[int]], without: object = None) -> None:
        return None


def encode(attachment: Attachment, token_ids: list[int], start: int = 0, needs_queries: bool = False) -> Captured:
    """Encode a chunk by one forward without memory. start: its offset in the source."""
    keeper, cache = _forward(attachment, token_ids, needs_queries, None, len(token_ids))
    return Captured(token_ids, start, _left_by(cache, keeper).layers, "isolated")


def encode_sinks(cache: MemoryCache, token_ids: list[int]) -> None:
    """Give a fresh cache the sinks of a stream that goes on in it, by one forward without memory over the sinks alone.

    token_ids: the first tokens of the stream, as many as are sinks, or fewer where the cache begins before the last of
    them. Nothing had left the window when these came in, so that their K-V are what the forwards of the stream gave.
    """
    own = MemoryCache(cache.attachment, None, sinks=cache.sinks.wanted)
    ids = torch.tensor([token_ids], device=device_of(cache.attachment.model))
    with torch.no_grad():
        cache.attachment.decoder(input_ids=ids, past_key_values=own, use_cache=True)
    own.flush()
    cache.sinks.restore(own.sinks.state())


class Behind:
    """Encodes chunks of a text that follow each other, each behind a window of those before it.

    The window is left chunk by chunk, as by a text that is read. window, sinks: tokens of the local context. chunk: the
    most tokens of one. start: offset of the first chunk in its source. needs_queries: whether queries of the memory
    layers are captured too.
    """

    def __init__(
        self, attachment: Attachment, window: int, sinks: int, *, chunk: int, start: int, needs_queries: bool = False
    ):
        keeper = _Keeper(chunk, needs_queries)
        self._cache = MemoryCache(attachment, keeper, window=window, start=start, sinks=sinks)

    def encode(self, token_ids: list[int], start: int) -> Captured:
        """Encode the next chunk. start: its offset in the source."""
        cache = self._cache
        ids = torch.tensor([token_ids], device=device_of(cache.attachment.model))
        with torch.no_grad():
            cache.attachment.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.cuts.add(cache.columns.next_offset)
        return Captured(token_ids, start, cache.newest(len(token_ids)), "window")


def encode_online(
    attachment: Attachment, token_ids: list[int], rule: TovaRule, block: int
) -> tuple[Captured, dict[int, Tensor]]:
    """Encode a chunk in forwards of `block` tokens, each attending to what `rule` kept of those before it.

    Returns the chunk (keys and values as these forwards computed them) and the positions that are kept at the end,
    `[1 or Hkv, m]` by layer.
    """
    keeper, cache = _forward(attachment, token_ids, False, rule, block)
    kept = {}
    for index in attachment.plan.memory_layers:
        layer = cache.layers[index]
        assert isinstance(layer, TovaLayer)
        assert layer.positions is not None
        kept[index] = layer.positions[0].sort().values
    return _left_by(cache, keeper), kept


def _forward(
    attachment: Attachment, token_ids: list[int], needs_queries: bool, rule: TovaRule | None, block: int
) -> tuple[_Keeper, MemoryCache]:
    keeper = _Keeper(len(token_ids), needs_queries)
    cache = MemoryCache(attachment, keeper, window=len(token_ids), local=rule, sinks=0)
    ids = torch.tensor([token_ids], device=device_of(attachment.model))
    decoder = attachment.decoder
    with torch.no_grad():
        for part in torch.split(ids, block, dim=1):
            decoder(input_ids=part, past_key_values=cache, use_cache=True)
    return keeper, cache


def _left_by(cache: MemoryCache, keeper: _Keeper) -> Captured:
    cache.flush()
    assert keeper.captured is not None
    return keeper.captured
