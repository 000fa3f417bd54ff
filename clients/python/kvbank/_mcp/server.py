"""The server of `kvbank mcp`: its tools behind stdin and stdout, or behind a socket of HTTP."""

import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.types import ToolAnnotations
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvbank._mcp.stores import Store
from kvbank._mcp.tools import Tools
from kvbank._version import __version__
from kvbank.console.ending import INTERRUPTED, say
from kvbank.serving.listening import Listening

PATH = "/mcp"
_INSTRUCTIONS = (
    "A memory that lasts beyond this conversation and is shared by all programs that use it. Recall before you answer "
    "from memory; remember what should outlast the conversation, each fact so that it can be understood alone."
)
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
_DELETES = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)


def made(store: Store, bank: str, embed: str | None) -> MCPServer:
    """Return the server of the tools over a bank. embed: see `Tools`."""
    server: MCPServer = MCPServer(
        "kvbank", title="kvbank memory", instructions=_INSTRUCTIONS, version=__version__, log_level="ERROR"
    )
    tools = Tools(store, bank, embed)
    server.add_tool(tools.remember, title="Remember a text", annotations=_ADDS)
    server.add_tool(tools.recall, title="Recall what was remembered", annotations=_READS)
    server.add_tool(tools.forget, title="Forget passages for good", annotations=_DELETES)
    server.add_tool(tools.list_sessions, title="List conversations", annotations=_READS)
    server.add_tool(tools.explain, title="Explain why", annotations=_READS)
    return server


def serve_stdio(server: MCPServer) -> None:
    """Answer on stdin and stdout until stdin ends, or Ctrl-C ends the process: what waits for stdin heeds nothing else,
    and what was answered is durable."""
    signal.signal(signal.SIGINT, _end)
    logging.getLogger("mcp").setLevel(logging.CRITICAL)  # what is no message is answered as such, and no traceback
    anyio.run(server.run_stdio_async)


def _end(number: int, frame: FrameType | None) -> None:
    say("interrupted")
    os._exit(INTERRUPTED)


class HttpServer(uvicorn.Server):
    """Answers over HTTP from `run` on, until a signal ends it. ready: called when it answers."""

    def __init__(self, server: MCPServer, place: Listening, ready: Callable[[], None]) -> None:
        host = place.listen.rpartition(":")[0].strip("[]")
        app: ASGIApp = server.streamable_http_app(
            streamable_http_path=PATH, stateless_http=True, json_response=True, host=host
        )
        files: dict[str, Any] = {} if place.tls is None else {"ssl_certfile": place.tls[0], "ssl_keyfile": place.tls[1]}
        config = uvicorn.Config(
            WithKey(app) if place.needs_key else app,
            log_config=None,
            access_log=False,
            server_header=False,
            http="h11",
            ws="none",
            timeout_graceful_shutdown=10,
            **files,
        )
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and tell so."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, at the second signal at once; the signal is not raised again, since stopping is what was asked for."""
        self.force_exit, self.should_exit = self.should_exit, True


class WithKey:
    """Refuses requests without a key, for an address that others can reach; the service looks at the key itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse one without a key."""
        headers = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        answer: Callable[[Scope, Receive, Send], Awaitable[None]] = self._app
        if scope["type"] == "http" and (len(headers) != 1 or not headers[0].lower().startswith(b"bearer ")):
            text = "this server needs a key: the header Authorization is 'Bearer KEY', once"
            answer = JSONResponse({"error": text}, 401, headers={"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)
