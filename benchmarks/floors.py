"""The floor of the network: a gRPC server that answers with bytes and does nothing else."""

import sys
import tempfile
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from benchmarks.lines import Worker, serve

_FRAME = bytes(1 << 20)
_LIMITS = [("grpc.max_send_message_length", 64 << 20), ("grpc.max_receive_message_length", 64 << 20)]


def _stream(request: bytes, _context: object) -> Iterator[bytes]:
    for _ in range(int(request)):
        yield _FRAME


def _unary(request: bytes, _context: object) -> bytes:
    return request


class Rpc:
    """The client of the bare server: one method for each of its calls."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stream = channel.unary_stream("/raw.Raw/Stream")
        self._unary = channel.unary_unary("/raw.Raw/Unary")

    def stream(self, frames: int) -> None:
        """Receive a stream of this number of frames, 1 MiB each."""
        for _ in self._stream(b"%d" % frames):
            pass

    def unary(self) -> None:
        """Send 100 bytes and receive them back."""
        self._unary(b"x" * 100)


@contextmanager
def bare_grpc(folder: Path, *, unix: bool = False) -> Iterator[Rpc]:
    """Run the bare server as a separate process, on the loopback or a unix socket, and yield its client. folder: where
    its log is written."""
    with tempfile.TemporaryDirectory() as short:
        address = f"unix:{short}/socket" if unix else "127.0.0.1:0"
        with Worker(__name__, address, log=folder / "bare_grpc.log") as worker:
            target = worker.call("address")
            with grpc.insecure_channel(target, options=_LIMITS) as channel:
                yield Rpc(channel)


def _main(address: str) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(2), options=_LIMITS)
    stream: Any = grpc.unary_stream_rpc_method_handler(_stream)
    unary: Any = grpc.unary_unary_rpc_method_handler(_unary)
    handlers = grpc.method_handlers_generic_handler("raw.Raw", {"Stream": stream, "Unary": unary})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port(address)
    server.start()
    serve({"address": partial(str, address if address.startswith("unix:") else f"127.0.0.1:{port}")})
    server.stop(0)


if __name__ == "__main__":
    _main(sys.argv[1])
