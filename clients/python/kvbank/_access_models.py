"""Models of keys and tenants: who may call a service, and how much each tenant may hold. Nothing here does I/O.

Times are aware datetimes in UTC.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from kvbank._arguments import integer, invalid

# What a key allows: see docs/security.md.
Role = Literal["read", "write", "admin", "operator"]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a service takes a caller for.

    roles: "read", "write", "admin", "operator"; the owner of the data folder has several.
    banks: patterns of the names that the caller may use.
    key_id: of the caller's key; "" for a caller that needs none.
    """

    tenant: str
    roles: tuple[str, ...]
    banks: tuple[str, ...]
    key_id: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, without its secret.

    banks: patterns (`*`, `?`, `[a-z]`), one of which the name of a bank must match.
    expire_time: None for a key that does not expire. revoke_time: from when on the key is refused, which may lie ahead;
        None for a key that was not revoked. last_use_time: to the minute; None before the first call.
    """

    key_id: str
    tenant: str
    role: str
    banks: tuple[str, ...]
    create_time: datetime
    expire_time: datetime | None
    revoke_time: datetime | None
    last_use_time: datetime | None


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """A key that was made just now.

    secret: the whole key, as `kvbank.connect(api_key=)` takes it. The service does not keep it, and no `repr` shows it.
    replaced: the key in whose place this one is, where it was made by a rotation.
    """

    key: ApiKey
    secret: str = field(repr=False)
    replaced: ApiKey | None = None


@dataclass(frozen=True, slots=True)
class TenantQuota:
    """Hard bounds of a tenant, over all its banks and keys together. None is no bound.

    banks, chunks, tokens, bytes: what it may hold; a write that would pass that raises QuotaExceeded. Bytes are those
        of payloads, and of what the database has of the chunks.
    calls: what it may call a second, where each chunk of a write is a call too. A call beyond that is refused, and made
        again when the service says so, until its deadline, when it raises RateExceeded; chunks are taken more slowly.
    """

    banks: int | None = None
    chunks: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    calls: int | None = None

    def __post_init__(self) -> None:
        for name in TenantQuota.__slots__:
            bound = getattr(self, name)
            if bound is not None and integer(name, bound) < 1:
                raise invalid(name, "a bound of a quota is 1 or more; None is no bound")


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """What the banks of a tenant hold together, in units of `TenantQuota`."""

    banks: int
    chunks: int
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Tenant:
    """An owner of banks and keys, of which other tenants see nothing."""

    name: str
    create_time: datetime
    quota: TenantQuota
    usage: TenantUsage
