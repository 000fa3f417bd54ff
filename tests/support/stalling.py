"""A proxy before a server, over TCP, that can stop to hand on what comes: as a host that hangs, it then takes every
connection and answers none."""

import socket
import threading
from contextlib import suppress
from typing import Self

import psycopg


class StallingProxy:
    """Hands on bytes between those who connect and a socket of this machine, except between `stall` and `go_on`.

    `port` is where it listens, at 127.0.0.1; `questions` counts what those who connect have sent: one for each answer
    that is waited for.
    """

    def __init__(self, target: str) -> None:
        """Begin to hand on. target: the path of a unix socket."""
        self._target = target
        self._flows = threading.Event()
        self._flows.set()
        self.questions = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = ""
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    @classmethod
    def before(cls, url: str) -> Self:
        """Stand before a database of this machine, whose URL behind the proxy is `url` of the proxy."""
        parts = psycopg.conninfo.conninfo_to_dict(url)
        made = cls(f"{parts['host']}/.s.PGSQL.{parts.get('port') or 5432}")
        made.url = f"postgresql://{parts['user']}@127.0.0.1:{made.port}/{parts['dbname']}"
        return made

    def stall(self) -> None:
        """Hand nothing on any more."""
        self._flows.clear()

    def go_on(self) -> None:
        """Hand on what was sent meanwhile, and all that comes."""
        self._flows.set()

    def close(self) -> None:
        """Cut all connections, and take no more."""
        self.go_on()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._target)
                self._sockets += (near, far)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self.questions += source.family == socket.AF_INET
                self._flows.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
