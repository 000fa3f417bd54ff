"""One WriteChunks call is made here: a thread of the caller hands over chunks, another reads acknowledgements.

Both clients write over this, on a blocking channel: in grpc.aio 1.85 a write that fails overwrites the status that the
server sent ("Internal error from Core"), so that a refusal could not be told from a broken connection.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from kvbank._calls.writing import Begun, Upload, WriteSession, frames
from kvbank._exceptions import ServiceError, Unavailable
from kvbank._transport.retrying import Attempts
from kvbank._transport.same_host import SameHost

_FAREWELL_S = 0.5


class WriteStream:
    """A stream that begins by sending again what the session has pending, or else its next upload.

    It stages the bytes of uploads where it may, and removes at its end the files that the server did not take.
    """

    def __init__(
        self,
        begin: Callable[[Iterator[Any]], Any],
        session: WriteSession,
        attempts: Attempts,
        on_change: Callable[[], None],
        folder: SameHost | None = None,
    ) -> None:
        """Begin the call and its threads.

        begin: begins the call, see `Transport.write`. attempts: has the deadline, which counts from the last
        acknowledgement. folder: where to stage bytes; None sends them over the stream.
        on_change: called from another thread after each acknowledgement, and when the stream has ended.
        """
        self.ended = False
        self._session = session
        self._folder = folder
        self._attempts = attempts
        self._on_change = on_change
        self._lock = threading.Lock()
        self._staging = threading.Lock()
        self._cancelled = False
        self._failure: Exception | None = None
        self._outbox: queue.SimpleQueue[Upload | None] = queue.SimpleQueue()
        if not session.pending:
            session.advance()  # a stream that fails at once must have something to fail for
        for upload in session.pending:
            self._outbox.put(upload)
        self._call = begin(frames(self._outbox, self._begun))
        self._reader = threading.Thread(target=self._read, name="kvbank-write-acks", daemon=True)
        self._reader.start()

    def ready(self) -> bool:
        """Tell whether there is nothing to wait for: room for the session's next upload, or the end of the stream."""
        return self.ended or self._session.has_room()

    def done(self) -> bool:
        """Tell whether every chunk that was sent is acknowledged, or will not be."""
        return self.ended or not self._session.pending

    def patience(self) -> float:
        """Return the seconds in which something must change. Errors: DeadlineExceeded where an acknowledgement is
        overdue."""
        self._attempts.progressed(self._session.waiting_since())
        return self._attempts.patience()

    def send(self) -> None:
        """Send the session's next upload, without waiting for anything."""
        with self._lock:
            self._outbox.put(self._session.advance())

    def half_close(self) -> None:
        """Say that no upload follows; the stream ends after the outstanding acknowledgements."""
        self._outbox.put(None)

    def check(self) -> None:
        """Raise, after the end, what prevented an acknowledgement."""
        # An error with nothing outstanding harmed nothing, such as a deadline while the caller made the next chunk.
        if self._session.pending:
            raise self._failure or Unavailable("the server ended the stream before it acknowledged every chunk")

    def cancel(self) -> None:
        """End the call and its threads, and remove staged files; after the end do nothing. Blocks until both threads
        have ended."""
        self._outbox.put(None)
        if not self._session.pending:
            # The server ends a stream that is through at once, and then it was not cancelled.
            self._reader.join(_FAREWELL_S)
        self._call.cancel()
        self._reader.join()
        with self._staging:  # a file that gRPC's thread is writing has a name after that, and there will be no other
            self._cancelled = True
        for upload in self._session.pending:
            if upload.staged and self._folder is not None:
                self._folder.unstage(upload.staged)
                upload.staged = ""

    def _begun(self, upload: Upload) -> Begun:
        """Return header and bytes of an upload: few bytes go with the header, others are in a file by then if that is
        possible."""
        if 0 < upload.length <= self._session.inline:
            return upload.bringing(), []
        with self._staging:
            folder = self._folder if upload.buffers and not self._cancelled else None
            staged = None if folder is None else folder.stage(upload.buffers, upload.header.ByteSize())
            return (upload.header, upload.buffers) if staged is None else (upload.naming(staged), [])

    def _read(self) -> None:
        try:
            for response in self._call:
                with self._lock:
                    self._session.acknowledge(response)
                self._on_change()
        except (grpc.RpcError, ServiceError) as error:
            self._failure = error
        finally:
            self.ended = True
            self._on_change()
