"""One comparison of this project ("ours") with floors and peers, whose rounds are interleaved. This file owns what a
result is and when a target is met."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

Role = Literal["ours", "floor", "peer"]


@dataclass(frozen=True)
class Target:
    """The bound that the design sets: for our figure, for ours / theirs, or for ours - theirs. at_least: it is a lower
    bound."""

    of: Literal["ours", "ratio", "difference"]
    limit: float
    at_least: bool = False

    def met(self, ours: float, theirs: float) -> bool:
        """Tell whether these figures keep the bound."""
        value = {"ours": ours, "ratio": ours / theirs, "difference": ours - theirs}[self.of]
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Contender:
    """One way to do the work that is compared; `run` does one round and returns the seconds that it took.

    targets: where the role is "ours", bounds for its own figure; for a rival, bounds for ours against it.
    judged: False for one of ours that is reported, but has no targets against rivals.
    """

    name: str
    role: Role
    run: Callable[[], float]
    targets: tuple[Target, ...] = ()
    judged: bool = True


@dataclass(frozen=True)
class Result:
    """The medians of one of ours and one rival, in `unit`: a time (lower is better) or a rate (higher is better).

    row: the row of the benchmarks. name: what was done. against: the rival, whose role is `role`. n: rounds.
    load_average: the machine's, over the last minute.
    """

    row: str
    name: str
    ours: float
    against: str
    role: Role
    theirs: float
    unit: str
    n: int
    load_average: float
    targets: tuple[Target, ...] = ()

    @property
    def ratio(self) -> float:
        """Return our figure divided by theirs."""
        return self.ours / self.theirs

    def met(self) -> list[bool]:
        """Tell for each target whether it is met."""
        return [target.met(self.ours, self.theirs) for target in self.targets]

    def as_json(self) -> dict[str, Any]:
        """Return the entry for build/bench.json, in which the rival's figure stands under `floor` or `peer`."""
        entry = asdict(self) | {self.role: self.theirs, "ratio": self.ratio}
        del entry["role"], entry["theirs"]
        marked = zip(self.targets, self.met(), strict=True)
        return entry | {"targets": [asdict(target) | {"met": met} for target, met in marked]}


@dataclass(frozen=True)
class Skipped:
    """A note of what was not measured in a row, and why."""

    row: str
    what: str
    why: str


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that makes the call and returns the seconds that it took."""

    def run() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return run


def worked(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that makes the call and returns the seconds that all threads of this process worked for it."""

    def run() -> float:
        begin = time.process_time()
        call()
        return time.process_time() - begin

    return run


def compare(
    row: str, name: str, contenders: Sequence[Contender], n: int, records: int | None = None, unit: str = "records/s"
) -> Iterator[Result]:
    """Run all contenders in turns, `n` rounds after a warm-up, and yield a result for each of ours against each rival.

    records: how many records one round has; with it the figures are records per second (`unit`), not milliseconds.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for index in range(n + 1):
        first = index % len(contenders)  # the order moves on, so that it does not matter who comes after whom
        for contender in (*contenders[first:], *contenders[:first]):
            seconds = contender.run()
            if index:
                times[contender.name].append(seconds)
    load = os.getloadavg()[0]
    figures = {who: records / median(taken) if records else 1000 * median(taken) for who, taken in times.items()}
    unit = unit if records else "ms"
    rivals = [contender for contender in contenders if contender.role != "ours"]
    for mine in contenders:
        for rival in rivals if mine.role == "ours" else ():
            targets = (mine.targets if rival is rivals[0] else ()) + (rival.targets if mine.judged else ())
            title = name if mine.name == "ours" else f"{name}, {mine.name}"
            theirs = figures[rival.name]
            yield Result(row, title, figures[mine.name], rival.name, rival.role, theirs, unit, n, load, targets)
