"""An API key as the store keeps it: whom it speaks for, and a hash of its secret."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key by which a caller proves who it is. `banks` are globs of the names that it may use; `secret_sha256` is the
    SHA-256 of the secret, which itself is kept nowhere. Times are in microseconds since 1970, None for never."""

    key_id: str
    tenant: str
    role: str
    banks: tuple[str, ...]
    # Not shown where a key is printed by accident.
    secret_sha256: bytes = field(default=b"", repr=False)
    created: int = 0
    expires: int | None = None
    revoked: int | None = None
    last_used: int | None = None
