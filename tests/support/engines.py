"""The engines that the contract of storage is held against. An engine more is an entry more in `ENGINES`."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
from tests.support import bucket, postgres


@dataclass(frozen=True)
class Kind:
    """How tests get an engine of one kind.

    missing: says why such an engine cannot run here; empty where it can. place: makes what says to `kvbank serve` where
    the data are, from a folder of the test's own, to the end of its block. under_way: the most chunks that two
    transactions write, for which a chunk that comes then has to wait.
    """

    missing: Callable[[], str]
    place: Callable[[Path], AbstractContextManager[Mapping[str, Any]]]
    under_way: int
    # The files and tests that are quick tests for this kind; of another kind they are all.
    quick: frozenset[str] | None = None


@contextmanager
def _in_folder(folder: Path) -> Iterator[Mapping[str, Any]]:
    yield {"data": folder / "data"}


@contextmanager
def _in_database(folder: Path) -> Iterator[Mapping[str, Any]]:
    os.environ["AWS_ENDPOINT_URL"] = bucket.endpoint()
    with postgres.database() as url:
        yield {
            "data": postgres.of(url, postgres.SERVICE),
            "objects": f"s3://{bucket.NAME}/{bucket.new_prefix()}",
            "cache": str(folder / "cache"),
        }


# Of each kind of thing that an engine does, some; a test of a server of its own takes as long as ten others.
QUICK = frozenset(
    {
        "test_writing.py",
        "test_wire_bytes.py",
        "test_a_bank_is_made_once_found_by_name_and_deleted",
        "test_what_was_added_is_seen_by_the_next_view_and_by_followers_and_by_no_earlier_view",
        "test_a_key_is_written_once_and_answered_the_same_way",
        "test_who_goes_next_goes_next_and_is_in_the_log",
        "test_a_chunk_that_has_expired_is_in_no_answer_before_it_is_removed",
        "test_sessions_outlast_the_store",
    }
)
ENGINES = {
    "local": Kind(lambda: "", _in_folder, under_way=2),
    "postgres": Kind(lambda: postgres.missing() or bucket.missing(), _in_database, under_way=130, quick=QUICK),
}


def where(place: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings that say where data are. place: these settings, or a data folder."""
    return place if isinstance(place, Mapping) else {"data": place}


@contextmanager
def opened(
    place: Path | Mapping[str, Any],
    *,
    clock: Clock | None = None,
    limits: Limits = STANDARD,
    pauses: Pauses = NO_PAUSES,
    follower: Follower | None = None,
    above: Callable[[Engine], SearchIndexes] | None = None,
    **settings: Any,
) -> Iterator[Engine]:
    """Open an engine as the service does, and close it at the end of the block.

    place: a data folder, or settings that say where the data are. follower: what is told of every commit. above: makes
    the indexes that stand above the engine and follow it too. settings: those of `kvbank serve`.
    """
    settings = {**where(place), "durability": "os", **settings}
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
