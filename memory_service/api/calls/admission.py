"""Callers are let in here, or refused, before anything of their calls is done. This file owns when a key is needed, and
that a host which tries keys keeps no other waiting.

A key, or a certificate that the operator has given a role, is needed but over a unix socket, and, as long as there are
neither keys nor such certificates, over the loopback. A key that is not valid is answered after a pause, during which
its host keeps a turn, also when the caller goes; a host has few turns, so that it tries few keys a second, while keys
that were verified a short while ago pass without one. Everything here is used in the event loop.
"""

import asyncio
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from memory_service.access import credentials, peers
from memory_service.access.certificates import Certificates
from memory_service.access.rates import Rates
from memory_service.access.verifier import Verifier
from memory_service.api.calls.fairness import FairTurns, Holdings, Owner
from memory_service.api.calls.running import Calls
from memory_service.domain.access import OWNER, Caller
from memory_service.domain.errors import ServiceError, right_missing, unauthenticated
from memory_service.domain.limits import Limits
from memory_service.domain.rights import RIGHTS
from memory_service.observe import request as requests
from memory_service.observe.seldom import Repeating

# Keys that are looked at at a time, one less of a single host.
_TURNS = 4
# Calls that may wait for that, and those of a single host.
_MOST_WAITING, _MOST_OF_HOST = 256, 192
Metadata = Iterable[tuple[str, str | bytes]]
_log = logging.getLogger(__name__)


class Admission:
    """Tells who makes each call, and refuses those who may not."""

    def __init__(
        self, verifier: Verifier, certificates: Certificates, rates: Rates, insecure: bool, limits: Limits
    ) -> None:
        """Go by the keys that `verifier` knows, by certificates, and by the rates of tenants. insecure: whether callers
        from anywhere are let in as long as no caller is known by either."""
        self._verifier, self._certificates, self._rates = verifier, certificates, rates
        self._insecure, self._limits = insecure, limits
        self._failures = Repeating()
        self._turns = FairTurns(_TURNS)
        self._waiting = Holdings()
        # Apart from the threads of the storage, so that keys are looked at also when all of those are busy; and notes
        # of their use apart from these, because a note is a write, which may have to wait for others.
        self._threads = ThreadPoolExecutor(_TURNS, "kvbank-keys")
        self._notes = ThreadPoolExecutor(1, "kvbank-key-notes")

    @property
    def knows_certificates(self) -> bool:
        """Tell whether the names in a caller's certificate count."""
        return bool(self._certificates)

    @property
    def needed(self) -> bool:
        """Tell whether callers that are no owners are told apart, so that each has to show who it is."""
        return self._verifier.needed or self.knows_certificates

    async def admit(self, method: str, metadata: Metadata, peer: str, names: Iterable[str] = ()) -> Caller:
        """Return the caller of the running request, who may make it, and note it in the request. names: those in the
        caller's certificate. Errors: UNAUTHENTICATED, PERMISSION_DENIED, RATE_EXCEEDED, NOT_SERVING."""
        caller = await self.caller(metadata, peer, names)
        if request := requests.current():
            request.caller = caller
        if not caller.is_owner:
            self._rates.count(caller.tenant)
        right = RIGHTS.get(method)
        if right is None or not caller.may(right):
            raise right_missing(method, right or "none")
        return caller

    def knows(self, metadata: Metadata) -> bool:
        """Tell whether the caller of a call can be told at once by its metadata, without the records and a pause."""
        if not self.needed:
            return True
        try:
            credential = credentials.of(metadata)
        except ServiceError:
            return False
        return bool(credential) and self._verifier.known(credential) is not None

    async def caller(self, metadata: Metadata, peer: str, names: Iterable[str] = ()) -> Caller:
        """Return the caller of a call. A key counts before a certificate, which many callers behind one proxy may
        share. Errors: UNAUTHENTICATED, NOT_SERVING."""
        if not self.needed and (self._insecure or peers.is_local(peer)):
            return OWNER
        credential = credentials.of(metadata)
        if not credential:
            if peers.is_unix(peer):
                return OWNER
            known = self._certificates.caller(names)
            if known is None or not await self._has_tenant(known):
                raise unauthenticated()
            return known
        return self._verifier.known(credential) or await self._verified(credential, peers.host(peer))

    async def _has_tenant(self, caller: Caller) -> bool:
        """Tell whether the tenant of a caller with a certificate is there, whose quota is then known."""
        if self._verifier.knows_tenant(caller.tenant):
            return True
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._verifier.find_tenant, caller.tenant)

    async def admit_to_figures(self, headers: Metadata, peer: str, names: Iterable[str] = ()) -> None:
        """Let in a caller of the figures over HTTP, who needs the right of an operator once callers are told apart.
        Errors: as `admit`."""
        if self.needed and not (await self.caller(headers, peer, names)).may("operate"):
            raise right_missing("/metrics", "operate")

    async def look_after(self, calls: Calls) -> NoReturn:
        """End the calls under way whose keys are not taken any more, for as long as this runs."""
        while True:
            await asyncio.sleep(self._limits.key_looked_at_s)
            for key_id, made in calls.made_with_keys().items():
                if not await self._still_valid(key_id):
                    for call in made:
                        call.end(unauthenticated())

    async def _still_valid(self, key_id: str) -> bool:
        """Tell whether a key is still taken; yes where the storage does not say."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._verifier.valid, key_id)
        except Exception as error:
            self._failures.error(_log, error, "cannot look at the keys of calls that are under way")
            return True

    def close(self) -> None:
        """Look at no more keys."""
        for threads in (self._threads, self._notes):
            threads.shutdown(wait=True, cancel_futures=True)

    async def _verified(self, credential: str, host: str) -> Caller:
        """Return the caller of a credential that is not known yet. Errors: UNAUTHENTICATED, NOT_SERVING."""
        loop, pause = asyncio.get_running_loop(), 0.0
        owner = await self._turn(host)
        try:
            # It may have been verified for another call meanwhile.
            caller = self._verifier.known(credential)
            if caller is None:
                caller = await loop.run_in_executor(self._threads, self._verifier.verify, credential)
            pause = self._limits.wrong_key_s if caller is None else 0.0
        finally:
            # By the clock, because a caller may go as soon as a good key would have been answered.
            loop.call_later(pause, self._turns.give, owner)
        if caller is None:
            await asyncio.sleep(pause)
            raise unauthenticated()
        if caller.key_id:
            self._notes.submit(self._verifier.note_use, caller.key_id)
        return caller

    async def _turn(self, host: str) -> Owner:
        """Wait for a turn of a host, and return whose it is. Errors: NOT_SERVING where too many wait."""
        owner = Owner(host)
        if self._waiting.total >= _MOST_WAITING or self._waiting.of_connection(owner) >= _MOST_OF_HOST:
            text = "too many calls wait for their keys to be looked at; this one can be made again"
            raise ServiceError("NOT_SERVING", text)
        self._waiting.add(owner, 1)
        try:
            await self._turns.take(owner)
        finally:
            self._waiting.add(owner, -1)
        return owner
