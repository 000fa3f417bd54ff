"""How chunks get into a database, where something behind their commit fails."""

from pathlib import Path

import pytest

from memory_service.domain.limits import Limits, Pauses
from memory_service.domain.model import Capacity, Policy
from tests.support.engines import ENGINES, opened
from tests.support.store import add, fill, held, new_bank

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())


def test_chunks_are_added_to_a_bank_after_something_has_failed_behind_a_commit(tmp_path: Path) -> None:
    failures = [RuntimeError("a defect")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    with (
        KIND.place(tmp_path) as place,
        opened(place, limits=Limits(step_rows=5), pauses=Pauses(at={"eviction": fail})) as engine,
    ):
        bank, _ = engine.store.create_bank(new_bank(capacity=Capacity("chunks", 20), policy=Policy("lru", target=50)))
        fill(engine.store, bank, range(20))
        written = [add(engine.store, bank, number).chunk_id for number in (20, 21)]
        assert not failures
        assert set(written) <= set(held(engine.store, bank))
