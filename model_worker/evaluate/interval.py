"""The mean of a measurement, or the share of right answers, and the 95 % interval around it.

Every interval that the package prints or draws comes from here: of a mean the normal approximation with the sample
standard deviation (over few documents Student's t), of a share of answers Wilson's score interval.
"""

import math
from dataclasses import dataclass

from torch import Tensor

_Z95 = 1.96
# Student's t at 97.5 %, for 1 to 30 degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


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
    def known_width(self) -> float | None:
        """Return the width, or None where there is a single value, which has none."""
        return None if math.isnan(self.width) else self.width

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


def interval_of_few(values: Tensor) -> Interval:
    """Return the interval of `values` `[N]` by Student's t, which is wider than the normal one where N is small.

    The width is not a number (nan) for a single value.
    """
    values = values.double()
    count = len(values)
    if count < 2:
        return Interval(float(values.mean()), math.nan)
    return Interval(float(values.mean()), _t95(count - 1) * float(values.std()) / math.sqrt(count))


def _t95(degrees: int) -> float:
    """Return Student's t at 97.5 %; above the table by Fisher's expansion in 1 / degrees, which is right to 0.001."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    first = (_Z95**3 + _Z95) / (4 * degrees)
    return _Z95 + first + (5 * _Z95**5 + 16 * _Z95**3 + 3 * _Z95) / (96 * degrees**2)


@dataclass(frozen=True, slots=True)
class Share:
    """The right answers of those that were asked for, with Wilson's 95 % score interval of the share.

    right: a fraction where answers are right in part; the interval is then too wide rather than too narrow.
    """

    right: float
    asked: int

    @property
    def share(self) -> float:
        """Return the share of right answers; 0 where nothing was asked."""
        return self.right / self.asked if self.asked else 0.0

    @property
    def low(self) -> float:
        """Return the lower end."""
        return self._middle - self._half

    @property
    def high(self) -> float:
        """Return the upper end."""
        return self._middle + self._half

    @property
    def _middle(self) -> float:
        return (self.right + _Z95**2 / 2) / (self.asked + _Z95**2)

    @property
    def _half(self) -> float:
        wrong = self.asked - self.right
        inner = self.right * wrong / self.asked + _Z95**2 / 4 if self.asked else _Z95**2 / 4
        return _Z95 * math.sqrt(inner) / (self.asked + _Z95**2)

    def __add__(self, other: "Share") -> "Share":
        return Share(self.right + other.right, self.asked + other.asked)

    def __str__(self) -> str:
        return f"{self.share:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def document(self) -> dict[str, float]:
        """Return counts, share and ends of the interval as plain values."""
        return {"right": self.right, "asked": self.asked, "share": self.share, "low": self.low, "high": self.high}
