"""Downloads that other programs make are watched here by the bytes that they have written."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model_worker.pretrained.cache import size_of

# Called with a stage, and what is done of how much; None where that is not known.
Progress = Callable[[str, int, int | None], object]

_EVERY_S = 0.25
_MIB = 1 << 20


@contextmanager
def watched(folder: Path, stage: str, total: int, progress: Progress) -> Iterator[None]:
    """Tell `progress` how many MiB a folder has, while the block fills it. total: bytes that are expected, about."""
    ended = threading.Event()
    expected = -(-total // _MIB)

    def watch() -> None:
        while not ended.wait(_EVERY_S):
            progress(stage, min(size_of(folder) // _MIB, expected), expected)

    watcher = threading.Thread(target=watch, name="kvbank-download", daemon=True)
    watcher.start()
    try:
        yield
        progress(stage, expected, expected)
    finally:
        ended.set()
        watcher.join()
