"""The slots that the encoder leaves of a context, and how several contexts stand one behind the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.errors import InputError


@dataclass(frozen=True)
class Slots:
    """The memory of one context of S spans, S * k slots.

    soft: `[S*k, d]`, after the final norm; None with the interface `kv`. layers: layer -> (keys `[Hkv, S*k, D]` before
    RoPE, values `[Hkv, S*k, D]`), all layers; None with the interface `soft`. lengths: source tokens of each span.
    positions: `[S*k]` long, where the decoder places the slots: 0, 1, 2, .. or, spread, offsets in the source.
    """

    soft: Tensor | None
    layers: Mapping[int, tuple[Tensor, Tensor]] | None
    lengths: tuple[int, ...]
    positions: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def tokens(self) -> int:
        """Return the number of source tokens."""
        return sum(self.lengths)

    @property
    def next_position(self) -> int:
        """Return where the decoder's positions go on: behind contiguous slots, or behind the source of spread ones."""
        count = len(self.positions)
        contiguous = torch.equal(self.positions.cpu(), torch.arange(count))
        return count if contiguous else self.tokens


def combine(several: Sequence[Slots]) -> Slots:
    """Join contexts in the given order. Raises InputError where there are none, or two interfaces."""
    if not several:
        raise InputError("there are no slots to combine")
    if len({slots.soft is None for slots in several}) > 1:
        raise InputError("slots of the interfaces soft and kv do not combine")
    positions, start = [], 0
    for slots in several:
        positions.append(slots.positions + start)
        start += slots.next_position
    lengths = tuple(length for slots in several for length in slots.lengths)
    if several[0].layers is None:
        return Slots(torch.cat([s.soft for s in several if s.soft is not None]), None, lengths, torch.cat(positions))
    layers = {
        layer: (
            torch.cat([s.layers[layer][0] for s in several if s.layers is not None], dim=1),
            torch.cat([s.layers[layer][1] for s in several if s.layers is not None], dim=1),
        )
        for layer in several[0].layers
    }
    return Slots(None, layers, lengths, torch.cat(positions))


def spans(tokens: int, capacity: int) -> list[slice]:
    """Split a context equally: as few spans as hold it, each as long as the first but for the last.

    A context of capacity + 1 tokens becomes two halves, never a full span and a single token. Raises InputError for an
    empty one.
    """
    if tokens < 1:
        raise InputError("an empty context cannot be encoded")
    count = -(-tokens // capacity)
    length = -(-tokens // count)
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def spread(tokens: int, slots: int) -> list[int]:
    """Return the position of each memory token of a span: the middle of the part of the source it stands for."""
    return [(2 * slot + 1) * tokens // (2 * slots) for slot in range(slots)]
