"""Messages of keys and tenants are made here: requests out of what a caller states, and models out of answers."""

from collections.abc import Iterable
from datetime import timedelta
from typing import get_args

from kvbank import _access_models as m
from kvbank._arguments import choice, instance, invalid
from kvbank._calls import times
from kvbank._calls.answers import read_time, understood
from kvbank._calls.enums import word
from kvbank._calls.messages import build
from kvbank.v1 import access_pb2 as pb
from kvbank.wire import enums

_ROLES = enums.numbers(pb.Role, get_args(m.Role))


def create_key(
    role: str, tenant: str | None, banks: Iterable[str] | None, ttl: timedelta | None
) -> pb.CreateKeyRequest:
    """Return the request for a new key. Errors: InvalidArgument."""
    request: pb.CreateKeyRequest = build(
        pb.CreateKeyRequest,
        tenant=tenant or "",
        role=choice("role", role, _ROLES),
        banks=() if banks is None else banks,
        ttl=None if ttl is None else times.span("ttl", ttl),
    )
    if banks is not None and not request.banks:
        raise invalid("banks", "expected some patterns, or None for every bank, got an empty list")
    return request


def rotate_key(key_id: str, overlap: timedelta | None) -> pb.RotateKeyRequest:
    """Return the request for a key in the place of another. Errors: InvalidArgument."""
    return build(
        pb.RotateKeyRequest, key_id=key_id, overlap=None if overlap is None else times.span("overlap", overlap)
    )


def quota(quota: m.TenantQuota | None) -> pb.TenantAmounts:
    """Return the message of a quota; None is one without bounds. Errors: InvalidArgument."""
    given = m.TenantQuota() if quota is None else instance("quota", quota, m.TenantQuota)
    return pb.TenantAmounts(**{name: getattr(given, name) or 0 for name in m.TenantQuota.__slots__})


@understood()
def identity(message: pb.WhoAmIResponse) -> m.Identity:
    """Return what a service takes the caller for. Errors: Internal (ODD_ANSWER)."""
    roles = tuple(word(pb.Role, role) for role in message.roles)
    return m.Identity(message.tenant, roles, tuple(message.banks), message.key_id)


@understood()
def api_key(message: pb.ApiKey) -> m.ApiKey:
    """Return a key without its secret. Errors: Internal (ODD_ANSWER)."""
    return m.ApiKey(
        key_id=message.key_id,
        tenant=message.tenant,
        role=word(pb.Role, message.role),
        banks=tuple(message.banks),
        create_time=read_time(message.create_time),
        expire_time=times.optional(message, "expire_time"),
        revoke_time=times.optional(message, "revoke_time"),
        last_use_time=times.optional(message, "last_use_time"),
    )


def created_key(message: pb.CreateKeyResponse) -> m.NewApiKey:
    """Return a key with its secret. Errors: Internal (ODD_ANSWER)."""
    return m.NewApiKey(api_key(message.key), message.secret)


def rotated_key(message: pb.RotateKeyResponse) -> m.NewApiKey:
    """Return a key with its secret, and the one that it replaces. Errors: Internal (ODD_ANSWER)."""
    return m.NewApiKey(api_key(message.key), message.secret, api_key(message.replaced))


@understood()
def tenant(message: pb.Tenant) -> m.Tenant:
    """Return a tenant with its quota and usage. Errors: Internal (ODD_ANSWER)."""
    bounds = {name: getattr(message.quota, name) or None for name in m.TenantQuota.__slots__}
    usage = {name: getattr(message.usage, name) for name in m.TenantUsage.__slots__}
    return m.Tenant(message.name, read_time(message.create_time), m.TenantQuota(**bounds), m.TenantUsage(**usage))
