"""The check of keys against the records. This file owns that a key which was verified is believed for a minute at most,
so that a revocation takes effect within that, that the quota of calls of its tenant is as fresh, and that all keys
which are not valid are refused alike.

Threads share a verifier. `known` and `fetch_for` touch no disk; the others block.
"""

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from hmac import compare_digest
from typing import NamedTuple

from memory_service.access import secret
from memory_service.access.rates import Rates
from memory_service.access.tokens import Tokens
from memory_service.domain.access import Caller
from memory_service.domain.clock import SECOND, Clock
from memory_service.domain.errors import ServiceError
from memory_service.observe.seldom import Repeating
from memory_service.storage.base import AccessRecords

# Keys that are remembered; of more, those that were verified first are forgotten.
_MOST_REMEMBERED = 10_000
# How seldom it is written down that a key was used.
_NOTED_US = 60 * SECOND
_NO_SECRET = bytes(32)
_log = logging.getLogger(__name__)


class _Verified(NamedTuple):
    """A key or token that was verified: whose it is, and until when (monotonic) that is believed."""

    caller: Caller
    until: float


class Verifier:
    """Tells callers by their keys, and whether a key is needed at all."""

    def __init__(
        self, records: AccessRecords, clock: Clock, rates: Rates, remembered_s: float, tokens: Tokens | None = None
    ) -> None:
        """Check keys against `records`. rates: learn the quotas of the tenants whose keys are verified. remembered_s:
        the seconds for which a verified key is believed. tokens: what checks credentials that are no keys."""
        self._records, self._clock, self._rates, self._remembered = records, clock, rates, remembered_s
        self._tokens = tokens
        # Tenants that are there, and until when (monotonic) that is believed.
        self._tenants: dict[str, float] = {}
        # By the hash of the whole key, so that no key lies in memory for longer than its call.
        self._known: OrderedDict[bytes, _Verified] = OrderedDict()
        self._lock = threading.Lock()
        # How often keys or quotas have changed: what was read of a key before the last change is not remembered.
        self._changes = 0
        self._failures = Repeating()
        # Whether the store has a key, valid or not. A store that had one never opens again by itself.
        self.needed = records.has_keys() or tokens is not None

    def look(self) -> None:
        """Learn of a first key that another service on the same store has made. Errors: those of the storage."""
        if self._records.has_keys():  # where there was none a moment ago, another thread may have noted one since
            self.needed = True

    def known(self, credential: str) -> Caller | None:
        """Return the caller of a credential that was verified a short while ago; None where it has to be verified."""
        found = self._known.get(_hash(credential))
        if found is None or time.monotonic() >= found.until or self.has_ended(found.caller):
            return None
        return found.caller

    def fetch_for(self, credential: str) -> "Future[None] | None":
        """Return what a credential is to wait for before it can be verified; None where that can be done now. See
        `Tokens.fetch_for`."""
        if self._tokens is None or secret.read(credential) is not None:
            return None
        return self._tokens.fetch_for(credential)

    def has_ended(self, caller: Caller) -> bool:
        """Tell whether the end of a caller's key or token, as it was read with the caller, has come."""
        return caller.ends is not None and self._clock.now_us() >= caller.ends

    def verify(self, credential: str) -> Caller | None:
        """Return the caller of a credential; None for one that is not valid. Errors: those of the storage."""
        presented = secret.read(credential)
        if presented is None:
            return self._verified_token(credential)
        changes, key = self._changes, self._records.key(presented.key_id)
        # An unknown key is compared too, so that it takes as long.
        same = compare_digest(presented.sha256, _NO_SECRET if key is None else key.secret_sha256)
        if key is None or not same or not key.valid(self._clock.now_us()):
            return None
        return self._learned_of(key.caller(), changes, credential)

    def _verified_token(self, credential: str) -> Caller | None:
        changes, caller = self._changes, self._tokens.verify(credential) if self._tokens is not None else None
        if caller is None or self.has_ended(caller):
            return None
        return self._learned_of(caller, changes, credential)

    def knows_tenant(self, tenant: str) -> bool:
        """Tell whether a tenant was found to be there a short while ago."""
        return time.monotonic() < self._tenants.get(tenant, 0.0)

    def find_tenant(self, tenant: str) -> bool:
        """Tell whether a tenant is there, and learn its quota. Errors: those of the storage."""
        return self._learned(tenant, self._changes)

    def valid(self, key_id: str) -> bool:
        """Tell whether a key of this id, which was verified before, is still taken. Errors: those of the storage."""
        changes, key = self._changes, self._records.key(key_id)
        return key is not None and key.valid(self._clock.now_us()) and self._learned(key.tenant, changes)

    def note_use(self, key_id: str) -> None:
        """Write down that a key was used, at most once a minute; where that fails, nothing but the note is lost."""
        try:
            key, now = self._records.key(key_id), self._clock.now_us()
            if key is not None and (key.last_used is None or now - key.last_used >= _NOTED_US):
                self._records.used_key(key_id, now)
        except Exception as error:
            self._failures.error(_log, error, "cannot note that a key was used")

    def forget(self) -> None:
        """Believe no key any more that was verified before, because some have changed, or a quota has."""
        with self._lock:
            self._changes += 1
            self._known.clear()
            self._tenants.clear()

    def _learned_of(self, caller: Caller, changes: int, credential: str) -> Caller | None:
        """Learn the quota of a caller's tenant, remember that the credential was verified, and return the caller; None
        where there is no such tenant any more."""
        return caller if self._learned(caller.tenant, changes, credential, caller) else None

    def _learned(self, tenant: str, changes: int, credential: str = "", proven: Caller | None = None) -> bool:
        """Learn the quota of the tenant of a valid key, and remember whose its credential is, if that is given, unless
        something has changed since; return False where there is no such tenant any more."""
        try:
            rate = self._records.tenant(tenant).quota.calls
        except ServiceError as error:
            if error.reason != "TENANT_NOT_FOUND":
                raise
            return False
        with self._lock:
            if changes == self._changes:
                self._rates.learn(tenant, rate)
                self._tenants[tenant] = time.monotonic() + self._remembered
                if proven is not None:
                    self._remember(credential, proven)
        return True

    def _remember(self, credential: str, caller: Caller) -> None:
        self._known[_hash(credential)] = _Verified(caller, time.monotonic() + self._remembered)
        self._known.move_to_end(_hash(credential))
        while len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)


def _hash(credential: str) -> bytes:
    return hashlib.sha256(credential.encode()).digest()
