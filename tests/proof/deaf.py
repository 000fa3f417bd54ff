"""A caller who sends and takes nothing: a connection whose answers stop on their way."""

import socket
import threading
from contextlib import suppress
from types import TracebackType

# What it takes to agree on a connection of HTTP/2.
TAKEN_BYTES = 1024


class Deaf:
    """Listens at `address`, passes on all that is sent to a server (HOST:PORT), and of its answers the beginning."""

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                there = socket.create_connection(self._server)
                self._open += (here, there)
                for source, sink, most in ((here, there, 1 << 62), (there, here, TAKEN_BYTES)):
                    thread = threading.Thread(target=_pass_on, args=(source, sink, most))
                    self._threads.append(thread)
                    thread.start()

    def __enter__(self) -> "Deaf":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listening, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()


def _pass_on(source: socket.socket, sink: socket.socket, most: int) -> None:
    with suppress(OSError):
        while most > 0 and (data := source.recv(min(most, 1 << 16))):
            sink.sendall(data)
            most -= len(data)
