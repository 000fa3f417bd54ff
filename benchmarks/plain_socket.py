"""The floor of bytes over the network: a plain TCP socket, over which a process sends what it has in memory, and whose
bytes are hashed where they come in."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.lines import Worker, serve
from benchmarks.material import MIB


class Receiver:
    """Asks the other process for blocks of 1 MiB, and hashes each when it is there."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._block = memoryview(np.empty(MIB, np.uint8))

    def receive(self, blocks: int) -> None:
        """Receive so many blocks."""
        self._connection.sendall(bytes([blocks]))
        for _ in range(blocks):
            received = 0
            while received < MIB:
                received += self._connection.recv_into(self._block[received:])
            xxhash.xxh3_128_digest(self._block)


@contextmanager
def plain_socket(folder: Path) -> Iterator[Receiver]:
    """Run the sender as a separate process, and yield the other end. folder: where its log is written."""
    with (
        Worker(__name__, log=folder / "plain_socket.log") as worker,
        socket.create_connection(("127.0.0.1", worker.call("port"))) as connection,
    ):
        yield Receiver(connection)


def _send(listener: socket.socket) -> None:
    """Send the blocks that the one caller asks for, until it goes."""
    block = np.random.default_rng(0).bytes(MIB)
    connection, _ = listener.accept()
    with connection:
        while asked := connection.recv(1):
            for _ in range(asked[0]):
                connection.sendall(block)


def _main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_send, args=(listener,), daemon=True).start()
        serve({"port": lambda: listener.getsockname()[1]})


if __name__ == "__main__":
    _main()
