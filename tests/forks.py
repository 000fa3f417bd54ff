"""Several processes share the tests that one has collected: `python -m pytest -p tests.forks --forks 4`.

What tests import, and their collection, take as long as some hundreds of them, and are done once. The processes are
forked then; what one of them starts for its tests (servers, threads, models) is its own.
"""

import atexit
import io
import multiprocessing
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from typing import Any, TextIO

import pytest
from _pytest import runner

_FORK = multiprocessing.get_context("fork")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--forks", type=int, default=1, metavar="N", help="let N processes share the tests")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests in processes; leave it to pytest where one process does, or no test is to run."""
    option = session.config.option
    count = min(option.forks, len(session.items))
    if count < 2 or option.collectonly or session.testsfailed:
        return None
    session.config.pluginmanager.get_plugin("terminalreporter").showfspath = False  # the files of tests mingle
    run = _Run(session, count)
    try:
        run.to_end()
    finally:
        run.close()
    return True


class Shares:
    """Tests by their numbers, of which each process has a range; one that has none left takes half of the longest.

    So most tests that share a fixture of a module come to the same process.
    """

    def __init__(self, tests: int, processes: int) -> None:
        bounds = [tests * process // processes for process in range(processes + 1)]
        self._left = [range(first, end) for first, end in pairwise(bounds)]

    def take(self, process: int) -> int | None:
        """Return the next test of a process; None where there is none for any."""
        if not self._left[process]:
            other = max(range(len(self._left)), key=lambda each: len(self._left[each]))
            found = self._left[other]
            self._left[other], self._left[process] = found[: len(found) // 2], found[len(found) // 2 :]
        for test in self._left[process][:1]:
            self._left[process] = self._left[process][1:]
            return test
        return None


class _Run:
    """A run, in the process that has collected the tests and tells what becomes of them."""

    def __init__(self, session: pytest.Session, count: int) -> None:
        self._session = session
        self._shares = Shares(len(session.items), count)
        self._started = 0
        self._forks: dict[Connection, _Fork] = {}
        session.config._tmp_path_factory.getbasetemp()  # made once, for all
        for share in range(count):
            self._start(share, [])

    def to_end(self) -> None:
        """Hand out all tests, and return when they have ended. Errors: those of pytest for a run that is to stop."""
        while self._forks:
            for connection in wait(list(self._forks)):
                assert isinstance(connection, Connection)
                self._hear(self._forks[connection])
                if self._session.shouldfail:
                    raise self._session.Failed(self._session.shouldfail)
                if self._session.shouldstop:
                    raise self._session.Interrupted(self._session.shouldstop)

    def close(self) -> None:
        """Let each process end the test that it is at, and what was started for it."""
        for fork in self._forks.values():
            fork.connection.close()
        for fork in self._forks.values():
            fork.process.join()

    def _start(self, share: int, given: Iterable[int | None]) -> None:
        fork = _Fork(self._session, self._started, share, list(self._forks))
        self._started += 1
        self._forks[fork.connection] = fork
        for test in given:
            fork.give(test)
        while len(fork.given) < 2:
            fork.give(self._shares.take(share))

    def _hear(self, fork: "_Fork") -> None:
        """Take what a process says: a report, or that a test has ended; or that the process itself has."""
        hook = self._session.config.hook
        try:
            said = fork.connection.recv()
        except (EOFError, ConnectionError):
            self._ended(fork)
            return
        if said is None:
            self._finish(fork)
            fork.give(self._shares.take(fork.share))
            return
        report = hook.pytest_report_from_serializable(config=self._session.config, data=said)
        hook.pytest_runtest_logreport(report=report)

    def _finish(self, fork: "_Fork") -> None:
        test = fork.given.popleft()
        assert test is not None
        item = self._session.items[test]
        self._session.config.hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _ended(self, fork: "_Fork") -> None:
        """Forget a process that had nothing left; another goes on for one that has died in a test."""
        fork.process.join()
        fork.connection.close()
        del self._forks[fork.connection]
        if fork.given[0] is None:
            return
        item = self._session.items[fork.given[0]]
        why = f"The process of this test has ended with {fork.process.exitcode}."
        report = pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", why, "call")
        item.config.hook.pytest_runtest_logreport(report=report)
        self._finish(fork)
        self._start(fork.share, fork.given)


class _Fork:
    """A process as the run sees it. given: the numbers of the tests that it has, of which it is at the first; None: no
    more will come."""

    def __init__(self, session: pytest.Session, number: int, share: int, others: list[Connection]) -> None:
        self.share, self.given = share, deque[int | None]()
        self.connection, there = _FORK.Pipe()
        connections = (there, [*others, self.connection])
        self.process = _FORK.Process(target=_work, args=(session, number, sys.stdin, *connections))
        self.process.start()
        there.close()

    def give(self, test: int | None) -> None:
        """Give the process a test more."""
        self.given.append(test)
        with suppress(ConnectionError):  # the process has died, which is heard next
            self.connection.send(test)


def _work(session: pytest.Session, number: int, stdin: TextIO, run: Connection, others: Iterable[Connection]) -> None:
    """Run the tests that are given, in a process of their own.

    stdin: that of tests, in whose place multiprocessing puts another. others: connections that are not of this process.
    """
    for other in others:
        other.close()
    atexit._clear()  # what the first process began is its own to end
    manager = session.config.pluginmanager
    capture = manager.get_plugin("capturemanager")
    _apart(capture)
    sys.stdin = stdin
    folders = session.config._tmp_path_factory
    folders._basetemp = folders.getbasetemp() / str(number)
    folders._basetemp.mkdir(0o700)
    terminal = manager.unregister(name="terminalreporter")
    manager.register(_Teller(session.config, run, terminal), "terminalreporter")
    try:
        _run_given(session, run)
    except (EOFError, ConnectionError, KeyboardInterrupt):  # the run is over
        runner.pytest_sessionfinish(session)
    finally:
        capture.suspend_global_capture()
        atexit._run_exitfuncs()


def _apart(capture: Any) -> None:
    """Let what tests write go into files of this process. The streams stay those that modules took while they were
    imported, and that libraries write to."""
    for stream in (capture._global_capturing.out, capture._global_capturing.err):
        if stream is not None and isinstance(getattr(stream.tmpfile, "buffer", None), io.FileIO):
            with tempfile.TemporaryFile() as own:
                os.dup2(own.fileno(), stream.tmpfile.fileno(), inheritable=False)


def _run_given(session: pytest.Session, run: Connection) -> None:
    test = run.recv()
    while test is not None:
        following = run.recv()
        next_item = None if following is None else session.items[following]
        session.config.hook.pytest_runtest_protocol(item=session.items[test], nextitem=next_item)
        run.send(None)
        test = following


class _Teller:
    """What a process has in the place of the terminal: reports go to the run. `_tw` is for what is written at once,
    such as the stacks of a test that takes too long."""

    def __init__(self, config: pytest.Config, run: Connection, terminal: Any) -> None:
        self._config, self._run, self._tw = config, run, terminal._tw

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._run.send(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))
