"""Tests may import helpers as `tests.NAME`; what helpers assert is told as what tests assert."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

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

# How long an example takes says how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

_LONG = ("tests/proof/", "tests/worker_cli/", "tests/cli/test_fuzz.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files whose tests take many seconds each come first: in the end short ones are left to share."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONG))


# What quick tests write at once, and some more.
_ROOM = 4 << 30


def pytest_configure(config: pytest.Config) -> None:
    """Give the quick tests a folder in memory, where there is room: most of them wait for a disk to sync more than for
    anything else. A TMPDIR that is set stays."""
    place = "/dev/shm"
    if config.option.markexpr == "not slow" and "TMPDIR" not in os.environ and _has_room(place):
        tempfile.tempdir = os.environ["TMPDIR"] = place


def _has_room(place: str) -> bool:
    """Tell whether a folder is there in which programs may be run, with room for what the tests write."""
    return (
        os.access(place, os.W_OK)
        and not os.statvfs(place).f_flag & os.ST_NOEXEC
        and shutil.disk_usage(place).free > _ROOM
        and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > _ROOM
    )


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
