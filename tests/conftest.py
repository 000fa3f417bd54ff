"""Tests may import helpers as `tests.NAME`; what helpers assert is told as what tests assert."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.service_process import ServiceHost

# `python -m pytest` has done so; a bare `pytest` has not.
sys.path[:0] = [root] if (root := str(Path(__file__).parents[1])) not in sys.path else []
pytest.register_assert_rewrite("tests.support")

# Processes share the machine, those that tests start as well, and threads of torch would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: tests of Ctrl-C would
# wait for commands that never end.
signal.signal(signal.SIGINT, signal.default_int_handler)

_LONG = ("tests/proof/", "tests/worker_cli/", "tests/worker/test_processes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files whose tests take many seconds each come first: in the end short ones are left to share."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


@pytest.fixture(scope="session")
def services() -> Iterator["ServiceHost"]:
    """Start services in processes of their own, from one that has imported the service: what takes longest of a
    start."""
    from tests.support.service_process import ServiceHost

    with ServiceHost() as made:
        yield made


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every later collection of garbage: it stays to the end, and is a
    million objects, which each run of a training (it collects twice) would look at again."""
    gc.freeze()
