"""Chunks are encoded on their own: by one forward without a memory, alone or together, or by a chain of small ones."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.model_parts import device_of
from model_worker.window.cache import MemoryCache
from model_worker.window.capture import Captured
from model_worker.window.local import LocalLayer
from model_worker.window.tova import TovaLayer, TovaRule


@dataclass
class _Keeper:
    """The memory of forwards whose only purpose is what their window holds behind them; what leaves it is let go."""

    chunk: int
    needs_queries: bool
    cadence, query_tokens, query, recent = 1, 0, "past", 0

    def remember(self, rows: Sequence[Captured | None]) -> None:
        pass

    def recall(self, rows: Sequence[Sequence[int]], without: object = None) -> None:
        return None


class _Ended(Exception):
    """All that a forward was made for is there."""


class _LastLayer(LocalLayer):
    """The last layer whose K-V are wanted: the forward ends when they are there, and what follows is not computed."""

    def keep_raw(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> None:
        super().keep_raw(keys, values, queries)
        raise _Ended  # there is no other way out of a decoder


def encode(attachment: Attachment, token_ids: list[int], start: int = 0, needs_queries: bool = False) -> Captured:
    """Encode a chunk by one forward without memory. start: its offset in the source."""
    [captured] = encode_together(attachment, [(token_ids, start)], needs_queries)
    return captured


def encode_together(
    attachment: Attachment, chunks: Sequence[tuple[list[int], int]], needs_queries: bool = False
) -> list[Captured]:
    """Encode chunks by one forward without memory, each in a row of its own, as if it were alone.

    The forward goes no further than the last memory layer. chunks: the token ids of each, and its offset in the source.
    Rows are filled up behind the tokens of a shorter chunk, to which nothing of that is visible: attention is causal,
    so that a mask would only cost time.
    """
    longest = max(len(ids) for ids, _ in chunks)
    rows = [[*ids, *[0] * (longest - len(ids))] for ids, _ in chunks]
    cache = MemoryCache(attachment, _Keeper(longest, needs_queries), window=longest, sinks=0)
    cache.layers[max(attachment.plan.memory_layers)] = _LastLayer()
    with suppress(_Ended):
        _feed(cache, rows, longest)
    return [_captured(cache, row, len(ids), start) for row, (ids, start) in enumerate(chunks)]


def encode_sinks(cache: MemoryCache, token_ids: list[int]) -> None:
    """Give a fresh cache the sinks of a stream that goes on in it, by one forward without memory over the sinks alone.

    token_ids: the first tokens of the stream, as many as are sinks, or fewer where the cache begins before the last of
    them. Nothing had left the window when these came in, so that their K-V are what the forwards of the stream gave.
    """
    own = MemoryCache(cache.attachment, None, sinks=cache.sinks.wanted)
    _feed(own, [token_ids], len(token_ids))
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
        _feed(cache, [token_ids], len(token_ids))
        cache.cuts.add(cache.columns.next_offset)
        return Captured(token_ids, start, cache.newest(len(token_ids)), "window")


def encode_online(
    attachment: Attachment, token_ids: list[int], rule: TovaRule, block: int
) -> tuple[Captured, dict[int, Tensor]]:
    """Encode a chunk in forwards of `block` tokens, each attending to what `rule` kept of those before it.

    Returns the chunk (keys and values as these forwards computed them) and the positions that are kept at the end,
    `[1 or Hkv, m]` by layer.
    """
    length = len(token_ids)
    cache = MemoryCache(attachment, _Keeper(length, needs_queries=False), window=length, local=rule, sinks=0)
    _feed(cache, [token_ids], block)
    kept = {}
    for index in attachment.plan.memory_layers:
        layer = cache.layers[index]
        assert isinstance(layer, TovaLayer)
        assert layer.positions is not None
        kept[index] = layer.positions[0].sort().values
    return _captured(cache, 0, length, 0), kept


def _feed(cache: MemoryCache, rows: list[list[int]], block: int) -> None:
    """Run the decoder over the tokens of each row, in forwards of `block` tokens."""
    ids = torch.tensor(rows, device=device_of(cache.attachment.model))
    with torch.no_grad():
        for part in torch.split(ids, block, dim=1):
            cache.attachment.decoder(input_ids=part, past_key_values=cache, use_cache=True)


def _captured(cache: MemoryCache, row: int, count: int, start: int) -> Captured:
    """Return the first `count` tokens of a row as a chunk that begins at `start` in its source."""
    captured = cache.captured(row, count)
    assert captured is not None
    return replace(captured, start=start)
