"""The floor of a start: the libraries of the service, and a server of gRPC that answers one call; or, with an address,
those of a command, which asks a service once. They take the options of `kvbank serve`, of which they need two."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

_SERVICE, _METHOD = "kvbank.v1.MemoryService", "GetServerInfo"


async def _serve(address: str, ready: Path) -> None:
    import faiss  # noqa: F401
    import grpc
    import numpy  # noqa: F401
    import sqlalchemy  # noqa: F401

    async def answer(_request: bytes, _context: Any) -> bytes:
        return b""

    server = grpc.aio.server()
    handlers = {_METHOD: grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_insecure_port(address)
    await server.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    ready.write_text(address)
    await stopping.wait()
    await server.stop(None)


def _ask(address: str) -> None:
    import grpc
    import numpy  # noqa: F401
    import typer

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            channel.unary_unary(f"/{_SERVICE}/{_METHOD}")(b"")

    app = typer.Typer()
    app.command()(ask)
    app([address])


if __name__ == "__main__":
    if "--listen" in sys.argv:
        options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
        asyncio.run(_serve(options["--listen"], Path(options["--ready-file"])))
    else:
        _ask(sys.argv[1])
