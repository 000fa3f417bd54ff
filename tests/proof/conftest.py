"""What the proofs share: the fault layer, built by the machine's compiler, and hosts for services."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import shim
from tests.support.service_process import ServiceHost


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile shim.c into a library."""
    built = shim.build(tmp_path_factory.mktemp("shim"))
    if built is None:
        pytest.skip("no C compiler (cc, gcc or clang), so no fault layer")
    return built


@pytest.fixture
def disk(library: Path, tmp_path: Path) -> shim.Shim:
    """Make a folder `disk` with the fault layer over it."""
    notes = tmp_path / "notes"
    notes.mkdir()
    return shim.Shim(library, tmp_path / "disk", notes)


@pytest.fixture
def faulty_host(disk: shim.Shim) -> Iterator[ServiceHost]:
    """Services under the fault layer."""
    with ServiceHost(disk.environment) as host:
        yield host


@pytest.fixture(scope="session")
def host() -> Iterator[ServiceHost]:
    """Services as they are."""
    with ServiceHost() as made:
        yield made


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes | None]]:
    """Read every path below a folder with its bytes (folders: None), without SQLite's shared memory."""

    def read(folder: Path) -> dict[str, bytes | None]:
        paths = [path for path in folder.rglob("*") if not path.name.endswith("-shm")]
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}

    return read
