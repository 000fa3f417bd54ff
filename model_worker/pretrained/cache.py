"""The folder of this user in which pretrained models are kept: what there is, and what can go.

`KVBANK_CACHE` names the folder; without it, it is the user's own cache folder. It has

    models/NAME          a model, whole: the folder gets its name when it is complete
    models/.NAME.part    a model that is being made, or was when its process was killed
    models/.NAME.lock    locked by the process that makes the model
    downloads/NAME       what was fetched for a model that is not made yet

The module is light to import: no torch.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvbank.files import locks, private
from kvbank.files.opening import opener
from model_worker.pretrained.record import Record, read_record

_LOCK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Kept:
    """A model in the cache. size: bytes on the disk."""

    folder: Path
    record: Record
    size: int


def cache_folder() -> Path:
    """Return the folder in which what can be fetched again is kept; it may not be there yet."""
    named = os.environ.get("KVBANK_CACHE")
    if named:
        return Path(named).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("kvbank"))


def kept_folder(name: str) -> Path | None:
    """Return the folder of a model that is in the cache; None for one that is not."""
    folder = _models() / name
    return None if read_record(folder) is None else folder


def kept_models() -> Iterator[Kept]:
    """Yield the models in the cache, by name."""
    for folder in sorted(_models().glob("[!.]*")):
        record = read_record(folder)
        if record is not None:
            yield Kept(folder, record, size_of(folder))


def place_of(name: str) -> Path:
    """Return where a model's folder stands when it is complete."""
    return _models() / name


def part_of(name: str) -> Path:
    """Return where a model's folder is made."""
    return _models() / f".{name}.part"


def downloads_of(name: str) -> Path:
    """Return where what is fetched for a model is kept until the model is complete."""
    return cache_folder() / "downloads" / name


def remove(name: str) -> int:
    """Delete a model and what was fetched for it; return the bytes that were freed. Errors: OSError."""
    places = (place_of(name), part_of(name), downloads_of(name))
    freed = sum(map(size_of, places))
    if places[0].is_dir():
        # Away under its name first: a folder that is half deleted is never taken for a whole one.
        shutil.rmtree(places[1], ignore_errors=True)
        os.rename(places[0], places[1])
    for place in places[1:]:
        if place.is_dir():
            shutil.rmtree(place)
    return freed


def size_of(folder: Path) -> int:
    """Return the bytes of all files of a folder; 0 for one that is not there, and for what goes meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except OSError:
                continue
    return total


@contextmanager
def locked(name: str, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lock of a model while the block runs, so that one process alone makes or deletes the model.

    waiting: called once where another process holds the lock, before this one waits for it. Errors: OSError.
    """
    private.make_folder(_models())
    path = _models() / f".{name}.lock"
    private.make_file(path)
    with open(path, "rb", opener=opener) as file:
        if not locks.take(file.fileno()):
            waiting()
            while not locks.take(file.fileno()):
                time.sleep(_LOCK_EVERY_S)
        yield


def _models() -> Path:
    return cache_folder() / "models"
