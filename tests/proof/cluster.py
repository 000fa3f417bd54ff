"""Services on one database and one bucket, with everything between them and their clients that can fail."""

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.proof.handshakes import free_address
from tests.support import bucket
from tests.support.own_postgres import OwnPostgres
from tests.support.service_process import Service, ServiceHost
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until

_BALANCER = """
defaults
    mode tcp
    option redispatch
    timeout connect 2s
    timeout client 10m
    timeout server 10m
listen services
    bind 127.0.0.1:{port}
    balance roundrobin
"""


class Cluster:
    """A context manager of services, which begin to serve at once, each at an address that it keeps.

    postgres: their database. bucket: the proxy before their bucket. to_database: the proxy before the database. doors:
    the proxies through which clients come. targets: what clients connect to by these, one after the other. balancer:
    what balances beside the addresses of the SDK; "" where nothing does.
    """

    def __init__(self, host: ServiceHost, folder: Path, count: int = 2, **flags: Any) -> None:
        """Take what the services are started with. flags: those of `kvbank serve`."""
        self._host, self._folder, self._flags = host, folder, flags
        self._stack = ExitStack()
        self.addresses = [free_address() for _ in range(count)]
        self.services: list[Service] = []

    def __enter__(self) -> "Cluster":
        with ExitStack() as stack:
            self.postgres = OwnPostgres()
            self.to_database = stack.enter_context(TcpProxy(self.postgres.socket))
            self.bucket = stack.enter_context(bucket.faulty())
            os.environ["AWS_ENDPOINT_URL"] = self.bucket.url
            self.place = {
                "data": f"postgresql://postgres@127.0.0.1:{self.to_database.port}/postgres",
                "objects": f"s3://{bucket.NAME}/{bucket.new_prefix()}",
                "cache": str(self._folder / "cache"),
            }
            stack.callback(self._kill_all)
            for number in range(len(self.addresses)):
                self.services.append(self._started(number))
            self.doors = [stack.enter_context(TcpProxy(_port(address))) for address in self.addresses]
            self.targets = [",".join(f"127.0.0.1:{door.port}" for door in self.doors)]
            self.balancer = "HAProxy" if shutil.which("haproxy") else ""
            if self.balancer:
                self.doors.append(stack.enter_context(TcpProxy(self._balance(stack))))
                self.targets.append(f"127.0.0.1:{self.doors[-1].port}")
            self._stack = stack.pop_all()
        return self

    def start(self, number: int) -> None:
        """Start a service again that has ended."""
        self.services[number] = self._started(number)

    def start_all(self) -> None:
        """Start the services again that have ended."""
        for number, service in enumerate(self.services):
            if not service.alive():
                self.start(number)

    def _started(self, number: int) -> Service:
        own = {"listen": self.addresses[number], "cache": f"{self.place['cache']}-{number}"}
        return self._host.start(**{**self.place, **own, **self._flags})

    def _kill_all(self) -> None:
        for service in self.services:
            service.kill()

    def _balance(self, stack: ExitStack) -> int:
        """Start a balancer before the services, and return its port."""
        address, settings = free_address(), self._folder / "haproxy.cfg"
        lines = (
            f"    server s{number} {each} check inter 200ms fall 1 rise 1\n"
            for number, each in enumerate(self.addresses)
        )
        settings.write_text(_BALANCER.format(port=_port(address)) + "".join(lines))
        process = subprocess.Popen(["haproxy", "-db", "-q", "-f", str(settings)], stderr=subprocess.DEVNULL)
        stack.callback(process.wait, 60)
        stack.callback(process.kill)
        wait_until(lambda: _listens(address) or process.poll() is not None)
        assert process.poll() is None, "haproxy does not start"
        return _port(address)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _listens(address: str) -> bool:
    import socket

    try:
        socket.create_connection(("127.0.0.1", _port(address)), 1).close()
    except OSError:
        return False
    return True
