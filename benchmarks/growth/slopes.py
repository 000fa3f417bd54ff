"""How a figure grows: the slope of its logarithm over that of the size, by least squares. 0 is no growth, 1 is growth
in proportion."""

from collections.abc import Sequence

import numpy as np

from benchmarks.growth.log import Point


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the slope over points of which two at least differ in size; None where there are none, or a value is not
    above 0."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table(about: str, points: Sequence[Point]) -> list[list[str]]:
    """Return the head of the table of an axis, a row a point, and two rows of slopes: over all points, and over the
    last two. about: the name of the first column."""
    names = list(points[0].figures)
    rows = [
        [f"{point.size:,}", *(number(point.figures[name]) for name in names), f"{point.load:.1f}"] for point in points
    ]
    slopes = [
        [title, *(_shown(slope([p.size for p in some], [p.figures[name] for p in some])) for name in names), ""]
        for title, some in (("slope", points), ("slope of the last two", points[-2:]))
    ]
    return [[about, *names, "load"], *rows, *slopes]


def number(value: float) -> str:
    """Return a figure with three digits, or as a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
