"""Callers that are known by the certificate that they show (mutual TLS). This file owns that a certificate counts by
the names in it (its SAN) that the operator has given a tenant and a role, and by nothing else.

That a certificate is of an authority that the operator trusts was checked by TLS before.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast, get_args

from memory_service.domain import validate
from memory_service.domain.access import Caller, Role
from memory_service.domain.errors import ServiceError, StartError


class Shown(NamedTuple):
    """What a caller has shown of its certificate when it connected, and TLS has checked then.

    names: those in the certificate. pem: the certificate, then those that it was signed by; empty where there is none,
    and where it was shown just now, so that nothing can have changed.
    """

    names: Sequence[str] = ()
    pem: bytes = b""


NOTHING = Shown()


class Certificates:
    """Tells callers by the names in their certificates."""

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        """Know the callers of an operator. callers: by the name of a certificate, as it is written there."""
        self._callers = callers

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, names: Iterable[str]) -> Caller | None:
        """Return the caller whose certificate has these names; None where none of them is known. Of several that are
        known, the one that the operator has named first counts."""
        shown = set(names)
        return next((caller for name, caller in self._callers.items() if name in shown), None)


def read(clients: Iterable[str]) -> Certificates:
    """Return the callers that "SAN=TENANT:ROLE" name, one each. Errors: StartError."""
    callers: dict[str, Caller] = {}
    for client in clients:
        name, _, rest = client.rpartition("=")
        tenant, _, role = rest.rpartition(":")
        if not name or not tenant or role not in get_args(Role):
            roles = ", ".join(get_args(Role))
            raise StartError(f"--tls-client: {client!r} is not SAN=TENANT:ROLE with a role of {roles}")
        if name in callers:
            raise StartError(f"--tls-client: {name!r} is named twice")
        try:
            validate.name("tenant", tenant)
        except ServiceError as error:
            raise StartError(f"--tls-client: {client!r}: {error.message}") from None
        callers[name] = Caller(tenant, frozenset({cast(Role, role)}), subject=name)
    return Certificates(callers)
