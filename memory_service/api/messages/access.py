"""Messages of keys and tenants become values of the domain here, and values messages."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_args

from google.protobuf.duration_pb2 import Duration

from kvbank.v1 import access_pb2 as pb
from kvbank.wire import enums
from memory_service.api.messages.convert import timestamp
from memory_service.api.messages.paging import number_of
from memory_service.domain.access import ApiKey, Caller, KeyPlace, Role
from memory_service.domain.errors import invalid
from memory_service.domain.tenants import Tenant, TenantQuota, TenantUsage

_NUMBERS: Mapping[str, Any] = enums.numbers(pb.Role, get_args(Role))
_ROLES: Mapping[int, Role] = {_NUMBERS[role]: role for role in get_args(Role)}
# More than any span that is taken, so that no number becomes too large.
_MOST_SECONDS = 10**12


def role(number: int) -> Role:
    """Read the role of a key. Errors: INVALID_FIELD."""
    if number not in _ROLES:
        raise invalid("role", f"must be one of {', '.join(_NUMBERS)}")
    return _ROLES[number]


def microseconds(field: str, message: Duration) -> int:
    """Read a span of time. Errors: INVALID_FIELD."""
    if not 0 <= message.seconds <= _MOST_SECONDS or not 0 <= message.nanos < 10**9:
        raise invalid(field, "must be a span of time that is not negative")
    return message.seconds * 1_000_000 + message.nanos // 1000


def quota(message: pb.TenantAmounts) -> TenantQuota:
    """Read the quota of a tenant."""
    return TenantQuota(**{field.name: getattr(message, field.name) for field in fields(TenantQuota)})


def key_message(key: ApiKey) -> pb.ApiKey:
    """Make the message of a key, which has nothing of its secret."""
    made = pb.ApiKey(key_id=key.key_id, tenant=key.tenant, role=_NUMBERS[key.role], banks=key.banks)
    made.create_time.CopyFrom(timestamp(key.created))
    ends = {"expire_time": key.expires, "revoke_time": key.revoked, "last_use_time": key.last_used}
    for field, time in ends.items():
        if time is not None:
            getattr(made, field).CopyFrom(timestamp(time))
    return made


def key_token(place: KeyPlace) -> str:
    """Make the token of the page of keys that begins behind a place."""
    return f"{place.created}.{place.key_id}"


def key_place(token: str) -> KeyPlace | None:
    """Read the place behind which a page of keys begins; None for the first page. Errors: INVALID_FIELD."""
    created, _, key_id = token.partition(".")
    return KeyPlace(number_of(created, 0), key_id) if token else None


def tenant_message(tenant: Tenant, usage: TenantUsage) -> pb.Tenant:
    """Make the message of a tenant."""
    return pb.Tenant(
        name=tenant.name,
        create_time=timestamp(tenant.created),
        quota=pb.TenantAmounts(**asdict(tenant.quota)),
        usage=pb.TenantAmounts(**asdict(usage)),
    )


def identity_message(caller: Caller) -> pb.WhoAmIResponse:
    """Make the message that tells a caller what the service takes it for."""
    roles = sorted(_NUMBERS[role] for role in caller.roles)
    return pb.WhoAmIResponse(tenant=caller.tenant, roles=roles, banks=caller.banks, key_id=caller.key_id)
