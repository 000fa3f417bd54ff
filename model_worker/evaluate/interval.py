"""The mean of a measurement over documents, and the 95 % interval around the mean.

Every interval that the package prints or draws comes from here: normal approximation, sample standard deviation.
"""

import math
from dataclasses import dataclass

from torch import Tensor

_Z95 = 1.96


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and half the width of its 95 % interval over documents, both in the unit of the values."""

    mean: float
    width: float

    @property
    def low(self) -> float:
        """Return the lower end."""
        return self.mean - self.width

    @property
    def high(self) -> float:
        """Return the upper end."""
        return self.mean + self.width

    @property
    def above_zero(self) -> bool:
        """Return whether the whole interval lies above zero."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.width:.3f}"


def interval(values: Tensor) -> Interval:
    """Return the interval of `values` `[N]`, one of each document, N at least 2.

    For a comparison the values are paired differences: the interval of a difference is not the difference of intervals.
    """
    values = values.double()
    return Interval(float(values.mean()), _Z95 * float(values.std()) / math.sqrt(len(values)))
