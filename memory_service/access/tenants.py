"""The tenants of a service are made, listed, bounded and deleted here, for operators.

Methods block and are called from storage threads.
"""

from collections.abc import Iterator
from dataclasses import asdict

from memory_service.access.rates import Rates
from memory_service.access.verifier import Verifier
from memory_service.domain import validate
from memory_service.domain.access import Caller
from memory_service.domain.errors import invalid, right_missing
from memory_service.domain.forgetting import Receipt
from memory_service.domain.tenants import Tenant, TenantQuota, TenantUsage
from memory_service.storage.base import AccessRecords, Forgetting


class Tenants:
    """Manages the tenants for callers that were found to be operators."""

    def __init__(self, records: AccessRecords, forgetting: Forgetting, verifier: Verifier, rates: Rates) -> None:
        self._records, self._forgetting, self._verifier, self._rates = records, forgetting, verifier, rates

    def create(self, name: str, quota: TenantQuota) -> Tenant:
        """Make a tenant without banks and keys. Errors: INVALID_FIELD, TENANT_EXISTS, DISK_FULL."""
        validate.name("name", name)
        _check(quota)
        return self._records.add_tenant(name, quota)

    def after(self, name: str) -> Iterator[Tenant]:
        """Yield the tenants by name, from the first one after `name`."""
        return (tenant for tenant in self._records.tenants() if tenant.name > name)

    def usage(self, tenant: Tenant) -> TenantUsage:
        """Add up what the banks of a tenant hold now."""
        return self._records.tenant_usage(tenant.name)

    def set_quota(self, name: str, quota: TenantQuota) -> Tenant:
        """Replace the whole quota of a tenant, and return the tenant. Errors: INVALID_FIELD, TENANT_NOT_FOUND."""
        _check(quota)
        changed = self._records.set_tenant_quota(name, quota)
        # In this order, so that no key that is being verified brings the old quota back.
        self._verifier.forget()
        self._rates.learn(name, quota.calls)
        return changed

    def delete(self, caller: Caller, name: str, force: bool) -> int:
        """Delete a tenant with its keys, and return how many banks went with it. force: also where it has banks. A
        caller does not delete the tenant of its own key, so that one is left which can make others. Errors:
        INVALID_FIELD, TENANT_NOT_FOUND, TENANT_NOT_EMPTY."""
        _check_not_own(caller, name)
        banks = self._records.drop_tenant(name, force=force)
        self._verifier.forget()
        self._rates.learn(name, 0)
        return banks

    def forget(self, caller: Caller, name: str) -> Receipt:
        """Forget a tenant with all that it has, for good. Errors: PERMISSION_DENIED, and those of `delete`."""
        if not caller.may("operate"):
            raise right_missing("Forget", "operate")
        _check_not_own(caller, name)
        try:
            return self._forgetting.tenant(name, caller.key_id)
        finally:
            self._verifier.forget()
            self._rates.learn(name, 0)


def _check_not_own(caller: Caller, name: str) -> None:
    """Refuse to delete the tenant of the caller's own key. Errors: INVALID_FIELD."""
    if caller.key_id and name == caller.tenant:
        raise invalid("name", "is the tenant of the caller's own key")


def _check(quota: TenantQuota) -> None:
    """Check that a quota has no negative bound. Errors: INVALID_FIELD."""
    if min(asdict(quota).values()) < 0:
        raise invalid("quota", "must not be negative; 0 means unbounded")
