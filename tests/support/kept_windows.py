"""The bytes of sessions' windows as the storage has them: files of a data folder, or objects of a bucket."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until


class KeptWindows:
    """What a store keeps of windows. place: where the store is, as settings of `kvbank serve`, or its data folder."""

    def __init__(self, place: Path | Mapping[str, Any]) -> None:
        self._place = place if isinstance(place, Mapping) else {"data": place}
        self._objects = self._place.get("objects")

    def names(self) -> list[str]:
        """Return the names of the windows that are there."""
        if self._objects:
            return [item.key for page in self._bucket().pages("windows") for item in page]
        return os.listdir(self._place["data"] / "windows")

    def wait_for(self, number: int) -> list[str]:
        """Wait until there are so many windows, and return their names."""
        wait_until(lambda: len(self.names()) == number)
        return self.names()

    def change(self, name: str, data: bytes | None) -> None:
        """Put other bytes in the place of a window; None removes it."""
        if self._objects:
            self._bucket().put(name, [data]) if data is not None else self._bucket().delete([name])
            return
        path = self._place["data"] / "windows" / name
        path.unlink() if data is None else path.write_bytes(data)

    def open(self) -> list[str]:
        """Return the files with bytes of windows that this process, in which the server runs, has open."""
        below, found = str(self._place["cache"] if self._objects else self._place["data"] / "windows"), []
        for each in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # it has been closed meanwhile
                found.append(os.readlink(each))
        # In a cache, these files have no names.
        return [path for path in found if path.startswith(below) and (not self._objects or path.endswith("(deleted)"))]

    def _bucket(self) -> Any:
        from memory_service.storage.s3.opening import open_bucket

        return open_bucket(self._objects)
