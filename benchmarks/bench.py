"""The context that each row of the benchmarks is handed: how much to do, where to do it, and which peers are here."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from benchmarks.lines import Worker, WorkerFailed
from benchmarks.pair import Skipped

PEERS = Path("build/peers")


@dataclass
class Bench:
    """The options of a run, its scratch space, and a list of what it could not measure.

    folder: scratch space on the disk that is measured. rows: names of the rows that are wanted. quick: smaller banks,
    fewer rounds, no peers. rounds: rounds of each comparison, instead of each row's own number. million: search a
    million vectors too. say: shows what the run is doing. skipped: rivals that could not be measured.
    """

    folder: Path
    rows: frozenset[str]
    quick: bool = False
    rounds: int | None = None
    million: bool = False
    say: Callable[[str], None] = lambda _text: None
    skipped: list[Skipped] = field(default_factory=list)
    _serial: "count[int]" = field(default_factory=count)

    def n(self, usual: int) -> int:
        """Return the number of rounds of a comparison. usual: its number in a full run."""
        return self.rounds or (max(3, usual // 4) if self.quick else usual)

    def scratch(self, name: str) -> Path:
        """Make a new folder and return its path; `clear` or the end of the run removes it."""
        folder = self.folder / f"{name}-{next(self._serial)}"
        folder.mkdir()
        return folder

    def clear(self, folder: Path) -> None:
        """Delete a folder, to make room on the disk before the next row."""
        shutil.rmtree(folder, ignore_errors=True)

    def peer(self, stack: ExitStack, row: str, name: str, *arguments: str, needs: str | None = None) -> Worker | None:
        """Start the worker `benchmarks.peers.<name>` and return it; return None, and note it in `skipped`, where it
        cannot run.

        stack: ends the worker. row: the row that asks. arguments: handed to the worker. needs: a program that must be
        on the PATH.
        """
        if self.quick:
            why: str | None = "floors only"
        elif needs and shutil.which(needs) is None:
            why = f"{needs} is not on the PATH"
        elif not PEERS.exists():
            why = "no build/peers; make bench-peers installs it"
        else:
            why = None
        if why is None:
            python, log = str(PEERS / "bin/python"), self.folder / f"{name}-{next(self._serial)}.log"
            try:
                return stack.enter_context(Worker(f"benchmarks.peers.{name}", *arguments, python=python, log=log))
            except WorkerFailed as error:
                why = str(error)
        self.skipped.append(Skipped(row, name, why))
        return None
