"""The log of the points that were measured, a JSON line each, so that a run that was ended goes on where it was."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """What was measured at one size of an axis.

    figures: by name and unit, such as "search, ms". load: the machine's load average when it was measured. date: the
    day and time.
    """

    axis: str
    size: int
    figures: Mapping[str, float]
    load: float
    date: str


class Log:
    """The points in a file. A size that is measured again takes the place of what was measured before."""

    def __init__(self, path: Path) -> None:
        """Read the points of a file, where there is one."""
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._points = {(point.axis, point.size): point for point in (Point(**json.loads(line)) for line in lines)}

    def __contains__(self, place: tuple[str, int]) -> bool:
        return place in self._points

    def of(self, axis: str) -> list[Point]:
        """Return the points of an axis, by size."""
        return sorted((point for point in self._points.values() if point.axis == axis), key=lambda point: point.size)

    def add(self, point: Point) -> None:
        """Add a point, and write it."""
        self._points[point.axis, point.size] = point
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(point)) + "\n")
