"""A service that speaks S3, over a real socket and in memory, and a proxy before it that fails as a script says.

`KVBANK_TEST_S3=http://HOST:PORT` runs the tests against a service that is there already, with the keys of the usual
variables: MinIO, SeaweedFS, or another. The bucket `kvbank-test` must be there.
"""

import http.client
import os
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from secrets import token_hex
from typing import Any

NAME = "kvbank-test"
_GIVEN = os.environ.get("KVBANK_TEST_S3", "").rstrip("/")
_numbers = count()


def missing() -> str:
    """Say why there can be no S3 here; empty where it can."""
    try:
        import moto.server  # noqa: F401
        import obstore  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    return ""


@cache
def endpoint() -> str:
    """Start the service, once in a process, with an empty bucket of NAME; return its URL, or that of the given one."""
    # Without them the library looks for a machine of Amazon's around it.
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.setdefault(variable, "of a test")
    if _GIVEN:
        return _GIVEN
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request("PUT", f"/{NAME}")
    assert connection.getresponse().status == 200
    connection.close()
    return f"http://{host}:{port}"


def new_prefix() -> str:
    """Name a prefix that nothing has used yet."""
    return f"test-{token_hex(8) if _GIVEN else next(_numbers)}/store"


# What is done with one request: an answer of this status and code, or of these bytes, or what a word below says; None
# lets it pass.
Fault = tuple[int, str] | bytes | str | None
PAST = "the answer is lost"
CUT = "the answer is cut in its body"
DEAF = "no answer comes until the proxy ends"
CHANGED = "a byte of the body is another"


class Faulty:
    """A proxy before the service. faults: what comes to pass with the next requests, in this order; then all pass.

    `seen`: methods and paths of the requests so far. certificate: files of one and its key, for TLS.
    """

    def __init__(self, url: str, certificate: tuple[str, str] | None = None) -> None:
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.answers: Callable[[str], Fault] = lambda _request: self.faults.pop(0) if self.faults else None
        # Headers of requests that the service does not get to see.
        self.dropped: set[str] = set()
        self.ended = threading.Event()
        self.target = url.removeprefix("http://")
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # whose caller was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    proxy: Faulty
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: Any) -> None:
        pass

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {self.path}"
        self.proxy.seen.append(request)
        fault = self.proxy.answers(request)
        if isinstance(fault, tuple):
            status, code = fault
            text = f"<Error><Code>{code}</Code><Message>no</Message><AWSAccessKeyId>A</AWSAccessKeyId></Error>"
            if status == 200:  # of the first of the objects that are to be deleted
                key = body.partition(b"<Key>")[2].partition(b"</Key>")[0].decode()
                text = f"<DeleteResult>{text.replace('<Code>', f'<Key>{key}</Key><Code>')}</DeleteResult>"
            self._answer(status, {}, text.encode())
            return
        if isinstance(fault, bytes):
            self._answer(200, {}, fault)
            return
        if fault == DEAF:
            self.proxy.ended.wait(60)
            self.close_connection = True
            return
        there = http.client.HTTPConnection(self.proxy.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in self.proxy.dropped}
        there.request(self.command, self.path, body, headers)
        answer = there.getresponse()
        data = answer.read()
        there.close()
        if fault == PAST:
            self.close_connection = True
            return
        if fault == CHANGED:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "date")}
        self._answer(answer.status, headers, data, cut=fault == CUT)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": headers.get("Content-Length", str(len(data)))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection |= cut

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815


@contextmanager
def faulty(certificate: tuple[str, str] | None = None) -> Iterator[Faulty]:
    """Set a proxy before the service of the test process."""
    proxy = Faulty(endpoint(), certificate)
    try:
        yield proxy
    finally:
        proxy.close()
