"""A mean over documents and how far it may be off."""

import math
from dataclasses import dataclass

from torch import Tensor

_Z95 = 1.96


@dataclass(frozen=True, slots=True)
class Interval:
    """mean, and half the width of its 95 % interval over documents (normal approximation)."""

    mean: float
    width: float

    @property
    def above_zero(self) -> bool:
        """Whether all of the interval is."""
        return self.mean - self.width > 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.width:.3f}"


def interval(values: Tensor) -> Interval:
    """Of `values` `[N]`, one a document, N at least 2. For a comparison give it paired differences."""
    values = values.double()
    return Interval(float(values.mean()), _Z95 * float(values.std()) / math.sqrt(len(values)))
