"""Where sinks and recalled memory stand before a window: positions that are made of positions, without any state.

The positions are those that enter RoPE, of which attention sees differences only; they may be negative. Rows of a batch
have places of their own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.attachment.attachment import Attachment
from model_worker.attachment.plan import near_distance
from model_worker.errors import InputError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a window stands while a forward runs.

    first: `[B]`, the position of each row's first token in the window. new: `[B]`, of its first token in the running
    forward. origin: what is added to a position to give a token's offset in its source.
    """

    first: Tensor
    new: Tensor
    origin: int

    def moved(self, before: "Place", positions: str) -> bool:
        """Tell whether what stands before the window has other positions than at the place `before`."""
        if self.origin != before.origin or not (self.first is before.first or torch.equal(self.first, before.first)):
            return True
        return near_distance(positions) is not None and not torch.equal(self.new, before.new)

    def keeps_rest(self, before: "Place", positions: str) -> bool:
        """Tell whether nothing but the position of recalled tokens can differ from the place `before`, where there are
        no sinks: all tokens of a row have one."""
        return near_distance(positions) is not None

    def keeps_sinks(self, before: "Place", positions: str) -> bool:
        """Tell whether sinks stand where they stood at the place `before`, though what was recalled may have moved.

        Memory that is `near` moves with each token that is decoded; once it stands in the window, sinks do not.
        """
        if near_distance(positions) is None or self.moved(before, "zero"):
            return False
        return torch.equal(*(_one_place(positions, place).minimum(self.first) for place in (self, before)))


def memory_positions(positions: str, place: Place, offsets: Tensor, valid: Tensor) -> Tensor:
    """Return where recalled tokens stand: `[B, R]`, `[B, 1]` where all of a row stand at one position, or `[B, H, R]`
    where heads keep different tokens.

    positions: of the plan. offsets: `[B, 1 or H, R]`, of the tokens in their source. valid: `[B, R]`, false for pads.

    `zero`: all just before the window. `near:N`: all N tokens before the first token of the running forward, but not
    before the window's beginning. `continual`: numbered up to the window. `original`: where they stood.
    """
    if positions == "original":
        return offsets - place.origin
    if positions == "continual":
        order = valid.long().cumsum(-1)
        return place.first[:, None] - order[:, -1:] + order - 1
    return _one_place(positions, place)[:, None]


def _one_place(positions: str, place: Place) -> Tensor:
    """Return the one position at which all recalled tokens of a row stand in `zero` and `near:N`, `[B]`."""
    one, distance = place.first - 1, near_distance(positions)
    return one if distance is None else torch.maximum(one, place.new - 1 - distance)


def sink_positions(positions: str, origin: int, offsets: Tensor, held: Tensor, follows: Tensor) -> Tensor:
    """Return where sinks stand, `[B, S]`: just before what follows them; in `original` where they stood.

    positions: of the plan. origin: see `Place`. offsets: `[B, S]`, of the sinks in their source. held: `[B]`, how many
    sinks each row has; they come first. follows: `[B]`, the lowest position of what is recalled and of the window.
    """
    if positions == "original":
        return offsets - origin
    return (follows - held)[:, None] + torch.arange(offsets.shape[1], device=offsets.device)


@dataclass(frozen=True, slots=True)
class Room:
    """The positions that the model of `attachment` was trained for, as a window uses them. All are counts of tokens.

    window: local tokens. memory: what is recalled at most, which has a position for each token in `continual` alone.
    """

    attachment: Attachment
    window: int
    memory: int

    @property
    def _placed(self) -> int:
        return self.memory if self.attachment.plan.positions == "continual" else 1

    @property
    def left(self) -> int | None:
        """Return how many positions are left for sinks; None where nothing bounds them."""
        trained = self.attachment.trained_length
        return None if trained is None else max(trained - self.window - self._placed, 0)

    def check(self, sinks: int) -> None:
        """Raise InputError where sinks, memory and window do not stand within the length of training."""
        trained = self.attachment.trained_length
        if trained is not None and sinks + self._placed + self.window > trained:
            first = f"{sinks} sinks + " if sinks else ""
            raise InputError(
                f"{first}window {self.window} + {self._placed} positions of memory exceed the {trained} that the model "
                "was trained for; choose a smaller window, chunk, top_k or recent, or fewer sinks"
            )
