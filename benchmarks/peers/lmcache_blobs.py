"""The peer LMCache, its CPU server (lm://): it puts and gets blocks of K-V. Argument: scratch folder (unused).

The client is the loop of LMCache's own connector (`LMCServerConnector`) over LMCache's own messages, without the
asyncio around it and with a buffer that is made beforehand, so that it is a little faster than what an engine gets.
"""

import os
import socket
import subprocess
import sys
import time

os.environ["LMCACHE_TRACK_USAGE"] = "false"

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode

from benchmarks.lines import serve


def main() -> None:
    """Start an LMCache server on a free port, then put and get blocks until stdin closes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)]
    with subprocess.Popen(command, stdout=sys.stderr) as server:
        try:
            with _connect(port, server) as connection:
                _serve(connection)
        finally:
            server.kill()


def _connect(port: int, server: "subprocess.Popen[bytes]") -> socket.socket:
    while server.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise SystemExit("the lm:// server did not start")


def _serve(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(64 << 20))

    def put(count: int, size: int) -> None:
        for number in range(count):
            connection.sendall(_message(ClientCommand.PUT, number, size))
            connection.sendall(bytes([number % 256]) * size)

    def get(number: int, size: int) -> None:
        connection.sendall(_message(ClientCommand.GET, number, 0))
        meta = ServerMetaMessage.deserialize(connection.recv(ServerMetaMessage.packlength(), socket.MSG_WAITALL))
        assert meta.code == ServerReturnCode.SUCCESS
        assert meta.length == size
        received = 0
        while received < size:
            received += connection.recv_into(buffer[received:size])

    serve({"put": put, "get": get})


def _message(command: ClientCommand, number: int, size: int) -> bytes:
    key = CacheEngineKey("bench", 1, 0, number, torch.float16)
    shape = torch.Size([2, 4, size // 16384, 1024])
    message = ClientMetaMessage(command, key, size, MemoryFormat.KV_2LTD, torch.float16, shape)
    return bytes(message.serialize())


if __name__ == "__main__":
    main()
