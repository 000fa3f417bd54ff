"""A copy of many chunks is killed again and again, there and back: nothing is lost, and nothing is there twice.

`KVBANK_COPIED_CHUNKS=20000 pytest -s -m slow tests/copying/test_interrupted.py` takes as many, and says how long that
took.
"""

import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.copying.test_copy import check, check_database
from tests.support.engines import opened
from tests.support.whole_stores import put, seen
from tests.support.writing import made_bank

# Chunks of the store, kills of a copy in each direction, and seconds between two looks at how far it is: a look counts
# all rows, which takes long where there are many.
CHUNKS, KILLS = int(os.environ.get("KVBANK_COPIED_CHUNKS", "1000")), 5
LOOK_S = max(0.05, CHUNKS / 200_000)
# Chunks that are on their way at once while the store is made.
AT_ONCE = 10_000


def begin(source: Mapping[str, Any], target: Mapping[str, Any]) -> "subprocess.Popen[bytes]":
    """Begin a copy in a process of its own."""
    words = [str(Path(sys.executable).with_name("kvbank")), "store", "copy", str(source["data"]), str(target["data"])]
    for name, place in (("--from-objects", source), ("--to-objects", target)):
        words += [name, place["objects"]] if "objects" in place else []
    return subprocess.Popen(words, stdout=subprocess.DEVNULL)


def in_folder(place: Mapping[str, Any]) -> int:
    """Count the chunks that are in a folder by now."""
    try:
        with closing(sqlite3.connect(f"file:{Path(place['data']) / 'metadata.db'}?mode=ro", uri=True)) as driver:
            (count,) = driver.execute("SELECT count(*) FROM chunks").fetchone()
    except sqlite3.Error:  # the file or its tables are not there yet
        return 0
    return int(count)


@contextmanager
def counted(place: Mapping[str, Any]) -> Iterator[Callable[[], int]]:
    """Lend a function that counts the chunks that are at a place by now."""
    if "objects" not in place:
        yield partial(in_folder, place)
        return
    import psycopg

    with psycopg.connect(place["data"], autocommit=True) as driver:

        def count() -> int:
            try:
                (found,) = driver.execute("SELECT count(*) FROM chunks").fetchone() or (0,)
            except psycopg.errors.UndefinedTable:
                return 0
            return int(found)

        yield count


def copy_with_kills(source: Mapping[str, Any], target: Mapping[str, Any]) -> float:
    """Copy a store, killing the process whenever some more chunks are there; return the seconds that it took."""
    begun = time.monotonic()
    with counted(target) as count:
        for number in range(KILLS):
            wanted = CHUNKS * (number + random.random()) / (KILLS + 1)
            running = begin(source, target)
            while running.poll() is None and count() < wanted:
                with suppress(subprocess.TimeoutExpired):
                    running.wait(LOOK_S)
            running.kill()
            running.wait()
    assert begin(source, target).wait(3600) == 0
    return time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_copy_that_is_killed_again_and_again_ends_whole(place: Callable[[str], Mapping[str, Any]]) -> None:
    folder, database, back = place("local"), place("postgres"), place("local")
    with opened(folder) as engine:
        bank = made_bank(engine)
        for first in range(0, CHUNKS, AT_ONCE):
            put(engine, bank, *range(first, min(first + AT_ONCE, CHUNKS)))
        before = seen(engine)
    there = copy_with_kills(folder, database)
    assert check_database(database, "--fast")["problems"] == []
    with opened(database) as engine:
        assert seen(engine) == before
    again = copy_with_kills(database, back)
    assert check(back) == []
    with opened(back) as engine:
        assert seen(engine) == before
    load = os.getloadavg()[0]
    print(f"{CHUNKS} chunks, {KILLS} kills each way, load {load:.0f}: there {there:.0f} s, back {again:.0f} s")
