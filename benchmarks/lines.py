"""Both ends of work in another process: one JSON line asks, one JSON line answers, and the worker times its own calls.

Workers run in this environment or in that of the peers, so this file imports the standard library only.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self


class WorkerFailed(Exception):
    """The error for a worker that did not start, whose text is the last line of the worker's log, or that failed in an
    operation, whose text is the error there."""


def serve(operations: Mapping[str, Callable[..., Any]]) -> None:
    """Answer for the worker until stdin closes. What libraries print on stdout goes to stderr.

    operations: what the worker can be asked for, by name.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        operation, arguments = json.loads(line)
        begin = time.perf_counter()
        try:
            value = operations[operation](*arguments)
            answer = {"seconds": time.perf_counter() - begin, "value": value}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """The caller's end of a worker, which is started as `python -m module arguments...`. As a context manager it ends
    the worker."""

    def __init__(self, module: str, *arguments: str, python: str = sys.executable, log: Path):
        """Start the worker and wait until it is ready. python: the interpreter. log: file that takes its stderr.

        Errors: WorkerFailed when the worker does not come up.
        """
        command = [python, "-m", module, *arguments]
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        try:
            self._answer()
        except WorkerFailed:
            self._stop()
            raise

    def begin(self, operation: str, *arguments: Any) -> None:
        """Ask the worker for an operation without waiting; `end` or `value` takes its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([operation, arguments]) + "\n")
        self._process.stdin.flush()

    def end(self) -> float:
        """Wait for the operation and return the seconds that it took in the worker. Errors: WorkerFailed."""
        return float(self._answer()["seconds"])

    def time(self, operation: str, *arguments: Any) -> float:
        """Have the worker do an operation, and return the seconds that it took there. Errors: WorkerFailed."""
        self.begin(operation, *arguments)
        return self.end()

    def value(self) -> Any:
        """Wait for the operation and return what it returned in the worker. Errors: WorkerFailed."""
        return self._answer()["value"]

    def call(self, operation: str, *arguments: Any) -> Any:
        """Have the worker do an operation, and return what it returned there. Errors: WorkerFailed."""
        self.begin(operation, *arguments)
        return self.value()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed((self._log.read_text(errors="replace").strip() or "no answer").splitlines()[-1])
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()
