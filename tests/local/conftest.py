"""What the local engine keeps in its folder: files, tables, index, quarantine, and the commands that care for them."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import caller, connect, data, frames, payload_path, refused, serving, soft, vectors

__all__ = ["caller", "connect", "data", "frames", "payload_path", "refused", "serving", "soft", "vectors"]


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a folder on another file system than that of `tmp_path`."""
    for place in ("/dev/shm", "/var/tmp"):
        if os.path.isdir(place) and os.stat(place).st_dev != tmp_path.stat().st_dev:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                yield Path(folder)
            return
    pytest.skip("there is no second file system")
