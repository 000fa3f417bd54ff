"""The keys and tenants of a service, for the asyncio client; each method has the docstring of `Access`."""

from collections.abc import AsyncIterator, Iterable
from datetime import timedelta

from kvbank import _access_models as m
from kvbank import _arguments
from kvbank._access import Access
from kvbank._calls import access_messages as messages
from kvbank._calls import session_messages
from kvbank._calls.messages import build
from kvbank._exceptions import TenantNotFound
from kvbank._session_models import Receipt
from kvbank._transport.async_caller import AsyncCaller
from kvbank.v1 import access_pb2 as pb


class AsyncAccess:
    """Says who may call a service, as `Access` does, with coroutines; `AsyncClient.access` is one."""

    def __init__(self, caller: AsyncCaller) -> None:
        """Ask over the connection of a client."""
        self._caller = caller

    async def whoami(self, *, timeout: float | None = None) -> m.Identity:
        return messages.identity(await self._caller.call("WhoAmI", pb.WhoAmIRequest(), timeout))

    # Keys

    async def create_key(
        self,
        role: m.Role,
        *,
        tenant: str | None = None,
        banks: Iterable[str] | None = None,
        ttl: timedelta | None = None,
        timeout: float | None = None,
    ) -> m.NewApiKey:
        request = messages.create_key(role, tenant, banks, ttl)
        return messages.created_key(await self._caller.call("CreateKey", request, timeout))

    async def list_keys(self, tenant: str | None = None, *, timeout: float | None = None) -> AsyncIterator[m.ApiKey]:
        async for page in self._caller.pages("ListKeys", build(pb.ListKeysRequest, tenant=tenant or ""), timeout):
            for message in page.keys:
                yield messages.api_key(message)

    async def revoke_key(self, key_id: str, *, timeout: float | None = None) -> m.ApiKey:
        return messages.api_key(
            (await self._caller.call("RevokeKey", build(pb.RevokeKeyRequest, key_id=key_id), timeout)).key
        )

    async def rotate_key(
        self, key_id: str, *, overlap: timedelta | None = None, timeout: float | None = None
    ) -> m.NewApiKey:
        return messages.rotated_key(await self._caller.call("RotateKey", messages.rotate_key(key_id, overlap), timeout))

    # Tenants

    async def create_tenant(
        self, name: str, *, quota: m.TenantQuota | None = None, timeout: float | None = None
    ) -> m.Tenant:
        request = build(pb.CreateTenantRequest, name=name, quota=messages.quota(quota))
        return messages.tenant((await self._caller.call("CreateTenant", request, timeout)).tenant)

    async def list_tenants(self, *, timeout: float | None = None) -> AsyncIterator[m.Tenant]:
        async for page in self._caller.pages("ListTenants", pb.ListTenantsRequest(), timeout):
            for message in page.tenants:
                yield messages.tenant(message)

    async def set_tenant_quota(
        self, name: str, quota: m.TenantQuota | None, *, timeout: float | None = None
    ) -> m.Tenant:
        request = build(pb.SetTenantQuotaRequest, name=name, quota=messages.quota(quota))
        return messages.tenant((await self._caller.call("SetTenantQuota", request, timeout)).tenant)

    async def delete_tenant(self, name: str, force: bool = False, *, timeout: float | None = None) -> int:
        _arguments.flag("force", force)
        attempts = self._caller.attempts(timeout)
        request = build(pb.DeleteTenantRequest, name=name, force=force)
        try:
            return int((await self._caller.repeated("DeleteTenant", request, attempts)).banks)
        except TenantNotFound:
            if attempts.unsure:  # an attempt whose connection broke has deleted it
                return 0
            raise

    async def forget_tenant(self, name: str, *, timeout: float | None = None) -> Receipt:
        request = session_messages.forget_tenant(name)
        return session_messages.receipt((await self._caller.call("Forget", request, timeout)).receipt)


for _name, _method in vars(AsyncAccess).items():
    if not _name.startswith("_"):
        _method.__doc__ = getattr(Access, _name).__doc__
