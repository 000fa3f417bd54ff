"""The row `start` of the benchmarks: what a service takes on an empty folder, from the start of its process to its
first answer, and what a command takes that asks one, beside programs of the same libraries that do nothing else.

It is processor time, because most of a start are imports, which wait for nothing.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from benchmarks.bench import Bench
from benchmarks.pair import Contender, Result, Target, compare
from model_worker.errors import WorkerError

ROW = "start"
_KVBANK = ("-c", "from kvbank.cli import main; main()")
_INFO = "/kvbank.v1.MemoryService/GetServerInfo"
_PATIENCE_S = 60


def run(bench: Bench) -> Iterator[Result]:
    """Time both in milliseconds of a processor."""
    folder = bench.scratch(ROW)
    try:
        bench.say("start on an empty folder")
        contenders = [
            Contender("ours", "ours", lambda: _served(folder, *_KVBANK, "serve"), (Target("ours", 500),)),
            Contender(
                "gRPC, NumPy, FAISS and SQLAlchemy alone",
                "floor",
                lambda: _served(folder, "-m", "benchmarks.bare_start"),
            ),
        ]
        yield from compare(ROW, "kvbank serve on an empty folder, to the first answer", contenders, bench.n(9))
        bench.say("a command")
        with _Service(folder, *_KVBANK, "serve") as service:
            asking = [
                Contender("ours", "ours", lambda: _ran(*_KVBANK, "ping", service.address)),
                Contender(
                    "typer, gRPC and NumPy alone",
                    "floor",
                    lambda: _ran("-m", "benchmarks.bare_start", service.address),
                ),
            ]
            yield from compare(ROW, "kvbank ping", asking, bench.n(9))
    finally:
        bench.clear(folder)


class _Service:
    """A service on a new folder, from its start to its end."""

    def __init__(self, folder: Path, *program: str) -> None:
        self._place = folder / "place"
        # A path of a socket has at most 107 bytes.
        self.address = f"unix:{os.path.relpath(self._place / 'socket')}"
        self._ready = self._place / "ready"
        options = ("--data", str(self._place / "store"), "--listen", self.address, "--ready-file", str(self._ready))
        self._command = (sys.executable, *program, *options)

    def __enter__(self) -> "_Service":
        self._place.mkdir()
        with (self._place / "log").open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        end = time.monotonic() + _PATIENCE_S
        while not self._ready.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise WorkerError("the service did not start")
            time.sleep(0.005)
        return self

    def processor_s(self) -> float:
        """Return the seconds of a processor that the process has taken."""
        return time.clock_gettime((~self._process.pid << 3) | 2)  # as clock_getcpuclockid(3) does

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._place)


def _served(folder: Path, *program: str) -> float:
    """Start a service, and return the seconds of a processor that it has taken when it has answered."""
    with _Service(folder, *program) as service, grpc.insecure_channel(service.address) as channel:
        channel.unary_unary(_INFO)(b"")
        return service.processor_s()


def _ran(*program: str) -> float:
    """Run a program to its end, and return the seconds of a processor that it has taken."""
    process = subprocess.Popen((sys.executable, *program), stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise WorkerError("the program failed")
    return used.ru_utime + used.ru_stime
