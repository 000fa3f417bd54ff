"""Spans and points of time: messages out of what a caller gives, and values out of answers."""

from datetime import datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration

from kvbank._arguments import instance, invalid, shown
from kvbank._calls.answers import read_time


def span(field: str, value: timedelta) -> Duration:
    """Return the message of a span of time that is not negative. Errors: InvalidArgument."""
    if instance(field, value, timedelta) < timedelta(0):
        raise invalid(field, f"expected a span of time that is not negative, got {shown(value.total_seconds())} s")
    made = Duration()
    try:
        made.FromTimedelta(value)
    except (ValueError, OverflowError):
        raise invalid(field, "expected at most 10,000 years") from None
    return made


def optional(message: Any, field: str) -> datetime | None:
    """Return a time of a message, in UTC; None where it is absent. Errors: see `read_time`."""
    return read_time(getattr(message, field)) if message.HasField(field) else None
