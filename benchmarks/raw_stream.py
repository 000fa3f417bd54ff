"""The floor of the network path: a gRPC server that streams so many bytes in frames of 1 MiB, and does nothing else."""

import sys
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

METHOD = "/raw.Raw/Stream"
_FRAME = bytes(1 << 20)


def _stream(request: bytes, context: object) -> Iterator[bytes]:
    for _ in range(int(request)):
        yield _FRAME


def main() -> None:
    """Print the port and serve until stdin closes."""
    server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", 64 << 20)])
    handler: Any = grpc.unary_stream_rpc_method_handler(_stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw.Raw", {"Stream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(0)


if __name__ == "__main__":
    main()
