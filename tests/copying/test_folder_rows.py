"""A copy reads the rows of a folder a page at a time, in the order of their keys, wherever the page is."""

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from memory_service.care.copying import folder_rows
from memory_service.care.copying.tables import CHUNKS, Key
from tests.support.engines import opened
from tests.support.store import fill, new_bank

PAGE = 10


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Make a folder of three banks whose chunks were written in turns, the last one being larger."""
    with opened(tmp_path) as engine:
        banks = [engine.store.create_bank(new_bank(name))[0] for name in "abc"]
        for number in range(6):
            for bank in banks:
                fill(engine.store, bank, [number])
        fill(engine.store, banks[-1], range(6, 600))
    with closing(sqlite3.connect(tmp_path / "metadata.db")) as driver:
        folder_rows.prepare(driver)
        yield driver


def keys(driver: sqlite3.Connection, after: Key = (), upto: Key = (), most: int | None = None) -> list[Key]:
    return [CHUNKS.key(row) for row in folder_rows.select(driver, CHUNKS, after, upto, most)]


def test_rows_between_two_keys_are_those_of_a_plain_comparison(folder: sqlite3.Connection) -> None:
    found = keys(folder)
    assert found == sorted(found)
    assert len(found) == 612
    bounds: list[Key] = [(), (0, 0), found[0], found[4], found[5], found[8], (2, 999), found[13], found[-1], (9, 9)]
    for after, upto in itertools.product(bounds, bounds):
        if upto and after > upto:
            continue
        wanted = [key for key in found if key > after and (not upto or key <= upto)]
        assert keys(folder, after, upto) == wanted
        assert keys(folder, after, upto, PAGE) == wanted[:PAGE]


def test_a_page_at_the_end_of_a_bank_is_read_in_as_many_steps_as_one_at_its_beginning(
    folder: sqlite3.Connection,
) -> None:
    def steps(read: Callable[[], list[Key]]) -> int:
        counted = itertools.count()
        folder.set_progress_handler(lambda: next(counted) and 0, 1)
        assert len(read()) == PAGE
        folder.set_progress_handler(None, 0)
        return next(counted)

    found = keys(folder)
    early, late = found[20], found[-PAGE - 1]
    for upto in ((), found[-1]):
        first = steps(lambda: keys(folder, early, (), PAGE))
        last = steps(lambda upto=upto: keys(folder, late, upto, PAGE))  # type: ignore[misc]
        assert last < 1.5 * first
