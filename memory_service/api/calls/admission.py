"""Callers are let in here, or refused, before anything of their calls is done. This file owns when a key is needed, and
that a host which tries keys keeps no other waiting.

A key, or a certificate that the operator has given a role, is needed but over a unix socket, and, as long as there are
neither keys nor such certificates, over the loopback. A key that is not valid is answered after a pause, during which
its host keeps a turn, also when the caller goes; a host has few turns, so that it tries few keys a second, while keys
that were verified a short while ago pass without one. Everything here is used in the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NoReturn

from memory_service.access import credentials, peers
from memory_service.access.certificates import NOTHING, Certificates, Shown
from memory_service.access.verifier import Verifier
from memory_service.api.calls.fairness import FairTurns, Holdings, Owner
from memory_service.api.calls.rate_turns import RateTurns
from memory_service.api.calls.running import Calls, Proof
from memory_service.domain.access import OWNER, Caller
from memory_service.domain.errors import ServiceError, right_missing, unauthenticated
from memory_service.domain.limits import Limits
from memory_service.domain.rights import RIGHTS
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
        self,
        verifier: Verifier,
        certificates: Certificates,
        rate_turns: RateTurns,
        insecure: bool,
        limits: Limits,
        trusts: Callable[[bytes], bool] | None = None,
    ) -> None:
        """Go by the keys that `verifier` knows, by certificates, and by the rates of tenants. insecure: whether callers
        from anywhere are let in as long as no caller is known by either. trusts: where clients need a certificate,
        tells whether one that was shown before (PEM) still is of an authority; see `Tls.trusts`."""
        self._verifier, self._certificates, self._rate_turns = verifier, certificates, rate_turns
        self._insecure, self._limits, self._trusts = insecure, limits, trusts
        self._failures = Repeating()
        self._turns = FairTurns(_TURNS)
        # Calls that wait for a turn, and those that wait for the keys of tokens, which take none meanwhile.
        self._waiting, self._fetching = Holdings(), Holdings()
        # Apart from the threads of the storage, so that keys are looked at also when all of those are busy; and notes
        # of their use apart from these, because a note is a write, which may have to wait for others.
        self._threads = ThreadPoolExecutor(_TURNS, "kvbank-keys")
        self._notes = ThreadPoolExecutor(1, "kvbank-key-notes")

    @property
    def knows_certificates(self) -> bool:
        """Tell whether the certificates of callers are looked at."""
        return self._trusts is not None

    @property
    def needed(self) -> bool:
        """Tell whether callers that are no owners are told apart, so that each has to show who it is."""
        return self._verifier.needed or bool(self._certificates)

    async def admit(self, method: str, caller: Caller, left: float | None) -> None:
        """Refuse a caller who may not call a method, and hold a call back for which there is none left of the quota.

        left: the seconds for which the caller waits for the answer, None for any. Errors: PERMISSION_DENIED,
        RATE_EXCEEDED, NOT_SERVING.
        """
        if not caller.is_owner:
            await self._rate_turns.call(caller.tenant, left)
        right = RIGHTS.get(method)
        if right is None or not caller.may(right):
            raise right_missing(method, right or "none")

    async def caller(self, metadata: Metadata, peer: str, shown: Shown = NOTHING) -> Caller:
        """Return the caller of a call. A key counts before a certificate, which many callers behind one proxy may
        share; but where clients need a certificate, none is let in whose certificate could not be shown once more.
        shown: of the caller's certificate. Errors: UNAUTHENTICATED, NOT_SERVING."""
        if not self._is_trusted(shown.pem):
            raise unauthenticated()
        if not self.needed and (self._insecure or peers.is_local(peer)):
            return OWNER
        credential = credentials.of(metadata)
        if not credential:
            if peers.is_unix(peer):
                return OWNER
            known = self._certificates.caller(shown.names)
            if known is None or not await self._has_tenant(known):
                raise unauthenticated()
            return known
        return self._verifier.known(credential) or await self._verified(credential, peers.host(peer))

    def _is_trusted(self, certificate: bytes) -> bool:
        """Tell whether a certificate (PEM), where there is one, is still of an authority, and valid."""
        return not certificate or self._trusts is None or self._trusts(certificate)

    async def _has_tenant(self, caller: Caller) -> bool:
        """Tell whether the tenant of a caller with a certificate is there, whose quota is then known."""
        if self._verifier.knows_tenant(caller.tenant):
            return True
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._verifier.find_tenant, caller.tenant)

    async def admit_to_figures(self, headers: Metadata, peer: str, shown: Shown = NOTHING) -> None:
        """Let in a caller of the figures over HTTP, who needs the right of an operator once callers are told apart.
        Errors: as `caller`, and PERMISSION_DENIED."""
        if self.needed and not (await self.caller(headers, peer, shown)).may("operate"):
            raise right_missing("/metrics", "operate")

    async def look_after(self, calls: Calls) -> NoReturn:
        """End the calls under way whose callers would not be let in any more, for as long as this runs: soon after the
        end of a key, a token or a certificate, and later where a key was revoked or a tenant deleted, which the records
        say."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(min(self._limits.call_ends_s, self._limits.key_looked_at_s))
            _end(calls, [proof for proof in calls.by_proof() if self._has_ended(proof)])
            await self._look_for_keys()
            if time.monotonic() - looked >= self._limits.key_looked_at_s:
                _end(calls, [proof for proof in calls.by_proof() if not await self._still_valid(proof.caller)])
                looked = time.monotonic()

    async def _look_for_keys(self) -> None:
        """Look whether there is a key by now, where there was none: another service on the same store may make it."""
        if self._verifier.needed:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._verifier.look)
        except Exception as error:
            self._failures.error(_log, error, "cannot look whether callers need a key by now")

    def _has_ended(self, proof: Proof) -> bool:
        """Tell, without the records, whether what a call was let in by has ended."""
        return self._verifier.has_ended(proof.caller) or not self._is_trusted(proof.certificate)

    async def _still_valid(self, caller: Caller) -> bool:
        """Tell whether the key of a caller is still taken, and its tenant still there; yes where the storage does not
        say."""
        if caller.is_owner:
            return True
        ask, name = (
            (self._verifier.valid, caller.key_id) if caller.key_id else (self._verifier.find_tenant, caller.tenant)
        )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, ask, name)
        except Exception as error:
            self._failures.error(_log, error, "cannot look at the keys of calls that are under way")
            return True

    def close(self) -> None:
        """Look at no more keys."""
        for threads in (self._threads, self._notes):
            threads.shutdown(wait=True, cancel_futures=True)

    async def _verified(self, credential: str, host: str) -> Caller:
        """Return the caller of a credential that is not known yet. Errors: UNAUTHENTICATED, NOT_SERVING."""
        if (fetching := self._verifier.fetch_for(credential)) is not None:
            with _counted(self._fetching, Owner(host)):
                await asyncio.wait([asyncio.wrap_future(fetching)], timeout=self._limits.token_keys_patience_s)
        owner = await self._turn(host)
        # It may have been verified for another call meanwhile.
        if (caller := self._verifier.known(credential)) is not None:
            self._turns.give(owner)
            return caller
        caller = await asyncio.shield(self._looked_at(credential, owner))
        if caller is None:
            await asyncio.sleep(self._limits.wrong_key_s)
            raise unauthenticated()
        if caller.key_id:
            self._notes.submit(self._verifier.note_use, caller.key_id)
        return caller

    def _looked_at(self, credential: str, owner: Owner) -> "asyncio.Future[Caller | None]":
        """Verify a credential in a thread, and give back the turn of its host: when that is done, also where the caller
        has gone, so that no host has more threads than turns; and later by the pause where the credential is not valid.
        """
        loop = asyncio.get_running_loop()
        looked_at = loop.run_in_executor(self._threads, self._verifier.verify, credential)

        def give(done: "asyncio.Future[Caller | None]") -> None:
            wrong = not done.cancelled() and done.exception() is None and done.result() is None
            # By the clock, because a caller may go as soon as a good key would have been answered.
            loop.call_later(self._limits.wrong_key_s if wrong else 0.0, self._turns.give, owner)

        looked_at.add_done_callback(give)
        return looked_at

    async def _turn(self, host: str) -> Owner:
        """Wait for a turn of a host, and return whose it is. Errors: NOT_SERVING where too many wait."""
        owner = Owner(host)
        with _counted(self._waiting, owner):
            await self._turns.take(owner)
        return owner


@contextmanager
def _counted(waiting: Holdings, owner: Owner) -> Iterator[None]:
    """Count a call of a host among those that wait. Errors: NOT_SERVING where these are too many."""
    if waiting.total >= _MOST_WAITING or waiting.of_connection(owner) >= _MOST_OF_HOST:
        raise ServiceError(
            "NOT_SERVING", "too many calls wait for their keys to be looked at; this one can be made again"
        )
    waiting.add(owner, 1)
    try:
        yield
    finally:
        waiting.add(owner, -1)


def _end(calls: Calls, proofs: Collection[Proof]) -> None:
    """End the calls that were let in by one of these."""
    made = calls.by_proof()
    for proof in proofs:
        for call in made.get(proof, ()):
            call.end(unauthenticated())
