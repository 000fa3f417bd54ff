"""The small model is trained by Muon for the matrices inside the layers, and AdamW for everything else.

torch.optim.Muon orthogonalises in bfloat16, one matrix at a time: on a CPU without bfloat16 instructions that takes
longer than the model itself. Here matrices of one shape are stacked and stay in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz, as published with Muon


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, then scaled to the size that an AdamW update would have."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append(param)
            for params in by_shape.values():
                self._step_alike(group, params)

    def _step_alike(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Make one step for parameters of one shape."""
        updates = []
        for param in params:
            gradient = param.grad
            assert gradient is not None
            momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
            momentum.lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(momentum, group["momentum"]))
        scale = 0.2 * max(params[0].shape) ** 0.5
        for param, update in zip(params, orthogonal(torch.stack(updates)), strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


class MuonAdam(Muon):
    """One optimiser, as the Trainer wants: Muon for matrices, Adam for all other tensors.

    rate: of the matrices. other_rate: of the others; by default the same. betas: of Adam.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        rate: float,
        other_rate: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ):
        super().__init__(matrices, lr=rate, weight_decay=weight_decay)
        self.param_groups[0]["adam"], self._betas = False, betas
        self.add_param_group({"params": list(others), "lr": other_rate or rate, "adam": True})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in (p for p in group["params"] if group.get("adam") and p.grad is not None):
                self._adam(group["lr"], param)
        muon, self.param_groups = self.param_groups, [g for g in self.param_groups if not g.get("adam")]
        try:
            super().step()
        finally:
            self.param_groups = muon

    def _adam(self, rate: float, param: Tensor) -> None:
        state, (first, second) = self.state[param], self._betas
        if not state:
            state.update(step=0, mean=torch.zeros_like(param), square=torch.zeros_like(param))
        assert param.grad is not None
        state["step"] += 1
        state["mean"].lerp_(param.grad, 1 - first)
        state["square"].lerp_(param.grad**2, 1 - second)
        mean = state["mean"] / (1 - first ** state["step"])
        square = state["square"] / (1 - second ** state["step"])
        param.sub_(rate * mean / (square.sqrt() + 1e-8))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return roughly the nearest orthogonal matrix to each of `[N, rows, columns]`."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.mT if tall else x
    return found


def make_optimisers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the layers, and AdamW for all other weights.

    Each group keeps its full rate in `base_lr`, which the schedule multiplies.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [Muon(matrices, lr=muon_lr), torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0)]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return optimisers
