"""Keys that move by a token at a time are rotated as all others."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from model_worker.attachment.moving_keys import MovingKeys
from tests.support.diagonal import rotated
from tests.worker.tiny import FAMILIES, attached


@pytest.mark.parametrize("family", rotated(FAMILIES, 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_moving_keys_are_those_that_are_rotated_anew(
    model: Callable[..., PreTrainedModel], family: str, dtype: torch.dtype
) -> None:
    """Compare bit by bit, in all layers that rotate: while both rows move together, and one alone, and back."""
    with attached(model(family)) as attachment:
        for rope, report in zip(attachment.ropes.values(), attachment.reports, strict=True):
            if not rope.rotates:
                continue
            keys = torch.randn(2, report.kv_heads, 9, report.head_dim).to(dtype)
            moving = MovingKeys(rope, keys)
            for places in ([3, -5], [4, -4], [9, 1], [9, 2], [-1, 0], [12, 13]):
                positions = torch.tensor(places)[:, None]
                assert torch.equal(moving.at(positions), rope.rotate(keys, positions))
