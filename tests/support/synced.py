"""Payload files that are on the disk: one that is not synced yet is made again of its bytes in the records, where a
reader finds it damaged."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from memory_service.storage.local.files.whole_disk import WholeDisks
from tests.support.waiting import wait_until


def is_synced_as_a_whole(folder: Path) -> bool:
    """Tell whether the disk of a folder is one that is synced as a whole, so that small files are synced later."""
    disks = WholeDisks()
    try:
        return disks.trusts(str(folder))
    finally:
        disks.close()


def skip_where_files_are_synced_one_by_one(folder: Path) -> None:
    """Skip the test where the disk of a folder is not synced as a whole."""
    if not is_synced_as_a_whole(folder):
        pytest.skip(f"the disk of {folder} is not synced as a whole, so that small files are synced as they are made")


def unsynced(data: Path) -> dict[int, bytes]:
    """Return the bytes, by chunk id, that the records of a data folder have of files which may not be on the disk."""
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        return dict(database.execute("SELECT chunk_id, file FROM unsynced").fetchall())


def wait_until_synced(data: Path) -> None:
    """Wait until all payload files of a folder that is served are synced, which takes a second."""
    wait_until(lambda: not unsynced(data), "small payload files are not synced")
