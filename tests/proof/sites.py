"""What the state machine calls: a service on a folder, or several on one database and bucket, with an address each."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tests.support.engines import ENGINES
from tests.support.service_process import Service, ServiceHost


class Site(Protocol):
    """Services that are killed and started again. services: those that run; each client is one's.

    ascending: whether a later chunk has a higher id. slack: seconds by which the clock of a service may be another one
    than that of the test.
    """

    services: list[Service]
    ascending: bool
    slack: float

    def restart(self) -> None:
        """Stop what runs, and start it again. Errors: AssertionError for a stop that is not clean."""

    def kill(self) -> None:
        """Kill a service with SIGKILL, and start it again."""

    def start(self, number: int) -> None:
        """Start a service again that has ended."""

    def close(self) -> None:
        """Kill what still runs."""

    def keep(self, folder: Path) -> None:
        """Keep the data, and what the services have printed, in a folder."""


class OnFolder:
    """One service on a folder, a `Site`."""

    ascending = True
    slack = 0.0

    def __init__(self, host: ServiceHost, folder: Path) -> None:
        self._host = host
        self.data = folder / "data"
        self.services = [host.start(self.data)]

    def restart(self) -> None:
        assert self.services[0].stop() == 0, self.services[0].log()
        self.start(0)

    def kill(self) -> None:
        self.services[0].kill()
        self.start(0)

    def start(self, number: int) -> None:
        self.services[number] = self._host.start(self.data)

    def close(self) -> None:
        self.services[0].kill()

    def keep(self, folder: Path) -> None:
        (folder / "service.log").write_text(self.services[0].log())
        shutil.copytree(self.data, folder / "data")


class OnDatabase:
    """Several services on one database, a `Site`. They are restarted and killed by turns, while the others serve."""

    ascending = False
    # The clock of a service is that of the database, within the time that a question takes.
    slack = 0.1

    def __init__(self, host: ServiceHost, place: Mapping[str, Any], count: int = 2) -> None:
        """Start so many services. place: says where the data are; each service has a cache of its own."""
        self._host, self._place = host, place
        self._turn = 0
        self.services = [self._started(number) for number in range(count)]

    def _started(self, number: int) -> Service:
        return self._host.start(**{**self._place, "cache": f"{self._place['cache']}-{number}"})

    def restart(self) -> None:
        for number, service in enumerate(self.services):
            assert service.stop() == 0, service.log()
            self.start(number)

    def kill(self) -> None:
        self._turn = (self._turn + 1) % len(self.services)
        self.services[self._turn].kill()
        self.start(self._turn)

    def start(self, number: int) -> None:
        self.services[number] = self._started(number)

    def close(self) -> None:
        for service in self.services:
            service.kill()

    def keep(self, folder: Path) -> None:
        for number, service in enumerate(self.services):
            (folder / f"service-{number}.log").write_text(service.log())


@contextmanager
def on_folder(host: ServiceHost, folder: Path) -> Iterator[Site]:
    """Start a service on a folder to the end of the block."""
    with _closed(OnFolder(host, folder)) as site:
        yield site


@contextmanager
def on_database(host: ServiceHost, folder: Path) -> Iterator[Site]:
    """Start two services on a new database and a new prefix of the bucket, to the end of the block."""
    with ENGINES["postgres"].place(folder) as place, _closed(OnDatabase(host, place)) as site:
        yield site


@contextmanager
def _closed(site: Site) -> Iterator[Site]:
    try:
        yield site
    finally:
        site.close()


MakeSite = Callable[[ServiceHost, Path], Any]
SITES: Mapping[str, MakeSite] = {"folder": on_folder, "database": on_database}
