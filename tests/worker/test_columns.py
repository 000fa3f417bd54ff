"""Where the columns of a window stand: what is noted of them follows when tokens come, move and leave."""

import torch
from torch import Tensor

from model_worker.window.columns import Columns


def fed(columns: Columns, valid: list[list[bool]]) -> Columns:
    """Let columns come in of which these are tokens."""
    there = torch.tensor(valid)
    seen = columns.valid.long().sum(1, keepdim=True) if columns.count else torch.zeros(len(valid), 1, dtype=torch.long)
    positions = (seen + there.long().cumsum(1) - 1).clamp(min=0)
    columns.append(torch.zeros_like(positions), there, positions, positions[:, -1] + 1)
    return columns


def first(columns: Columns) -> list[int]:
    found: Tensor = columns.first()
    return found.tolist()


def test_the_first_token_follows_what_moves_and_leaves() -> None:
    columns = fed(Columns(), [[True] * 4, [False, False, True, True]])
    assert first(columns) == first(fed(columns, [[True], [True]])) == [0, 0]
    columns.drop(3)
    assert first(columns) == [3, 1]
    columns.move_back(2)
    assert first(columns) == [1, -1]
    again = Columns()
    assert first(fed(again, [[True], [True]])) == [0, 0]
    again.restore(columns.state())
    assert first(again) == [1, -1]
    again.reset()
    assert first(fed(again, [[True], [True]])) == [0, 0]


def test_a_row_whose_first_token_is_still_to_come_is_looked_at_again() -> None:
    columns = fed(Columns(), [[True, True], [False, False]])
    columns.positions = columns.positions + torch.tensor([[0], [7]])
    assert first(columns) == [0, 7]
    assert first(fed(columns, [[True], [True]])) == [0, 0]
