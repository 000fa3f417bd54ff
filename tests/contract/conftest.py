"""What holds for every storage engine: at the wire (test_wire_*), and of its protocols (test_store, test_objects).

A test that asks for a place of data runs once for each engine; an engine that cannot run here is skipped aloud.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memory_service.storage.base import Engine
from tests.support.engines import ENGINES, Kind, opened
from tests.support.serving import caller, connect, frames, refused, serving, soft, vectors

__all__ = ["caller", "connect", "frames", "refused", "serving", "soft", "vectors"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most tests of an engine that has to be started to the slow ones."""
    for item in items:
        kind = ENGINES.get(getattr(getattr(item, "callspec", None), "params", {}).get("engine_kind", ""))
        names = {item.path.name, getattr(item, "originalname", "")}
        if kind is not None and kind.quick is not None and not names & kind.quick:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=ENGINES)
def engine_kind(request: pytest.FixtureRequest) -> Kind:
    """Name the kind of engine that a test is about."""
    kind = ENGINES[request.param]
    if why := kind.missing():
        pytest.skip(f"the engine {request.param!r} cannot run here: {why}")
    return kind


@pytest.fixture
def data(engine_kind: Kind, tmp_path: Path) -> Iterator[Mapping[str, Any]]:
    """Give the place of a store, as settings of `kvbank serve`; nothing is there yet."""
    with engine_kind.place(tmp_path) as place:
        yield place


@pytest.fixture
def open_engine(data: Any) -> Callable[..., AbstractContextManager[Engine]]:
    """Open the engine of the test at its place, again and again; see `tests.support.engines.opened`."""
    return partial(opened, data)


@pytest.fixture
def engine(open_engine: Callable[..., AbstractContextManager[Engine]]) -> Iterator[Engine]:
    """Open the engine once, to the end of the test."""
    with open_engine() as made:
        yield made
