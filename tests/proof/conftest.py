"""What the proofs share: the fault layer, built by the machine's compiler, and hosts for services."""

import shutil
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


@pytest.fixture(scope="session")
def faults(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[shim.Shim, ServiceHost]]:
    """Lay the fault layer over a folder, and host services under it: a host imports the service, which takes longer
    than most tests do."""
    place = tmp_path_factory.mktemp("faults")
    notes = place / "notes"
    notes.mkdir()
    layer = shim.Shim(library, place / "disk", notes)
    with ServiceHost(layer.environment) as host:
        yield layer, host


@pytest.fixture
def disk(faults: tuple[shim.Shim, ServiceHost], tmp_path: Path) -> Iterator[shim.Shim]:
    """Make a folder of the test's own with the fault layer over it."""
    made = faults[0].below(tmp_path.name)
    yield made
    made.clear()
    shutil.rmtree(made.root)


@pytest.fixture
def faulty_host(disk: shim.Shim, faults: tuple[shim.Shim, ServiceHost]) -> Iterator[ServiceHost]:
    """Services under the fault layer; those that still run at the end of the test are killed."""
    _, host = faults
    yield host
    host.kill_all()


@pytest.fixture(scope="session")
def host(services: ServiceHost) -> ServiceHost:
    """Services as they are."""
    return services


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes | None]]:
    """Read every path below a folder with its bytes (folders: None), without SQLite's shared memory."""

    def read(folder: Path) -> dict[str, bytes | None]:
        paths = [path for path in folder.rglob("*") if not path.name.endswith("-shm")]
        return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}

    return read
