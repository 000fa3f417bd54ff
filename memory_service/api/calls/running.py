"""The calls over gRPC that are under way. This file owns that each of them can be ended with an error that its caller
is told, that none begins once the service stops, and that no tenant has all that there may be.

A server of grpc.aio tells a caller nothing when the task of a call is cancelled, and when it is stopped it cancels the
calls that its core has and that were not handed over yet. So a call is ended by an error of its own, and gRPC's server
is stopped when no call is left.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any, NamedTuple

from grpc._cython.cygrpc import ExecuteBatchError

from memory_service.api.calls.fairness import Holdings, Owner
from memory_service.api.messages.status import CODE_OF, status
from memory_service.domain.access import Caller
from memory_service.domain.errors import ServiceError
from memory_service.observe import request as requests

# Seconds within which calls that were ended must be gone.
_FAREWELL_S = 1.0
# While calls come within so many seconds of each other, gRPC's core may have some that it has not handed over; that is
# waited for at most so many seconds.
_QUIET_S, _LONGEST_UNQUIET_S = 0.05, 0.5
_DETAILS = "grpc-status-details-bin"


def refuse(context: Any, refusal: ServiceError) -> None:
    """Set the status with which a call ends, with its reason; the status is sent when the handling of the call returns.

    gRPC's own abort is not used: the error that it raises, and keeps with the call, refers to the frames of the call,
    and these to the call, so that the message of the last call of all would stay in memory.
    """
    if request := requests.current():
        request.reason = refusal.reason
    context.set_code(CODE_OF[refusal.reason])
    context.set_details(refusal.message)
    context.set_trailing_metadata(((_DETAILS, status(refusal).SerializeToString()),))


class Proof(NamedTuple):
    """What a call was let in by: its caller, and the certificate that its connection has shown (PEM; empty for
    none)."""

    caller: Caller
    certificate: bytes


class Call:
    """A call under way, made in the task that handles it.

    `owner` is whose the turns and bytes of the call are; the connection of a unix socket is not known. `proof` is who
    makes the call, once that is known. `counted` is whether the call is counted among those of its owner. `ended` is
    the error with which the call was ended from outside, if it was.
    """

    def __init__(self, peer: str) -> None:
        self.proof: Proof | None = None
        self.owner = Owner("" if peer.startswith("unix:") else peer)
        self.counted = False
        self.ended: ServiceError | None = None
        task = asyncio.current_task()
        assert task is not None
        self._task = task

    def belongs_to(self, caller: Caller, certificate: bytes) -> None:
        """Note who makes this call. The owner of the data folder is of no tenant that has to leave room for others."""
        self.proof = Proof(caller, certificate)
        self.owner = self.owner._replace(tenant="" if caller.is_owner else caller.tenant)

    def end(self, error: ServiceError) -> None:
        """End this call with an error, whatever its task waits for; a second call does nothing."""
        if self.ended is None and not self._task.done():
            self.ended = error
            self._task.cancel()

    def resume(self) -> None:
        """Let the task of this call, which `end` has cancelled, go on, so that it can tell the caller the error."""
        self._task.uncancel()

    def end_stalled(self) -> None:
        """End this call because its caller is slow and others wait."""
        text = "others waited for the memory that this call held while its caller sent or took next to nothing"
        self.end(ServiceError("NOT_SERVING", f"{text}; it was ended and can be made again"))


_current: ContextVar[Call] = ContextVar("kvbank_call")


def current() -> Call:
    """Return the call that this task works on."""
    return _current.get()


class Calls:
    """Keeps all calls of one event loop that are under way, and runs new ones until they are drained."""

    def __init__(self, most: int) -> None:
        """Let a tenant have three quarters of `most` calls, which are all that the server takes at a time."""
        self._most = max(1, most * 3 // 4)
        self._held = Holdings()
        self._running: set[Call] = set()
        self._draining = False
        self._refused = 0
        self._gone = asyncio.Event()

    async def run(self, context: Any, handling: Coroutine[Any, Any, Any]) -> Any:
        """Run the handling of a call, and return what that returns; where the call is refused or ended, return an
        answer that is not sent."""
        if self._draining:
            handling.close()
            self._refused += 1
            refuse(context, ServiceError("NOT_SERVING", "the service is shutting down"))
            return b""
        call = Call(context.peer())
        _current.set(call)
        self._running.add(call)
        # A call has ended when gRPC has sent its answer, not before.
        context.add_done_callback(lambda _: self._left(call))
        try:
            return await handling
        except asyncio.CancelledError:
            if call.ended is None:
                raise
            call.resume()
            refuse(context, call.ended)
            return b""
        except ExecuteBatchError:
            raise asyncio.CancelledError from None  # the caller has gone

    def let_in(self, call: Call, caller: Caller, certificate: bytes = b"") -> None:
        """Note who makes a call that is under way, in its request too. Errors: NOT_SERVING where the caller's tenant
        has too many."""
        if request := requests.current():
            request.caller = caller
        call.belongs_to(caller, certificate)
        self._held.add(call.owner, 1)
        call.counted = True
        if self._held.of_tenant(call.owner) > self._most:
            text = f"the tenant has {self._most} calls under way, which are all that one may have"
            raise ServiceError("NOT_SERVING", f"{text}; this one can be made again")

    def by_proof(self) -> dict[Proof, list[Call]]:
        """Return the calls that are under way and were let in, by what they were let in by."""
        made = defaultdict(list)
        for call in self._running:
            if call.proof is not None:
                made[call.proof].append(call)
        return made

    def _left(self, call: Call) -> None:
        self._running.discard(call)
        if call.counted:
            self._held.add(call.owner, -1)
        self._gone.set()

    async def drain(self, grace: float) -> None:
        """Let no call begin; give those that run `grace` seconds, and end the rest with an error that says so."""
        busy = bool(self._running)
        self._draining = True
        await self._emptied(grace)
        for call in list(self._running):
            call.end(ServiceError("NOT_SERVING", "the service stopped before this call was done"))
        await self._emptied(_FAREWELL_S)
        until = time.monotonic() + _LONGEST_UNQUIET_S
        while (busy or self._refused) and time.monotonic() < until:
            refused = self._refused
            await asyncio.sleep(_QUIET_S)
            if refused == self._refused:
                break

    async def _emptied(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._running and (left := until - time.monotonic()) > 0:
            self._gone.clear()
            try:
                await asyncio.wait_for(self._gone.wait(), left)
            except TimeoutError:
                return
