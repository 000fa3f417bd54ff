"""Calls of the blocking client travel by this file: they are made again until their deadline, and errors of gRPC become
errors of this package. `async_caller` does the same for asyncio.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TypeVar

import grpc

from kvbank._calls import metadata, reading, search_messages
from kvbank._calls.answers import odd
from kvbank._calls.paging import turned
from kvbank._calls.session_window import Arriving, Sent
from kvbank._calls.steps import Run
from kvbank._calls.writing import WriteSession, takes_no_data, takes_no_file
from kvbank._exceptions import ClientClosed, ClientForked, ServiceError
from kvbank._transport import channel
from kvbank._transport.base import Transport
from kvbank._transport.base_caller import BaseCaller
from kvbank._transport.over_grpc import Grpc, answered_once
from kvbank._transport.retrying import Attempts
from kvbank._transport.same_host import SameHost
from kvbank._transport.socket_first import SocketFirst
from kvbank._transport.write_stream import WriteStream

T = TypeVar("T")


class Caller(BaseCaller):
    """The calls of a blocking client. Threads may share it.

    Errors of all methods that call: ServiceError, ClientClosed, ClientForked.
    """

    def __init__(self, address: str, timeout: float, **options: Any) -> None:
        """Take the arguments of `BaseCaller`; nothing is sent before the first call."""
        super().__init__(address, timeout, **options)
        self._closed = threading.Event()
        # By the place of an address; a shared data folder, which asks a socket first, has one alone.
        ways = (Grpc(address, self.route) for address in self.route.turn.addresses)
        self._transports: list[Transport] = [SocketFirst(self.sharing, way) for way in ways]

    def close(self) -> bool:
        """Close the connection, so that calls under way fail; return whether it was open, in this process."""
        if self.pid != os.getpid() or self._closed.is_set():
            return False
        self._closed.set()
        for transport in self._transports:
            transport.close()
        return True

    def call(self, method: str, request: Any, timeout: float | None) -> Any:
        """Make a call with one answer, and return it."""
        return self.repeated(method, request, self.attempts(timeout))

    def repeated(self, method: str, request: Any, attempts: Attempts) -> Any:
        """Make a call with one answer within these attempts, and return it."""
        request_id = channel.new_request_id()
        while True:
            try:
                with self._translated(request_id) as transport:
                    return transport.unary(method, request, attempts.remaining(), request_id)
            except ServiceError as error:
                self._pause(attempts.pause(error))

    def pages(self, method: str, request: Any, timeout: float | None) -> Iterator[Any]:
        """Yield the pages of an answer, with `timeout` for each."""
        for _ in range(channel.MOST_PAGES[method]):
            page = self.call(method, request, timeout)
            yield page
            if not turned(request, page):
                return
        raise odd(f"it has more than {channel.MOST_PAGES[method]} pages")

    def check_kept(self, message: Any, attempts: Attempts) -> None:
        """Check that the server keeps all metadata of a message. Errors: FailedPrecondition."""
        if message.typed_metadata:
            self._learn(attempts)
            metadata.check_kept(message, self.typed)

    def check_alternatives(self, message: Any, attempts: Attempts) -> None:
        """Check that the server heeds the alternatives of the filter of a message. Errors: FailedPrecondition."""
        if search_messages.has_alternatives(message):
            self._learn(attempts)
            search_messages.check_heeded(message, self.alternatives)

    def read(self, begin: Callable[[SameHost | None], reading.Steps[T]], attempts: Attempts, request_id: str) -> T:
        """Make the calls that steps ask for, and return what they return.

        begin: begins the steps, with the folder that the server shares, or None.
        """
        run = Run(begin(self._shared(attempts)))
        call = run.begin()
        while call is not None:
            try:
                answer = self._read(call, attempts, request_id)
            except ServiceError as error:
                self.sharing.failed(call, error)
                call = run.failed(error)
            else:
                if call.folder is not None:
                    call.folder.fill(answer)
                call = run.answered(answer)
        return run.result

    def write(self, begin: Callable[[int, bool, int], WriteSession], attempts: Attempts) -> WriteSession:
        """Write all chunks of a session, and return it.

        begin: makes the session, of the bytes that may be unacknowledged, whether all metadata are kept, and the bytes
        that a header may bring along.
        """
        self._learn(attempts)
        folder = self._shared(attempts)
        session = begin(self.bound, self.typed, self.inline)
        request_id = channel.new_request_id()
        while not session.finished():
            attempts.progressed(session.waiting_since())
            try:
                self._write_stream(session, folder, attempts, request_id)
            except ServiceError as error:
                if folder is not None and takes_no_file(error):
                    self.sharing.doubted()
                    folder = None  # the rest goes over the stream
                    continue
                if session.inline and takes_no_data(error):
                    session.inline = self.inline = 0  # an older server, behind the same address or another one
                    continue
                attempts.progressed(session.waiting_since())
                self._pause(attempts.pause(error))
        return session

    def upload(self, method: str, sent: Sent, attempts: Attempts) -> None:
        """Make a call of many frames with one answer that says nothing."""
        request_id = channel.new_request_id()
        while True:
            try:
                with self._translated(request_id) as transport:
                    call = transport.upload(method, sent.frames(), attempts.remaining(), request_id)
                    try:
                        answered_once(call)
                    finally:
                        call.cancel()
                return
            except ServiceError as error:
                self._pause(attempts.pause(error))

    def download(self, method: str, request: Any, attempts: Attempts, made: Callable[[], Arriving[T]]) -> T:
        """Make a call whose answer is a window, and return what is made of its frames by what `made` returns."""
        request_id = channel.new_request_id()
        while True:
            try:
                with self._translated(request_id) as transport:
                    received = made()
                    with closing(transport.stream(method, request, attempts.remaining(), request_id)) as frames:
                        for frame in frames:
                            received.feed(frame)
                            if received.whole:
                                break
                    return received.finish()
            except ServiceError as error:
                self._pause(attempts.pause(error))

    def _learn(self, attempts: Attempts) -> None:
        """Ask the server, once, how much of a write may be unacknowledged, and which metadata it keeps."""
        self._check()
        if not self.bound:
            asked = self.sharing.question()
            info = self.repeated("GetServerInfo", asked, attempts)
            self.learned(info)
            if self.sharing.unknown():
                self.sharing.learn(asked, info)

    def _shared(self, attempts: Attempts) -> SameHost | None:
        """Return the data folder of the server, where it is on this machine and shared with this client; else None."""
        if self.sharing.unknown():
            asked = self.sharing.question()
            try:
                self.sharing.learn(asked, self.repeated("GetServerInfo", asked, attempts))
            except ServiceError:
                return None  # the call that follows will say it
        return self.sharing.folder

    def _read(self, call: reading.Call, attempts: Attempts, request_id: str) -> reading.Answer:
        """Make a call, and read its answer to the end; where it breaks, make it again."""
        while True:
            try:
                return self._read_once(call, attempts.remaining(), request_id)
            except ServiceError as error:
                self._pause(attempts.pause(error))

    def _read_once(self, call: reading.Call, timeout: float, request_id: str) -> reading.Answer:
        answer = reading.Answer()
        with self._translated(request_id) as transport:
            if call.folder is not None:
                answer.feed(transport.unary(call.method, call.request, timeout, request_id))
            else:
                with closing(transport.stream(call.method, call.request, timeout, request_id)) as frames:
                    for frame in frames:
                        answer.feed(frame)
            answer.finish()
        return answer

    def _write_stream(
        self, session: WriteSession, folder: SameHost | None, attempts: Attempts, request_id: str
    ) -> None:
        """Write until the end of the chunks, or of the stream."""
        changed = threading.Condition()
        with self._translated(request_id) as transport:
            begin = partial(transport.write, request_id=request_id)
            stream = WriteStream(begin, session, attempts, lambda: _notify(changed), folder)
            try:
                while session.peek() is not None:
                    _wait(changed, stream.ready, stream.patience)
                    if stream.ended:
                        break
                    stream.send()
                stream.half_close()
                _wait(changed, stream.done, stream.patience)
                stream.check()
            finally:
                stream.cancel()

    def _check(self) -> None:
        """Check that a call may be made. Errors: ClientForked, ClientClosed."""
        if self.pid != os.getpid():
            raise ClientForked("this client belongs to the parent process; call kvbank.connect() after the fork")
        if self._closed.is_set():
            raise ClientClosed("the client is closed")

    @contextmanager
    def _translated(self, request_id: str) -> Iterator[Transport]:
        """Give the transport of a call, and turn errors of gRPC into errors of this package; after a `close` in another
        thread each is ClientClosed."""
        self._check()
        at = self.route.turn.take()
        try:
            yield self._transports[at]
            self.reached(at)
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel was closed before the call started
            if self._closed.is_set():
                raise ClientClosed("the client was closed during the call") from None
            if isinstance(error, grpc.RpcError):
                raise self.error(error, at, request_id) from None
            raise
        except ServiceError as error:  # the reader's, such as a checksum that does not match
            error.request_id = error.request_id or request_id
            raise

    def _pause(self, seconds: float) -> None:
        self._closed.wait(seconds)


def _notify(changed: threading.Condition) -> None:
    with changed:
        changed.notify_all()


def _wait(changed: threading.Condition, until: Callable[[], bool], patience: Callable[[], float]) -> None:
    with changed:
        while not until():
            changed.wait(patience())
