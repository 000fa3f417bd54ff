"""The tenants of a service: whose banks they are, how much each may hold, and how often it may call."""

from dataclasses import dataclass

# The tenant of everything that was stored before there were tenants, and of the owner of the data folder.
DEFAULT_TENANT = "default"


def bank_title(tenant: str, name: str) -> str:
    """Return how logs, traces and care call a bank for people: by its name, and where it is not of the default tenant,
    by that of its tenant too."""
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"


@dataclass(frozen=True, slots=True)
class TenantQuota:
    """Bounds a tenant for good, all its banks and keys together: a write that would pass a bound is refused, and so is
    a call that would be one too many. 0 means unbounded.

    calls: a second; each chunk that comes over a write stream is one too.
    """

    banks: int = 0
    chunks: int = 0
    tokens: int = 0
    bytes: int = 0
    calls: int = 0


@dataclass(frozen=True, slots=True)
class TenantUsage:
    """Counts what all banks of a tenant hold together now; the bytes are those on the disk, the records' included, and
    those of the turns and windows of its sessions."""

    banks: int = 0
    chunks: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tenant:
    """An owner of banks, whose names are its own; `created` is in microseconds since 1970."""

    name: str
    quota: TenantQuota = TenantQuota()
    created: int = 0
