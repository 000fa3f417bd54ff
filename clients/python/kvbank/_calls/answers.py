"""Answers come from a server that may be broken or hostile: what cannot be understood becomes an error of this
package."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from kvbank._exceptions import Internal, InvalidArgument, ServiceError


@contextmanager
def understood() -> Iterator[None]:
    """Turn whatever is raised inside into Internal, but let ServiceErrors pass. It can be used as a decorator, too.

    An InvalidArgument becomes Internal as well: a model raises it for a value of the answer, which is no fault of the
    caller.
    """
    try:
        yield
    except InvalidArgument as error:
        raise odd(str(error)) from error
    except ServiceError:
        raise
    except Exception as error:
        raise odd(f"{type(error).__name__}: {error}") from error


def read_time(message: Timestamp) -> datetime:
    """Return the time of a message, in UTC. Errors: ValueError, OverflowError for one outside of the calendar."""
    return message.ToDatetime(tzinfo=UTC)


def odd(what: str) -> Internal:
    """Return the error for an answer that makes no sense; the caller raises it."""
    return Internal(f"the answer of the server makes no sense: {what}", reason="ODD_ANSWER")
