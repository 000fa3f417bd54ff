"""Payload files that are on the disk: one that is not synced yet is made again of its bytes in the records, where a
reader finds it damaged."""

import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.waiting import wait_until


def unsynced(data: Path) -> dict[int, bytes]:
    """Return the bytes, by chunk id, that the records of a data folder have of files which may not be on the disk."""
    with closing(sqlite3.connect(data / "metadata.db")) as database:
        return dict(database.execute("SELECT chunk_id, file FROM unsynced").fetchall())


def wait_until_synced(data: Path) -> None:
    """Wait until all payload files of a folder that is served are synced, which takes a second."""
    wait_until(lambda: not unsynced(data), "small payload files are not synced")
