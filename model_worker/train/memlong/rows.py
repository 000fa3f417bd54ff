"""The rows of one step: tokens that follow each other, in blocks, and where the rows stand in their documents."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """How rows are cut: blocks of `size` tokens (a chunk), each of which sees itself and `before` blocks before it."""

    size: int
    before: int

    @property
    def window(self) -> int:
        """Return the tokens of a whole window."""
        return (self.before + 1) * self.size

    def first(self, count: int) -> Tensor:
        """Return where the window of each of `count` blocks of a row begins, in tokens from the row's first, `[n]`."""
        return (torch.arange(count) - self.before).clamp(min=0) * self.size


@dataclass(frozen=True, slots=True)
class Rows:
    """B rows of n blocks of S tokens each.

    ids: `[B, n * S]`. labels: `[B, n * S]`, the token that follows each, -100 where none is asked for. begins: `[B]`,
    the offset of a row's first token in its document. sinks: `[B, F]`, the first tokens of the documents, where these
    stay in the window; F is 0 without sinks.
    """

    ids: Tensor
    labels: Tensor
    begins: Tensor
    sinks: Tensor
