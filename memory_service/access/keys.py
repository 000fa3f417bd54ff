"""The keys of a service are made, listed, revoked and rotated here. This file owns that no caller makes
a key that allows more than the caller may hand out.

Methods block and are called from storage threads.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from memory_service.access import secret
from memory_service.access.verifier import Verifier
from memory_service.domain import validate
from memory_service.domain.access import EVERY_BANK, ApiKey, Caller, KeyPlace, Role
from memory_service.domain.clock import Clock
from memory_service.domain.errors import api_key_not_found, invalid, keys_not_allowed
from memory_service.domain.limits import Limits
from memory_service.domain.validate import LARGEST_TTL
from memory_service.storage.base import AccessRecords

# The patterns of banks that one key names.
MOST_PATTERNS = 100
# Keys that are read from the store at a time: with all their patterns, some have 20 kB.
_PART = 100


class Keys:
    """Manages the keys of all tenants, each for callers that may."""

    def __init__(self, records: AccessRecords, clock: Clock, verifier: Verifier, limits: Limits) -> None:
        """Let a tenant have `Limits.tenant_keys` keys that are neither revoked nor expired."""
        self._records, self._clock, self._verifier, self._most = records, clock, verifier, limits.tenant_keys
        # One key ends at a time, so that two rotations do not put two keys in the place of one.
        self._ending = threading.Lock()

    def create(
        self, caller: Caller, tenant: str, role: Role, banks: Sequence[str], ttl: int | None
    ) -> tuple[ApiKey, str]:
        """Make a key, and return it with its whole text, which is kept nowhere.

        tenant: "" is the caller's own. banks: patterns; none are those of every bank. ttl: microseconds that the key
        lives; None is for ever. Errors: PERMISSION_DENIED, INVALID_FIELD, TENANT_NOT_FOUND, QUOTA_EXCEEDED, DISK_FULL.
        """
        tenant = tenant or caller.tenant
        if not caller.may_manage(tenant, role):
            raise keys_not_allowed()
        _check(banks, ttl)
        now = self._clock.now_us()
        expires = None if ttl is None else now + ttl
        return self._added(ApiKey("", tenant, role, b"", tuple(banks) or EVERY_BANK, now, expires), self._most)

    def of(self, caller: Caller, tenant: str, after: KeyPlace | None = None) -> Iterator[ApiKey]:
        """Yield the keys of a tenant that the caller may manage, oldest first. tenant: "" is the caller's own, or every
        tenant for an operator. after: the place of the key behind which to begin. Errors: PERMISSION_DENIED."""
        every = not tenant and "operator" in caller.roles
        if not every and not caller.may_manage(tenant or caller.tenant):
            raise keys_not_allowed()
        found = self._parts(None if every else tenant or caller.tenant, after)
        return (key for key in found if caller.may_manage(key.tenant, key.role))

    def _parts(self, tenant: str | None, after: KeyPlace | None) -> Iterator[ApiKey]:
        """Yield the keys of a tenant, or all keys, which are read as they are asked for."""
        while found := self._records.keys_of(tenant, after=after, most=_PART):
            yield from found
            after = found[-1].place

    def revoke(self, caller: Caller, key_id: str) -> ApiKey:
        """Refuse a key from now on, and return it. Errors: API_KEY_NOT_FOUND."""
        with self._ending:
            return self._ended(self._managed(caller, key_id), self._clock.now_us())

    def rotate(self, caller: Caller, key_id: str, overlap: int) -> tuple[ApiKey, str, ApiKey]:
        """Make a key of the same tenant, role, banks and time to live as another; return it, its whole text, and the
        key that it replaces. overlap: microseconds for which that one is still taken. Errors: API_KEY_NOT_FOUND;
        INVALID_FIELD for a key that has been revoked or has expired, or is to be soon; QUOTA_EXCEEDED where the tenant
        has no room for both keys."""
        if not 0 <= overlap <= LARGEST_TTL:
            raise invalid("overlap", "must be from 0 to 1000 years")
        with self._ending:
            old, now = self._managed(caller, key_id), self._clock.now_us()
            if old.revoked is not None or not old.valid(now):
                raise invalid("key_id", "is of a key that was revoked or has expired; make a new one")
            life = None if old.expires is None else old.expires - old.created
            expires = None if life is None else now + life
            # Without an overlap the new key takes the place of the old one.
            most = self._most if overlap else self._most + 1
            new, text = self._added(ApiKey("", old.tenant, old.role, b"", old.banks, now, expires), most)
            return new, text, self._ended(old, now + overlap)

    def _managed(self, caller: Caller, key_id: str) -> ApiKey:
        key = self._records.key(key_id)
        if key is None or not caller.may_manage(key.tenant, key.role):
            raise api_key_not_found(key_id)
        return key

    def _added(self, key: ApiKey, most: int) -> tuple[ApiKey, str]:
        """Keep a key under an id that is free, where its tenant then has at most so many, and return it with its
        text."""
        while True:
            key_id, text = secret.new()
            presented = secret.read(text)
            assert presented is not None
            made = replace(key, key_id=key_id, secret_sha256=presented.sha256)
            if self._records.add_key(made, most=most):
                self._verifier.needed = True
                return made, text

    def _ended(self, key: ApiKey, at: int) -> ApiKey:
        ended = self._records.revoke_key(key.key_id, at)
        self._verifier.forget()
        if ended is None:  # its tenant was deleted meanwhile
            raise api_key_not_found(key.key_id)
        return ended


def _check(banks: Sequence[str], ttl: int | None) -> None:
    """Check what is said of a new key. Errors: INVALID_FIELD."""
    if len(banks) > MOST_PATTERNS:
        raise invalid("banks", f"are {len(banks)} patterns; at most {MOST_PATTERNS} are taken")
    for pattern in banks:
        validate.name("banks", pattern)
    if ttl is not None and not 0 < ttl <= LARGEST_TTL:
        raise invalid("ttl", "must be above 0 and at most 1000 years")
