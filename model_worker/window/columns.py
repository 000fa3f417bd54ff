"""The columns of a window: which tokens stand in it, and where.

Tokens are counted twice. Logical positions grow for ever and are what transformers sees; the positions that enter RoPE
are shifted back from time to time, so that they stay within the trained length. This file owns both, and that a row's
tokens follow each other without a gap.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from model_worker.errors import InputError


class Columns:
    """Tokens, pads and positions of a window, `[B, L]` each, from the oldest column to the newest.

    ids: token ids. valid: false for pads. positions: where RoPE puts the tokens. start: offset of the first token ever
    counted in its source. shift: logical position minus RoPE position. next: the logical position of each row's next
    token, `[B]`, negative before a row's first; None before the first forward. newest: how many columns the last
    forward brought. holes: parts of the source that are gone, of one row, in order: the offset where each would begin
    if those before it were not there, and how many tokens it had. Positions have no hole.
    """

    def __init__(self, start: int = 0):
        self.start = start
        self.reset()

    def reset(self) -> None:
        """Forget all columns, and count from the same offset in the source again."""
        self.ids = self.valid = self.positions = torch.empty(0, 0)
        self.shift = self.newest = 0
        self.holes: list[tuple[int, int]] = []
        self.next: Tensor | None = None
        self._first: Tensor | None = None  # what `first` returns until columns leave or move

    @property
    def count(self) -> int:
        """Return the number of columns now."""
        return self.ids.shape[1]

    @property
    def rows(self) -> int:
        """Return the number of rows that are followed; 0 before the first forward."""
        return 0 if self.next is None else self.next.shape[0]

    @property
    def origin(self) -> int:
        """Return what is added to a RoPE position to give the token's offset in its source, before the first hole."""
        return self.start + self.shift

    @property
    def first_offset(self) -> int:
        """Return the offset of the first column in its source, of the next token where there is none; of one row."""
        return self.offset(int(self.positions[0, 0]) + self.origin) if self.count else self.next_offset

    @property
    def next_offset(self) -> int:
        """Return the offset of the next token in its source; of one row."""
        return self.offset(self._following)

    @property
    def _following(self) -> int:
        """Return the offset of the next token without the holes before it; of one row."""
        return self.start if self.next is None else self.start + int(self.next[0])

    def offset(self, place: int) -> int:
        """Return the offset in the source of a token whose offset without holes is `place`."""
        return place + sum(count for at, count in self.holes if at <= place)

    def column(self, offset: int) -> int:
        """Return how many columns stand before an offset in the source; of one row, for an offset behind the first."""
        for at, count in self.holes:
            offset -= min(count, max(0, offset - at))
        return offset - int(self.positions[0, 0]) - self.origin

    def skip(self, count: int) -> None:
        """Let the next token stand `count` tokens later in the source, because those between are gone; of one row."""
        if self.next is None:
            self.start += count
        elif count:
            self.holes.append((self._following, count))

    # -- what comes in --------------------------------------------------------------------------------------------

    def new(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, seen: int) -> tuple[Tensor, Tensor]:
        """Return which columns of `ids` `[B, Q]` are tokens and not pads, and their logical positions; both `[B, Q]`.

        mask: attention mask over all `seen` tokens so far and the new ones, or None. positions: as the caller gives
        them, or None. Raises InputError where rows or mask do not fit what was seen.
        """
        rows, count = ids.shape
        if self.rows and self.rows != rows:
            raise InputError(
                f"this cache follows {self.rows} rows, the input has {rows}: no beam search, and not several "
                "sequences for a prompt that was fed before"
            )
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != seen + count):
            raise InputError(f"attention_mask must cover all {seen + count} tokens so far, got {tuple(mask.shape)}")
        valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -count:].bool()
        if positions is None:
            if mask is None:
                positions = torch.arange(seen, seen + count, device=ids.device)[None]
            else:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
        return valid, positions.expand(rows, -1)

    def following(self, valid: Tensor, logical: Tensor) -> Tensor:
        """Return the logical position of each row's next token, `[B]`, after columns at the positions `logical`.

        Raises InputError unless these go on from the last ones.
        """
        if self.next is not None and logical.shape[1] == 1 and bool((valid & (logical == self.next[:, None])).all()):
            return self.next + 1  # as while text is written, in fewer steps
        count = valid.long().cumsum(-1)
        first = logical.gather(1, valid.int().argmax(dim=1, keepdim=True))[:, 0]
        start = first if self.next is None else torch.where(self.next < 0, first, self.next)
        expected = start[:, None] + count - 1
        if bool(((logical != expected) & valid).any()):
            row, column = ((logical != expected) & valid).nonzero()[0].tolist()
            raise InputError(
                f"position {int(logical[row, column])} in row {row} does not go on from the last one: "
                f"{int(expected[row, column])} follows. A cache is fed each token once, in order; generation with "
                "use_cache=False feeds all of them again"
            )
        before = torch.full_like(start, -1) if self.next is None else self.next
        return torch.where(count[:, -1] > 0, start + count[:, -1], before)

    def append(self, ids: Tensor, valid: Tensor, positions: Tensor, following: Tensor) -> None:
        """Put new columns behind the others. following: what the method of that name returned for them."""
        self.newest = ids.shape[1]
        if self.count:
            ids = torch.cat([self.ids, ids], dim=1)
            valid = torch.cat([self.valid, valid], dim=1)
            positions = torch.cat([self.positions, positions], dim=1)
        self.ids, self.valid, self.positions, self.next = ids, valid, positions, following

    # -- what moves and leaves ------------------------------------------------------------------------------------

    def first(self) -> Tensor:
        """Return the RoPE position of the first token (not pad) of each row, `[B]`."""
        if self._first is None:
            found = _first(self.positions, self.valid)
            if not bool(self.valid.any(dim=1).all()):
                return found  # the first token of a row is still to come
            self._first = found
        return self._first

    def first_new(self) -> Tensor:
        """Return the RoPE position of the first token (not pad) of each row in the last forward, `[B]`."""
        return _first(self.positions[:, -self.newest :], self.valid[:, -self.newest :])

    def lowest(self, logical: Tensor, valid: Tensor) -> int | None:
        """Return the smallest RoPE position in the window, in an empty one of the new columns; None without tokens."""
        live = self.positions[self.valid] if self.count else logical[valid] - self.shift
        return int(live.min()) if live.numel() else None

    def move_back(self, delta: int) -> None:
        """Lower all RoPE positions by `delta`; distances stay as they are."""
        self.positions, self._first = self.positions - delta, None
        self.shift += delta

    def drop(self, count: int) -> None:
        """Forget the oldest `count` columns."""
        self.ids, self.valid, self.positions = (x[:, count:] for x in (self.ids, self.valid, self.positions))
        self._first = None

    def oldest(self, row: int, count: int) -> tuple[list[int], int]:
        """Return ids of a row's oldest `count` columns without pads, and the offset of the first in its source.

        At least one of the columns must be a token.
        """
        valid = self.valid[row, :count]
        first = int(self.positions[row, :count][valid][0]) + self.origin
        return self.ids[row, :count][valid].tolist(), self.offset(first)

    def count_from(self, gone: int) -> None:
        """Let logical positions begin `gone` tokens later; RoPE positions and offsets in the source stay."""
        self.start, self.shift = self.start + gone, self.shift - gone
        if self.next is not None:
            self.next = torch.where(self.next < 0, self.next, self.next - gone)

    # -- from one process to the next -----------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the columns by name, and the holes between them, if there are any, with how far behind the first
        column they begin."""
        found = {"ids": self.ids, "valid": self.valid, "positions": self.positions}
        first = int(self.positions[0, 0]) + self.origin
        holes = [(at - first, count) for at, count in self.holes if at > first]
        return {**found, "holes": torch.tensor(holes)} if holes else found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the columns of a `state`; logical positions begin with the first of them."""
        self.ids, self.valid, self.positions, self._first = state["ids"], state["valid"], state["positions"], None
        self.holes = [(self.start + at, count) for at, count in state["holes"].tolist()] if "holes" in state else []
        self.shift = -int(self.positions[0, 0])
        self.next = self.positions[:, -1] + self.shift + 1


def _first(positions: Tensor, valid: Tensor) -> Tensor:
    """Return the first of the positions `[B, L]` in each row that is `valid`, `[B]`; the very first where none is."""
    if positions.shape[1] == 1:
        return positions[:, 0]
    return positions.gather(1, valid.int().argmax(dim=1)[:, None])[:, 0]
