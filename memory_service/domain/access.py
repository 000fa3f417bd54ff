"""Who calls, and what they may do. This file owns which rights a role has, and which banks of its tenant a caller may
name.

A caller is of one tenant and sees nothing of another's. A right is what a method of the service asks for
(`domain.rights`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from memory_service.domain.tenants import DEFAULT_TENANT

# The roles that a key can have.
Role = Literal["read", "write", "admin", "operator"]
# "known": any caller that is let in. "keys": the keys of the own tenant, or of all. "operate": the service as a whole.
Right = Literal["known", "read", "write", "admin", "keys", "operate"]

EVERY_BANK = ("*",)
_RIGHTS: Mapping[Role, frozenset[Right]] = {
    "read": frozenset({"known", "read"}),
    "write": frozenset({"known", "read", "write"}),
    "admin": frozenset({"known", "read", "write", "admin", "keys"}),
    "operator": frozenset({"known", "keys", "operate"}),
}


@dataclass(frozen=True, slots=True)
class Caller:
    """The maker of a call, which is of one tenant, has some roles, and may name some banks.

    banks: patterns as those of a shell (`*`, `?`, `[a-z]`), of which the name of a bank must match one, case and all.
    key_id: the id of the key with which the call was made; "" where it was made without one.
    """

    tenant: str
    roles: frozenset[Role]
    banks: tuple[str, ...] = EVERY_BANK
    key_id: str = ""

    @staticmethod
    def owner() -> "Caller":
        """Return the owner of the data folder: the admin of the default tenant, and the operator of the service."""
        return OWNER

    @property
    def is_owner(self) -> bool:
        """Tell whether this is the owner of the data folder, which needs no key."""
        return self == OWNER

    def may(self, right: Right) -> bool:
        """Tell whether a role of the caller has a right."""
        return any(right in _RIGHTS[role] for role in self.roles)

    def may_use(self, bank: str) -> bool:
        """Tell whether the caller may name a bank of its tenant."""
        return self.banks == EVERY_BANK or any(fnmatchcase(bank, pattern) for pattern in self.banks)

    def may_manage(self, tenant: str) -> bool:
        """Tell whether the caller may make, list and revoke keys of a tenant: its own, or any as an operator. A caller
        of some banks alone manages none, because a key that it made could name more."""
        if "operator" in self.roles:
            return True
        return self.may("keys") and tenant == self.tenant and self.banks == EVERY_BANK


OWNER = Caller(DEFAULT_TENANT, frozenset({"admin", "operator"}))


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is stored, without its secret. Times are in microseconds since 1970; None where there is none.

    secret_sha256: of the bytes of the secret, which has enough chance in it that this needs no salt.
    """

    key_id: str
    tenant: str
    role: Role
    secret_sha256: bytes = field(repr=False)
    banks: tuple[str, ...] = EVERY_BANK
    created: int = 0
    expires: int | None = None
    revoked: int | None = None
    last_used: int | None = None

    def valid(self, now: int) -> bool:
        """Tell whether the key is neither revoked nor expired at a time."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def caller(self) -> Caller:
        """Return the caller of a call that comes with this key."""
        return Caller(self.tenant, frozenset({self.role}), self.banks, self.key_id)
