"""The service's end of direct calls (direct.proto): each connection has a thread, which answers one call at a time
without an event loop.

This file owns which callers are answered: processes of the service's user, as many as there is a thread for.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

from kvbank.v1 import direct_pb2 as pb
from kvbank.wire import frames, local_socket
from memory_service.api.messages.parsing import Parser
from memory_service.api.messages.status import CODE_OF, status, to_service_error, without_frames
from memory_service.domain.access import Caller
from memory_service.domain.cancellation import Cancellation
from memory_service.domain.errors import ServiceError, StartError, invalid
from memory_service.observe.observation import Observer, request_id
from memory_service.observe.request import Request
from memory_service.settings import LONGEST_SOCKET_PATH

SOCKET = "direct.sock"
# Callers beyond this number are sent away, and ask over gRPC.
MOST_CONNECTIONS = 64
# A caller has this many seconds to take an answer, and the time that the answer takes at this many bytes a second.
_PATIENCE_S = 20
_LEAST_RATE = 1024 * 1024
# Takes a message of DirectRequest, and holds the bytes of one of DirectResponse while they are sent.
Call = Callable[[Any], AbstractContextManager[bytes]]
_ANSWERS = pb.DirectResponse.DESCRIPTOR.fields_by_name
_METHODS = {"retrieve": "RetrieveFiles", "fetch": "FetchFiles"}
_log = logging.getLogger(__name__)


class DirectCalls:
    """Listens on the socket for direct calls from the making of this object to `close`, and answers them."""

    def __init__(self, path: Path, calls: Mapping[str, Call], observer: Observer, max_message_bytes: int) -> None:
        """Listen at `path`, and answer calls. calls: one for each field of DirectRequest. max_message_bytes: of a
        request. Errors: StartError."""
        self._path, self._calls, self._observer, self._limit = path, calls, observer, max_message_bytes
        self._parser = Parser(pb.DirectRequest, max_message_bytes)
        # All calls share this one, because only `close` ends them, and all at once.
        self._cancellation = Cancellation()
        self._lock = threading.Lock()
        self._threads: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(None)
        try:
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            os.chmod(path, 0o600)
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            raise StartError(f"cannot listen on {path}: {error.strerror}") from error
        self._acceptor = threading.Thread(target=self._accept, name="kvbank-direct", daemon=True)
        self._acceptor.start()

    @staticmethod
    def possible(path: Path) -> bool:
        """Tell whether a socket can have this path, and this system says who calls."""
        return hasattr(socket, "SO_PEERCRED") and len(os.fsencode(path)) <= LONGEST_SOCKET_PATH

    def close(self, grace: float = 0) -> None:
        """Take no new call; answer those that run within `grace` seconds, and end the others then. This blocks."""
        with self._lock:
            self._closing = True
            threads = list(self._threads.values())
        self._shut(socket.SHUT_RD)
        # A shutdown wakes the accept; a close alone would not.
        self._socket.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        until = time.monotonic() + grace
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0))
        self._cancellation.cancel()
        self._shut(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _shut(self, how: int) -> None:
        """Wake the threads by a shutdown; a close could give the number of a connection to another file before its
        thread wakes."""
        with self._lock:
            for connection in self._threads:
                with suppress(OSError):  # the other end is gone
                    connection.shutdown(how)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if self._closing:
                    return
                _log.error("cannot accept a direct connection", exc_info=error)
                threading.Event().wait(0.1)  # out of descriptors, most likely
                continue
            with self._lock:
                if self._closing or len(self._threads) >= MOST_CONNECTIONS or not local_socket.same_user(connection):
                    connection.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(connection,), name="kvbank-direct", daemon=True)
                self._threads[connection] = thread
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads; the caller asks over gRPC
                    _log.error("cannot serve a direct connection", exc_info=error)
                    del self._threads[connection]
                    connection.close()

    def _serve(self, connection: socket.socket) -> None:
        self._cancellation.enter()
        try:
            connection.settimeout(None)  # in the place of the process's default
            while (message := local_socket.receive(connection, self._limit)) is not None:
                self._answer(connection, message)
                del message
        except OSError as error:
            _log.debug("a direct connection ended: %s", error)
        finally:
            with self._lock:
                del self._threads[connection]
                connection.close()

    def _answer(self, connection: socket.socket, message: bytes) -> None:
        with ExitStack() as held:
            _send(connection, self._answered(message, held))

    def _answered(self, message: bytes, held: ExitStack) -> bytes:
        """Return the bytes of the answer to a message; what they need until they are sent is entered in `held`."""
        try:
            asked = self._parser(message)
        except ServiceError as refusal:
            asked, refused = pb.DirectRequest(), refusal
        else:
            refused = invalid("call", "the bytes are no direct call")
        field = asked.WhichOneof("call") or ""
        method = _METHODS.get(field, "unknown")
        # Only processes of the service's user are answered here, and that is the owner of the data folder.
        request = Request(request_id(asked.request_id), method, peer="unix:", caller=Caller.owner())
        try:
            with self._observer.of(request, _code):
                return self._called(field, asked, request, held, refused)
        except ServiceError as refusal:
            without_frames(refusal)
            return pb.DirectResponse(error=status(refusal).SerializeToString()).SerializeToString()

    def _called(
        self, field: str, asked: pb.DirectRequest, request: Request, held: ExitStack, refused: ServiceError
    ) -> bytes:
        try:
            if not field:
                raise refused
            message = getattr(asked, field)
            request.of(message)
            answer = held.enter_context(self._calls[field](message))
            return frames.prefix(_ANSWERS[field].number, len(answer)) + answer
        except Exception as error:
            refusal = to_service_error(error)
            request.reason = refusal.reason
            raise refusal from error


def _send(connection: socket.socket, answer: bytes) -> None:
    """Send the bytes of an answer, and leave a caller that does not take them within some seconds, or more for a large
    answer. Errors: OSError."""
    connection.settimeout(_PATIENCE_S + len(answer) / _LEAST_RATE)  # of all of it, not of each step
    local_socket.send(connection, answer)
    connection.settimeout(None)


def _code(error: BaseException | None) -> str:
    return CODE_OF[error.reason].name if isinstance(error, ServiceError) else "OK"
