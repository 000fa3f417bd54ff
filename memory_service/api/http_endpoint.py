"""The HTTP door beside gRPC: `/metrics` for Prometheus, `/healthz` and `/readyz` for what keeps the service running,
such as systemd or Kubernetes.

This file owns what each path answers, and to whom.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

from prometheus_client.exposition import choose_encoder

from memory_service.access import peers
from memory_service.access.certificates import Shown
from memory_service.api.http_port import LONGEST_HEAD, HttpPort
from memory_service.api.tls.serving import Tls
from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import STANDARD, Limits
from memory_service.observe.metrics import Registry
from memory_service.observe.troubles import Troubles

_TEXT = "text/plain; charset=utf-8"
_REFUSED = {"UNAUTHENTICATED": HTTPStatus.UNAUTHORIZED, "PERMISSION_DENIED": HTTPStatus.FORBIDDEN}


class Answer(NamedTuple):
    """The answer of a path; `kind` is its content type."""

    status: HTTPStatus
    body: bytes
    kind: str = _TEXT


class Head(NamedTuple):
    """What a request says before its body, and who makes it. headers: in their order, by names in small letters. peer:
    the other end of the connection, as gRPC names it. names: those in the certificate that the caller has shown and
    that was checked; None for a caller without one."""

    headers: Sequence[tuple[str, str]]
    peer: str
    names: Sequence[str] | None


# Lets in a caller of the figures, by headers, peer and what it has shown of its certificate, or raises a ServiceError.
Admit = Callable[[Sequence[tuple[str, str]], str, Shown], Awaitable[None]]


class Endpoint:
    """Answers HTTP requests from `listen` to `close`."""

    def __init__(
        self,
        registry: Registry,
        troubles: Troubles,
        limits: Limits = STANDARD,
        tls: Tls | None = None,
        admit: Admit | None = None,
    ) -> None:
        """Answer from the figures of `registry` and from the troubles. tls: by what HTTPS is spoken. admit: what lets
        in the callers of the figures; None lets in all."""
        self._registry = registry
        self._admit = admit
        self._troubles = troubles
        self._port = HttpPort(self._serve, limits.http_patience_s, tls)
        self._certified = tls is not None and tls.wants_certificates
        # There is one scrape at a time, because each reads the figures of all banks.
        self._scraping = ThreadPoolExecutor(1, "kvbank-metrics")
        self._paths: dict[str, Callable[[Head], Awaitable[Answer]]] = {
            "/metrics": self._metrics,
            "/healthz": self._alive,
            "/readyz": self._ready,
        }
        self.address = ""

    async def listen(self, listen: str) -> None:
        """Listen at HOST:PORT; `address` then has the port that the system gave, where PORT is 0. Errors:
        StartError."""
        self.address = await self._port.listen(listen)

    async def close(self) -> None:
        """End all connections, and listen no more."""
        await self._port.close()
        self._scraping.shutdown(wait=False, cancel_futures=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and say that no other is taken over this connection."""
        try:
            text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.LimitOverrunError:
            text = ""
        request, _, headers = text.partition("\r\n")
        method, _, target = request.rpartition(" ")[0].partition(" ")
        head = Head(_headers(headers), peers.named(writer.get_extra_info("peername")), _names(writer))
        answer = await self._answer(method, target.partition("?")[0], head)
        lines = [f"HTTP/1.1 {answer.status} {answer.status.phrase}", f"Content-Type: {answer.kind}"]
        lines += [f"Content-Length: {len(answer.body)}", "Connection: close"]
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: GET, HEAD")
        if answer.status == HTTPStatus.UNAUTHORIZED:
            lines.append("WWW-Authenticate: Bearer")
        writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else answer.body))
        if writer.can_write_eof():  # not over TLS
            writer.write_eof()
        with suppress(OSError):
            await writer.drain()
            # Wait until the caller has closed its end too: an abort before that could lose the answer on its way.
            while await reader.read(LONGEST_HEAD):
                pass

    async def _answer(self, method: str, path: str, head: Head) -> Answer:
        if not method:
            return _plain(HTTPStatus.BAD_REQUEST, "no request of HTTP")
        if path not in self._paths:
            return _plain(HTTPStatus.NOT_FOUND, f"nothing is here but {', '.join(self._paths)}")
        if method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, "GET or HEAD")
        return await self._paths[path](head)

    async def _metrics(self, head: Head) -> Answer:
        if self._certified and head.names is None:
            return _plain(HTTPStatus.FORBIDDEN, "the figures are for callers with a certificate")
        encode, kind = choose_encoder(dict(reversed(head.headers)).get("accept", ""))
        loop = asyncio.get_running_loop()
        try:
            if self._admit is not None:
                await self._admit(head.headers, head.peer, Shown(head.names or ()))
            body = await loop.run_in_executor(self._scraping, encode, self._registry)
        except ServiceError as refusal:
            return _plain(_REFUSED.get(refusal.reason, HTTPStatus.SERVICE_UNAVAILABLE), refusal.message)
        except Exception as error:
            return _plain(HTTPStatus.SERVICE_UNAVAILABLE, f"no figures: {type(error).__name__}")
        return Answer(HTTPStatus.OK, body, kind)

    async def _alive(self, _: Head) -> Answer:
        return _plain(HTTPStatus.OK, "alive")

    async def _ready(self, _: Head) -> Answer:
        ready, troubles = self._troubles.ready(), self._troubles.all()
        lines = ["ready" if ready else "not ready", *(f"{name}: {each.text}" for name, each in troubles.items())]
        return _plain(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, "\n".join(lines))


def _plain(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, f"{text}\n".encode())


def _headers(lines: str) -> list[tuple[str, str]]:
    fields = (line.partition(":") for line in lines.split("\r\n") if line)
    return [(name.strip().lower(), value.strip()) for name, _, value in fields]


def _names(writer: asyncio.StreamWriter) -> list[str] | None:
    """Return the names in the certificate of a caller; None where it has shown none."""
    certificate = writer.get_extra_info("peercert")
    return [value for _, value in certificate.get("subjectAltName", ())] if certificate else None
