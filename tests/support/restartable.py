"""A service in this process that goes away and comes back under the same address."""

from pathlib import Path

import pytest

import kvbank
from memory_service.api.embedded import LocalServer


class Service:
    """A service that can be stopped and started again on the same folder and port."""

    def __init__(self, folder: Path):
        self.folder, self.server = folder, LocalServer(folder)
        self.address = self.server.address

    def stop(self) -> None:
        self.server.stop()

    def start(self) -> None:
        self.server = LocalServer(self.folder, listen=self.address)


def wait_for(client: kvbank.Client) -> None:
    """Wait until a restarted service is reached again, which is within gRPC's pause between connections, 2 s."""
    for _ in range(20):
        try:
            client.server_info()
            return
        except kvbank.Unavailable:
            continue
    pytest.fail("the service was not reached again")
