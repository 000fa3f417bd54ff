"""One comparison: ours against a floor, interleaved."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Result:
    """Medians in `unit`; ratio = ours / floor, lower is better."""

    name: str
    ours: float
    floor: float
    ratio: float
    unit: str
    floor_is: str
    n: int
    load_average: float


def compare(name: str, ours: Callable[[], object], floor: Callable[[], object], floor_is: str, n: int) -> Result:
    """Call both in turns, `n` times each after one warm-up, and compare medians in milliseconds."""
    ours()
    floor()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(n):
        for kept, call in zip(times, (ours, floor), strict=True):
            begin = time.perf_counter()
            call()
            kept.append(1000 * (time.perf_counter() - begin))
    mine, theirs = median(times[0]), median(times[1])
    return Result(name, mine, theirs, mine / theirs, "ms", floor_is, n, os.getloadavg()[0])
