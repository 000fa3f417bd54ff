"""The standard streams are prepared here so that nothing that is read or written there ends a command."""

import contextlib
import io
import os
import sys
from typing import Any


def prepare() -> None:
    """Open what was closed, let no character and no failure of stderr raise, and keep gRPC from writing there: about
    handshakes that fail, of which anybody can make many, with a name in the line that the caller chose, line ends and
    all. What counts of that is in the errors of calls.

    A stream that was closed is opened on the null device: else the next file that is opened would get its number, and
    what a library prints would be written into that file. Bytes of stdin that are not text are read as surrogates (see
    `typed`), and characters that the encoding of stdout does not have are written as escapes.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 (lives as long as the process)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Aside(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, like: Any) -> io.TextIOWrapper:
    """Return a text stream over `raw`, as `like` is one; it escapes the characters that it cannot encode."""
    lines, through = getattr(like, "line_buffering", True), getattr(like, "write_through", False)
    buffer: Any = io.BufferedWriter(raw)
    encoding = getattr(like, "encoding", "utf-8")
    return io.TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=lines or through)


def lost_output() -> OSError | None:
    """Return why some of what was printed could not be written; None where all of it was.

    After a failure stdout is the null device: what is still buffered would fail again when Python ends.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Output) or raw.failed is None:
        return None
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    return raw.failed


def typed(line: str) -> str:
    """Return a line that was read from stdin as its writer meant it: UTF-8, or else Latin-1.

    Nothing is lost: every byte is a character of Latin-1. The mark that some programs put in front of UTF-8 is no text.
    """
    data = line.encode("utf-8", errors="surrogateescape")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class _Output(io.FileIO):
    """The file of stdout, whose errors name the output, as those of other files name the file. failed: the last one."""

    failed: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = OSError(error.errno, error.strerror, "the output")
            raise self.failed from None


class _Aside(io.FileIO):
    """The file of stderr, which drops what cannot be written: a full disk must not end the work that it tells of."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes
