"""Places of stores of both engines."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import postgres
from tests.support.engines import ENGINES


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[[str], Mapping[str, Any]]]:
    """Name places of stores, in which nothing is yet, by the kind of their engine."""
    with ExitStack() as made:
        numbers = iter(range(99))

        def name(kind: str) -> Mapping[str, Any]:
            if why := ENGINES[kind].missing():
                pytest.skip(why)
            folder = tmp_path / str(next(numbers))
            folder.mkdir()
            place = made.enter_context(ENGINES[kind].place(folder))
            # Copies are made by the owner of the tables.
            owner = {"data": postgres.of(place["data"], postgres.OWNER)} if kind == "postgres" else {}
            return {**place, **owner}

        yield name
