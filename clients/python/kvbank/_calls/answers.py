"""Answers come from a server that may be broken or hostile: what cannot be understood becomes an error of this
package."""

from contextlib import ContextDecorator
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from kvbank._exceptions import Internal, InvalidArgument, ServiceError


class _Understood(ContextDecorator):
    """Does what `understood` says. It is a class, because it is entered for each chunk of an answer, and a generator
    costs more."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if isinstance(error, InvalidArgument):
            raise odd(str(error)) from error
        if isinstance(error, Exception) and not isinstance(error, ServiceError):
            raise odd(f"{type(error).__name__}: {error}") from error


_UNDERSTOOD = _Understood()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def understood() -> _Understood:
    """Turn whatever is raised inside into Internal, but let ServiceErrors pass. It can be used as a decorator, too.

    An InvalidArgument becomes Internal as well: a model raises it for a value of the answer, which is no fault of the
    caller.
    """
    return _UNDERSTOOD


def read_time(message: Timestamp) -> datetime:
    """Return the time of a message, in UTC. Errors: ValueError, OverflowError for one outside of the calendar."""
    # As protobuf's ToDatetime does, which takes three times as long.
    if not 0 <= message.nanos < 1_000_000_000:
        raise ValueError(f"{message.nanos} ns are no part of a second")
    return _EPOCH + timedelta(seconds=message.seconds, microseconds=message.nanos // 1000)


def odd(what: str) -> Internal:
    """Return the error for an answer that makes no sense; the caller raises it."""
    return Internal(f"the answer of the server makes no sense: {what}", reason="ODD_ANSWER")
