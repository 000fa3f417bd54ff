"""What every request goes through: a bound on its body, and the count of its answer."""

import time
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvbank.wire.addresses import is_own
from model_worker.http.errors import ApiError
from model_worker.http.metrics import Metrics

# Bodies that are too long are read, and thrown away, up to so many times the bound: a client that is still sending
# would else see a broken connection in the place of the reason.
_THROWN_AWAY = 8


class OwnHost:
    """Refuses requests without a key that do not call this machine by an address of its own. app: what is behind it.

    A web page of anybody can have its name lead to this machine (DNS rebinding), and then what it asks for is to a
    browser of the page's own site. The name stays in the header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        host = headers.get(b"host", b"").decode("latin-1")
        if scope["type"] != "http" or b"authorization" in headers or _is_own_host(host):
            await self._app(scope, receive, send)
            return
        text = f"{host!r} is no address of this machine: ask for 127.0.0.1 or localhost, or bring a key"
        await ApiError(421, text, code="misdirected_request").response()(scope, receive, send)


def _is_own_host(host: str) -> bool:
    """Tell whether a header Host names an address of this machine."""
    try:
        return is_own(f"[{urlsplit(f'//{host}').hostname}]:0")
    except ValueError:
        return False


class Bounded:
    """Refuses bodies of more than `most` bytes, also those that do not say their length. app: what is behind it."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, size = await self._read(receive)
        if body is None:
            return
        if size > self._most:
            text = f"the body has more than {self._most} bytes"
            refused = ApiError(413, text, code="request_too_large", headers={"connection": "close"})
            await refused.response()(scope, receive, send)
            return
        given = False

        async def replayed() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, send)

    async def _read(self, receive: Receive) -> tuple[bytes | None, int]:
        """Return the body as far as it is within the bound, and the bytes that were read; None for one who has left."""
        kept, size, more = bytearray(), 0, True
        while more and size <= _THROWN_AWAY * self._most:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None, size
            piece = message.get("body", b"")
            size, more = size + len(piece), message.get("more_body", False)
            if size <= self._most:
                kept += piece
        return bytes(kept), size


class Counted:
    """Counts every answer by the path of its route. app: what is behind it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 499

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500  # as what is in front of this middleware answers it
            raise
        finally:
            path = getattr(scope.get("route"), "path", "")
            self._metrics.answered(path, status, time.monotonic() - begun)
