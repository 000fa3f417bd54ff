"""The service of kvbank.v1 for keys and tenants: for each RPC a message comes in, an operation runs, a message goes
out."""

from kvbank.v1 import access_pb2 as pb
from kvbank.v1 import access_pb2_grpc
from memory_service.access.keys import Keys
from memory_service.access.tenants import Tenants
from memory_service.api.calls.handlers import HandledService, Handling, unary
from memory_service.api.messages import access as convert
from memory_service.api.messages.paging import page_size
from memory_service.domain.access import Caller
from memory_service.domain.tenants import Tenant
from memory_service.operations.paging import page


class AccessService(HandledService, access_pb2_grpc.AccessServiceServicer):
    """The RPCs of kvbank.v1.AccessService; the proto says what each of them promises."""

    def __init__(self, handling: Handling, keys: Keys, tenants: Tenants) -> None:
        super().__init__(handling)
        self._keys, self._tenants = keys, tenants

    @unary
    def WhoAmI(self, caller: Caller, _: pb.WhoAmIRequest) -> pb.WhoAmIResponse:  # noqa: N802
        """Answer with what the service takes the caller for."""
        return convert.identity_message(caller)

    # Keys

    @unary
    def CreateKey(self, caller: Caller, request: pb.CreateKeyRequest) -> pb.CreateKeyResponse:  # noqa: N802
        """Make a key, and answer with its secret, this once."""
        role = convert.role(request.role)
        ttl = convert.microseconds("ttl", request.ttl) if request.HasField("ttl") else None
        key, text = self._keys.create(caller, request.tenant, role, list(request.banks), ttl)
        return pb.CreateKeyResponse(key=convert.key_message(key), secret=text)

    @unary
    def ListKeys(self, caller: Caller, request: pb.ListKeysRequest) -> pb.ListKeysResponse:  # noqa: N802
        """Answer with a page of keys, oldest first. The token is the place of the last key of the page before."""
        found = self._keys.of(caller, request.tenant, convert.key_place(request.page_token))
        keys, more = page(found, page_size(request.page_size), lambda key: sum(map(len, key.banks)))
        token = convert.key_token(keys[-1].place) if more else ""
        return pb.ListKeysResponse(keys=map(convert.key_message, keys), next_page_token=token)

    @unary
    def RevokeKey(self, caller: Caller, request: pb.RevokeKeyRequest) -> pb.RevokeKeyResponse:  # noqa: N802
        """Refuse a key from now on."""
        return pb.RevokeKeyResponse(key=convert.key_message(self._keys.revoke(caller, request.key_id)))

    @unary
    def RotateKey(self, caller: Caller, request: pb.RotateKeyRequest) -> pb.RotateKeyResponse:  # noqa: N802
        """Make a key in the place of another, which is taken for a while yet."""
        overlap = convert.microseconds("overlap", request.overlap)
        key, text, old = self._keys.rotate(caller, request.key_id, overlap)
        return pb.RotateKeyResponse(key=convert.key_message(key), secret=text, replaced=convert.key_message(old))

    # Tenants

    @unary
    def CreateTenant(self, _: Caller, request: pb.CreateTenantRequest) -> pb.CreateTenantResponse:  # noqa: N802
        """Make a tenant without banks and keys."""
        made = self._tenants.create(request.name, convert.quota(request.quota))
        return pb.CreateTenantResponse(tenant=self._message(made))

    @unary
    def ListTenants(self, _: Caller, request: pb.ListTenantsRequest) -> pb.ListTenantsResponse:  # noqa: N802
        """Answer with a page of tenants by name. The token is the last name of the page before."""
        found = self._tenants.after(request.page_token)
        tenants, more = page(found, page_size(request.page_size), lambda tenant: len(tenant.name))
        token = tenants[-1].name if more else ""
        return pb.ListTenantsResponse(tenants=map(self._message, tenants), next_page_token=token)

    @unary
    def SetTenantQuota(self, _: Caller, request: pb.SetTenantQuotaRequest) -> pb.SetTenantQuotaResponse:  # noqa: N802
        """Replace the quota of a tenant."""
        changed = self._tenants.set_quota(request.name, convert.quota(request.quota))
        return pb.SetTenantQuotaResponse(tenant=self._message(changed))

    @unary
    def DeleteTenant(self, caller: Caller, request: pb.DeleteTenantRequest) -> pb.DeleteTenantResponse:  # noqa: N802
        """Delete a tenant with its keys."""
        return pb.DeleteTenantResponse(banks=self._tenants.delete(caller, request.name, request.force))

    def _message(self, tenant: Tenant) -> pb.Tenant:
        return convert.tenant_message(tenant, self._tenants.usage(tenant))
