"""Who calls, and what they may do. This file owns which rights a role has, and which banks of its tenant a caller may
name.

A caller is of one tenant and sees nothing of another's. A right is what a method of the service asks for
(`domain.rights`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from memory_service.domain.errors import bank_not_allowed
from memory_service.domain.tenants import DEFAULT_TENANT

# The roles that a key can have.
Role = Literal["read", "write", "admin", "operator"]
# "known": any caller that is let in. "forget": something of the own tenant, or a tenant as a whole. "keys": the keys of
# the own tenant, or of all. "operate": the service as a whole.
Right = Literal["known", "read", "write", "forget", "admin", "keys", "operate"]

EVERY_BANK = ("*",)
_RIGHTS: Mapping[Role, frozenset[Right]] = {
    "read": frozenset({"known", "read"}),
    "write": frozenset({"known", "read", "write", "forget"}),
    "admin": frozenset({"known", "read", "write", "forget", "admin", "keys"}),
    "operator": frozenset({"known", "forget", "keys", "operate"}),
}


@dataclass(frozen=True, slots=True)
class Caller:
    """The maker of a call, which is of one tenant, has some roles, and may name some banks.

    banks: patterns as those of a shell (`*`, `?`, `[a-z]`), of which the name of a bank must match one, case and all.
    key_id: the id of the key with which the call was made; "" where it was made without one. subject: the name in the
    certificate with which it was made; "" where that does not count. ends: the time (microseconds since 1970) from
    which on the key or token is not taken any more, as far as that is known; None for never.
    """

    tenant: str
    roles: frozenset[Role]
    banks: tuple[str, ...] = EVERY_BANK
    key_id: str = ""
    subject: str = ""
    ends: int | None = None

    @staticmethod
    def owner() -> "Caller":
        """Return the owner of the data folder: the admin of the default tenant, and the operator of the service."""
        return OWNER

    @property
    def is_owner(self) -> bool:
        """Tell whether this is the owner of the data folder, which needs no key."""
        return self is OWNER

    def may(self, right: Right) -> bool:
        """Tell whether a role of the caller has a right."""
        return any(right in _RIGHTS[role] for role in self.roles)

    def may_use(self, bank: str) -> bool:
        """Tell whether the caller may name a bank of its tenant."""
        return self.banks == EVERY_BANK or any(fnmatchcase(bank, pattern) for pattern in self.banks)

    def check_may_use(self, banks: Iterable[str]) -> None:
        """Refuse banks that the caller may not name, whether they exist or not. Errors: PERMISSION_DENIED."""
        for bank in banks:
            if not self.may_use(bank):
                raise bank_not_allowed(bank)

    def may_manage(self, tenant: str, role: Role | None = None) -> bool:
        """Tell whether the caller may make, see and revoke keys of a tenant that have a role: an operator all, an admin
        those of its own tenant that are no operator's. An admin of some banks alone manages none, because a key that it
        made could name more. role: None asks for the keys of the tenant that are no operator's."""
        if "operator" in self.roles:
            return True
        of_own = self.may("keys") and tenant == self.tenant and self.banks == EVERY_BANK
        return of_own and role != "operator"


OWNER = Caller(DEFAULT_TENANT, frozenset({"admin", "operator"}))


class KeyPlace(NamedTuple):
    """The place of a key in a list that begins with the oldest: when it was made, and of those of one moment, its
    id."""

    created: int
    key_id: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is stored, without its secret. Times are in microseconds since 1970; None where there is none.

    secret_sha256: of the bytes of the secret, which has enough chance in it that this needs no salt. revoked: the time
    from which on the key is refused, which may lie ahead.
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

    @property
    def ends(self) -> int | None:
        """Return the time from which on the key is refused, None for never."""
        return min((end for end in (self.expires, self.revoked) if end is not None), default=None)

    @property
    def place(self) -> KeyPlace:
        """Return the place of the key in a list that begins with the oldest."""
        return KeyPlace(self.created, self.key_id)

    def valid(self, now: int) -> bool:
        """Tell whether the key is taken at a time."""
        return self.ends is None or now < self.ends

    def caller(self) -> Caller:
        """Return the caller of a call that comes with this key."""
        return Caller(self.tenant, frozenset({self.role}), self.banks, self.key_id, ends=self.ends)
