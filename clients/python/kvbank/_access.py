"""The keys and tenants of a service, for the blocking client."""

from collections.abc import Iterable, Iterator
from datetime import timedelta

from kvbank import _access_models as m
from kvbank import _arguments
from kvbank._calls import access_messages as messages
from kvbank._calls import session_messages
from kvbank._calls.messages import build
from kvbank._exceptions import TenantNotFound
from kvbank._session_models import Receipt
from kvbank._transport.caller import Caller
from kvbank.v1 import access_pb2 as pb


class Access:
    """Says who may call a service; `Client.access` is one.

    An admin's key manages the keys of its own tenant, an operator's the keys of all, and tenants. Every method takes
    `timeout` and raises what those of `Client` do, and PermissionDenied for a key whose role is not enough.
    """

    def __init__(self, caller: Caller) -> None:
        """Ask over the connection of a client."""
        self._caller = caller

    def whoami(self, *, timeout: float | None = None) -> m.Identity:
        """Return what the service takes this client for."""
        return messages.identity(self._caller.call("WhoAmI", pb.WhoAmIRequest(), timeout))

    # Keys

    def create_key(
        self,
        role: m.Role,
        *,
        tenant: str | None = None,
        banks: Iterable[str] | None = None,
        ttl: timedelta | None = None,
        timeout: float | None = None,
    ) -> m.NewApiKey:
        """Make a key, and return it with the secret, which no later answer has.

        role: what the key allows: "read", "write" (read too), "admin" (write too) or "operator".
        tenant: whose key it is; None is the caller's own.
        banks: patterns of the names of banks that it may use, such as ["team-*"]; None is every bank of the tenant.
        ttl: the life of the key; None is for ever.
        A call that is made again, after its connection broke, may leave a key whose secret is lost.
        Errors: TenantNotFound.
        """
        request = messages.create_key(role, tenant, banks, ttl)
        return messages.created_key(self._caller.call("CreateKey", request, timeout))

    def list_keys(self, tenant: str | None = None, *, timeout: float | None = None) -> Iterator[m.ApiKey]:
        """Yield the keys of a tenant, oldest first, revoked and expired ones too; None is the caller's own tenant, or
        all for an operator. They are fetched a page at a time, with `timeout` for each."""
        for page in self._caller.pages("ListKeys", build(pb.ListKeysRequest, tenant=tenant or ""), timeout):
            yield from map(messages.api_key, page.keys)

    def revoke_key(self, key_id: str, *, timeout: float | None = None) -> m.ApiKey:
        """Revoke a key for good, and return it. Its calls, those under way too, are refused within 60 s. Errors:
        ApiKeyNotFound."""
        return messages.api_key(self._caller.call("RevokeKey", build(pb.RevokeKeyRequest, key_id=key_id), timeout).key)

    def rotate_key(self, key_id: str, *, overlap: timedelta | None = None, timeout: float | None = None) -> m.NewApiKey:
        """Make a key of the same tenant, role, banks and time to live, and return it with its secret.

        overlap: for how long the replaced key is still taken, so that its users can change over; None is not at all.
        Errors: ApiKeyNotFound.
        """
        return messages.rotated_key(self._caller.call("RotateKey", messages.rotate_key(key_id, overlap), timeout))

    # Tenants

    def create_tenant(self, name: str, *, quota: m.TenantQuota | None = None, timeout: float | None = None) -> m.Tenant:
        """Make a tenant, which has no banks and no keys yet, and return it. quota: None is unbounded. Errors:
        AlreadyExists."""
        request = build(pb.CreateTenantRequest, name=name, quota=messages.quota(quota))
        return messages.tenant(self._caller.call("CreateTenant", request, timeout).tenant)

    def list_tenants(self, *, timeout: float | None = None) -> Iterator[m.Tenant]:
        """Yield all tenants by name, with quota and usage. They are fetched a page at a time, with `timeout` for
        each."""
        for page in self._caller.pages("ListTenants", pb.ListTenantsRequest(), timeout):
            yield from map(messages.tenant, page.tenants)

    def set_tenant_quota(self, name: str, quota: m.TenantQuota | None, *, timeout: float | None = None) -> m.Tenant:
        """Replace the whole quota of a tenant, and return the tenant; None is unbounded. Errors: TenantNotFound."""
        request = build(pb.SetTenantQuotaRequest, name=name, quota=messages.quota(quota))
        return messages.tenant(self._caller.call("SetTenantQuota", request, timeout).tenant)

    def delete_tenant(self, name: str, force: bool = False, *, timeout: float | None = None) -> int:
        """Delete a tenant with its keys, and return how many banks went with it. force: also where it has banks.
        Errors: TenantNotFound; FailedPrecondition for a tenant that has banks."""
        _arguments.flag("force", force)
        attempts = self._caller.attempts(timeout)
        request = build(pb.DeleteTenantRequest, name=name, force=force)
        try:
            return int(self._caller.repeated("DeleteTenant", request, attempts).banks)
        except TenantNotFound:
            if attempts.unsure:  # an attempt whose connection broke has deleted it
                return 0
            raise

    def forget_tenant(self, name: str, *, timeout: float | None = None) -> Receipt:
        """Forget a tenant for good, with its keys, sessions and banks, and return what went; see `Sessions.forget`.
        Errors: TenantNotFound."""
        request = session_messages.forget_tenant(name)
        return session_messages.receipt(self._caller.call("Forget", request, timeout).receipt)
