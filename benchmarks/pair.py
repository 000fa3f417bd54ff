"""One comparison: ours against floors and peers, interleaved. Owns what a result is and when a target is met."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

Role = Literal["ours", "floor", "peer"]


@dataclass(frozen=True)
class Target:
    """What the design asks for: a bound of ours, of ours / theirs, or of ours - theirs."""

    of: Literal["ours", "ratio", "difference"]
    limit: float
    at_least: bool = False

    def met(self, ours: float, theirs: float) -> bool:
        """Whether these figures keep it."""
        value = {"ours": ours, "ratio": ours / theirs, "difference": ours - theirs}[self.of]
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Contender:
    """Somebody who does the work of one round; `run` answers with the seconds it took.

    targets: of ours, whoever it is compared with; of a rival, for ours against this one.
    judged: False for one of ours that is only reported beside another.
    """

    name: str
    role: Role
    run: Callable[[], float]
    targets: tuple[Target, ...] = ()
    judged: bool = True


@dataclass(frozen=True)
class Result:
    """Medians in `unit`: a time (lower is better) or a rate (higher is better)."""

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
        """Ours / theirs."""
        return self.ours / self.theirs

    def met(self) -> list[bool]:
        """For each target."""
        return [target.met(self.ours, self.theirs) for target in self.targets]

    def as_json(self) -> dict[str, Any]:
        """For build/bench.json; the floor's or peer's figure stands under its role."""
        entry = asdict(self) | {self.role: self.theirs, "ratio": self.ratio}
        del entry["role"], entry["theirs"]
        marked = zip(self.targets, self.met(), strict=True)
        return entry | {"targets": [asdict(target) | {"met": met} for target, met in marked]}


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    row: str
    what: str
    why: str


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A round that is timed here."""

    def run() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return run


def compare(
    row: str, name: str, contenders: Sequence[Contender], n: int, records: int | None = None, unit: str = "records/s"
) -> Iterator[Result]:
    """All contenders in turns, `n` rounds after a warm-up; then each of ours against each of the others.

    records: how many of them a round has; then the figures are records per second (`unit`) instead of milliseconds.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for index in range(n + 1):
        first = index % len(contenders)  # who comes after whom must not matter
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
