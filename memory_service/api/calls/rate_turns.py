"""Where calls and chunks wait whose tenant has made as many calls as its quota allows a second. This file owns that a
caller who waits for its answers calls no more often than that, so that the event loop is not busy with refusals; that
few calls wait, and each for a short time; and that calls and chunks of a tenant which wait take turns.

Everything here is used in the event loop alone.
"""

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from memory_service.access.rates import Rates
from memory_service.domain.errors import ServiceError
from memory_service.domain.limits import Limits

# A future is True where there is a call for who waits, and False where the service stops.
_Waiting = deque["asyncio.Future[bool]"]


@dataclass(slots=True)
class _Line:
    """What waits of a tenant, in the order in which it came. `timer` looks at the line again, and `last` is the kind
    that had the last turn."""

    calls: _Waiting = field(default_factory=deque)
    chunks: _Waiting = field(default_factory=deque)
    timer: asyncio.TimerHandle | None = None
    last: _Waiting | None = None

    def next(self) -> _Waiting | None:
        """Return the kind whose turn it is; None where nothing waits."""
        for waiting in (self.calls, self.chunks):
            while waiting and waiting[0].done():  # its caller has gone just now
                waiting.popleft()
        if self.calls and self.chunks:
            return self.chunks if self.last is self.calls else self.calls
        return self.calls or self.chunks or None


class RateTurns:
    """Lets calls and chunks in at the rates of their tenants."""

    def __init__(self, rates: Rates, limits: Limits, max_calls: int) -> None:
        """Go by these rates. Of `max_calls`, which the server takes at a time, a quarter may be calls of one tenant
        that wait, and half of them those of all tenants."""
        self._rates, self._longest = rates, limits.held_back_s
        self._most, self._most_together = max(1, max_calls // 4), max(1, max_calls // 2)
        self._lines: dict[str, _Line] = {}
        self._held = 0
        self._stopping = False

    def stop(self) -> None:
        """Let nothing wait any more: what waits is told NOT_SERVING, and so is each chunk that comes."""
        self._stopping = True
        for line in self._lines.values():
            for come in (*line.calls, *line.chunks):
                if not come.done():
                    come.set_result(False)

    def passes(self, tenant: str) -> bool:
        """Count a call that need not wait, and return True; otherwise count nothing."""
        line = self._lines.get(tenant)
        return not (line and line.calls) and not self._rates.until_call(tenant)

    async def call(self, tenant: str, left: float | None) -> None:
        """Count a call once there is one for it. left: the seconds for which its caller waits for the answer, None for
        any; at most half of them are spent here. Errors: RATE_EXCEEDED, at once where it would wait longer or too many
        wait; NOT_SERVING during a stop."""
        if self.passes(tenant):
            return
        line = self._lines.setdefault(tenant, _Line())
        patience = self._longest if left is None else min(self._longest, left / 2)
        ahead = len(line.calls) + min(len(line.calls) + 1, len(line.chunks))
        refusal = self._rates.refusal(tenant, ahead)
        full = len(line.calls) >= self._most or self._held >= self._most_together
        if full or refusal.seconds > patience:
            self._serve(tenant)
            raise refusal
        self._held += 1
        try:
            await self._wait(tenant, line.calls, patience)
        finally:
            self._held -= 1

    def chunk_passes(self, tenant: str) -> bool:
        """Count a chunk of a write stream that need not wait, and return True; otherwise count nothing.

        Chunks leave half of the bucket to calls that come, unless calls wait as well.
        """
        line = self._lines.get(tenant)
        return not self._stopping and not (line and line.chunks) and not self._rates.until_chunk(tenant)

    async def chunk(self, tenant: str) -> None:
        """Count a chunk that does not pass at once when there is a call for it, however long that takes. Errors:
        NOT_SERVING during a stop."""
        await self._wait(tenant, self._lines.setdefault(tenant, _Line()).chunks)

    async def _wait(self, tenant: str, waiting: _Waiting, patience: float | None = None) -> None:
        """Wait for a call of a tenant in one of its lines. patience: for at most so many seconds, None for any. Errors:
        RATE_EXCEEDED, NOT_SERVING."""
        if self._stopping:
            raise _stopping()
        come: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiting.append(come)
        self._serve(tenant)
        try:
            await asyncio.wait([come], timeout=patience)
        finally:
            with suppress(ValueError):
                waiting.remove(come)
        if not come.done():
            raise self._rates.refusal(tenant)
        if not come.result():
            raise _stopping()

    def _serve(self, tenant: str) -> None:
        """Give those in the line of a tenant the calls that there are, and look again when there is the next one."""
        line = self._lines[tenant]
        if line.timer is not None:
            line.timer.cancel()
        while (waiting := line.next()) is not None:
            until = self._rates.until_call if line.calls else self._rates.until_chunk
            if seconds := until(tenant):
                line.timer = asyncio.get_running_loop().call_later(seconds, self._serve, tenant)
                return
            waiting.popleft().set_result(True)
            line.last = waiting
        del self._lines[tenant]


def _stopping() -> ServiceError:
    return ServiceError("NOT_SERVING", "the service is shutting down")
