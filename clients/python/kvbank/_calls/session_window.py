"""A session's window travels in frames: a header that says how many bytes there are, then the bytes. It is cut and put
together here."""

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import xxhash

from kvbank import _session_models as m
from kvbank._arguments import raw_view
from kvbank._calls.answers import odd, understood
from kvbank._calls.messages import build
from kvbank._exceptions import DataLoss
from kvbank.v1 import session_pb2 as pb
from kvbank.wire.frames import FRAME_BYTES, encode

T_co = TypeVar("T_co", covariant=True)


class Sent:
    """A window that is to be kept. It can be sent any number of times."""

    def __init__(self, session_id: str, data: Any, *, epoch: int, turn: int, stamp: str) -> None:
        """Take the arguments of `Sessions.keep_window`. Errors: InvalidArgument."""
        self._data = raw_view("data", data)
        self._header = build(
            pb.WindowHeader,
            session_id=session_id,
            epoch=epoch,
            turn=turn,
            stamp=stamp,
            size=len(self._data),
            checksum=xxhash.xxh3_64_intdigest(self._data),
        )

    def frames(self) -> Iterator[pb.KeepWindowRequest | bytes]:
        """Yield the frames of one call; those of data are encoded."""
        yield pb.KeepWindowRequest(header=self._header)
        for at in range(0, len(self._data), FRAME_BYTES):
            yield encode([self._data[at : at + FRAME_BYTES]])


class Arriving(Protocol[T_co]):
    """What is made of the frames of a window, as they arrive. whole: no more frames are needed. size: bytes that have
    arrived."""

    whole: bool
    size: int

    def feed(self, frame: pb.ReadWindowResponse | memoryview) -> None: ...

    def finish(self) -> T_co: ...


class Measured:
    """The size of a window, of which the header alone is taken."""

    def __init__(self) -> None:
        self.whole, self.size = False, 0
        self._found = 0

    @understood()
    def feed(self, frame: pb.ReadWindowResponse | memoryview) -> None:
        """Take the first frame. Errors: Internal for one that makes no sense."""
        if isinstance(frame, memoryview) or not frame.HasField("header"):
            raise odd("its first frame, and no other, must be a header")
        self.whole, self._found = True, frame.header.size

    def finish(self) -> int:
        """Return the bytes of the window; 0 where there is none."""
        return self._found


class Received:
    """A window that arrives, to its end."""

    whole = False

    def __init__(self) -> None:
        self._header: pb.WindowHeader | None = None
        self._parts: list[memoryview] = []
        # Bytes that have arrived.
        self.size = 0

    @understood()
    def feed(self, frame: pb.ReadWindowResponse | memoryview) -> None:
        """Take the next frame: a message, or a view of bytes. Errors: Internal for one that makes no sense."""
        if not isinstance(frame, memoryview):
            if self._header is not None or not frame.HasField("header"):
                raise odd("its first frame, and no other, must be a header")
            self._header = frame.header
            return
        if self._header is None:
            raise odd("its first frame, and no other, must be a header")
        self._parts.append(frame)
        self.size += len(frame)
        if self.size > self._header.size:
            raise odd("it has more bytes than its header says")

    @understood()
    def finish(self) -> m.Window | None:
        """Return the window, verified; None where there was none. Errors: DataLoss."""
        head = self._header
        if head is None:
            return None
        data = b"".join(self._parts)
        if len(data) != head.size or xxhash.xxh3_64_intdigest(data) != head.checksum:
            raise DataLoss(
                f"the window of session {head.session_id} does not match its checksum", reason="CHECKSUM_MISMATCH"
            )
        return m.Window(head.turn, head.stamp, data)
