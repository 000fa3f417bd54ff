"""The calls under way whose request has not come yet. This file owns how long such calls may wait, and how many of one
connection: each takes one of the calls that there may be.

Everything here is used in the event loop alone.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from memory_service.api.calls.fairness import Holdings
from memory_service.api.calls.running import Call
from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import Limits


async def first(messages: AsyncIterator[Any]) -> Any:
    """Return the first message of a stream; None where it ends without one."""
    async for message in messages:
        return message
    return None


class Awaited:
    """Bounds the waits for requests of one server."""

    def __init__(self, most: int, limits: Limits) -> None:
        """Let a connection have a quarter of `most` calls, which are all that the server takes at a time, whose request
        is late by `Limits.request_late_s`; and let no request take longer than `Limits.request_s`."""
        self._most, self._limits = max(1, most // 4), limits
        self._late = Holdings()

    @contextmanager
    def request_of(self, call: Call) -> Iterator[None]:
        """Wait for the request of a call in the block. The call is ended where the request does not come in time
        (NOT_SERVING)."""
        wait = _Wait(self._late, self._most, call, self._limits)
        try:
            yield
        finally:
            wait.end()


class _Wait:
    """Waits for the request of one call, which is counted only when it takes a while: of many calls that come at once,
    with their requests, each waits for a moment."""

    def __init__(self, late: Holdings, most: int, call: Call, limits: Limits) -> None:
        self._held, self._most, self._call, self._limits = late, most, call, limits
        self._counted = False
        self._timer = asyncio.get_running_loop().call_later(limits.request_late_s, self._be_late)

    def _be_late(self) -> None:
        self._counted = True
        self._held.add(self._call.owner, 1)
        if self._held.of_connection(self._call.owner) > self._most:
            self._call.end(_refusal(f"{self._most} calls of the connection wait for their requests, the most of one"))
            return
        rest = self._limits.request_s - self._limits.request_late_s
        text = f"its request has not come within {self._limits.request_s:g} s"
        self._timer = asyncio.get_running_loop().call_later(rest, self._call.end, _refusal(text))

    def end(self) -> None:
        """End the wait, because the request has come or the call has ended."""
        self._timer.cancel()
        if self._counted:
            self._held.add(self._call.owner, -1)


def _refusal(text: str) -> ServiceError:
    return ServiceError("NOT_SERVING", f"the call was ended, and can be made again: {text}")
