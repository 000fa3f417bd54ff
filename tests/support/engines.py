"""The engines that the contract of storage is held against. An engine more is an entry more in `ENGINES`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory_service.domain.clock import Clock
from memory_service.domain.limits import NO_PAUSES, STANDARD, Limits, Pauses
from memory_service.observe.metrics import Metrics
from memory_service.search import SearchIndexes, largest_id
from memory_service.settings import load
from memory_service.storage.base import Engine, Follower
from memory_service.storage.opening import open_engine


@dataclass(frozen=True)
class Kind:
    """How tests get an engine of one kind.

    missing: says why such an engine cannot run here; empty where it can. place: makes what `kvbank serve --data` takes,
    from a folder of the test's own.
    """

    missing: Callable[[], str]
    place: Callable[[Path], Any]


ENGINES = {"local": Kind(missing=lambda: "", place=lambda folder: folder / "data")}


@contextmanager
def opened(
    place: Any,
    *,
    clock: Clock | None = None,
    limits: Limits = STANDARD,
    pauses: Pauses = NO_PAUSES,
    follower: Follower | None = None,
    above: Callable[[Engine], SearchIndexes] | None = None,
    **settings: Any,
) -> Iterator[Engine]:
    """Open an engine as the service does, and close it at the end of the block.

    follower: what is told of every commit. above: makes the indexes that stand above the engine and follow it too.
    settings: those of `kvbank serve`.
    """
    settings = {"data": place, "durability": "os"} | settings
    engine = open_engine(load(settings), Metrics(), largest_id, clock, limits=limits, pauses=pauses)
    try:
        if follower is not None:
            engine.store.follow(follower)
        indexes = above(engine) if above is not None else None
        try:
            if indexes is not None:
                engine.store.follow(indexes)
            engine.begin()
            yield engine
            engine.rest()
        finally:
            if indexes is not None:
                indexes.close()
    finally:
        engine.close()
