"""How many calls a second each tenant makes. This file owns the token bucket of a tenant: it holds what the tenant may
call in one second, at least one call, and fills at the rate of the tenant's quota.

Threads share the rates. The quotas are learned where keys are verified, so that they are as fresh as these.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from memory_service.domain.clock import SECOND
from memory_service.domain.errors import RateError


@dataclass(slots=True)
class _Bucket:
    """The calls that a tenant may make at once (`level`), as it was at a time in microseconds (`at`); `rate` is what
    it gains a second."""

    rate: int
    level: float
    at: int

    def fill(self, now: int) -> None:
        """Let in what has been gained up to a time."""
        self.level = min(self.level + (now - self.at) * self.rate / SECOND, float(self.rate))
        self.at = now


class Rates:
    """Counts the calls of tenants that have a quota of calls; of others it knows nothing."""

    def __init__(self, now_us: Callable[[], int]) -> None:
        """Go by a clock in microseconds that never goes back."""
        self._now_us = now_us
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}

    def learn(self, tenant: str, rate: int) -> None:
        """Go by this quota of a tenant from now on; 0 is none. A bucket that is there keeps what it holds, so that no
        change of the quota gives more calls than the new one."""
        with self._lock:
            if not rate:
                self._buckets.pop(tenant, None)
                return
            bucket = self._buckets.setdefault(tenant, _Bucket(rate, float(rate), self._now_us()))
            bucket.fill(self._now_us())
            bucket.rate, bucket.level = rate, min(bucket.level, float(rate))

    def until_call(self, tenant: str) -> float:
        """Count a call of a tenant, and return 0; where there is none left, count nothing, and return the seconds after
        which to ask again."""
        bucket = self._buckets.get(tenant)
        return self._take(bucket, 1.0) if bucket else 0.0

    def until_chunk(self, tenant: str) -> float:
        """Do as `until_call` for a chunk of a write stream.

        Chunks leave half of the bucket to calls: a stream waits for its turn and then takes it, while a call that is
        refused comes back at some later time, when it would find nothing.
        """
        bucket = self._buckets.get(tenant)
        return self._take(bucket, 1.0 + (bucket.rate - 1) / 2) if bucket else 0.0

    def refusal(self, tenant: str, ahead: int = 0) -> RateError:
        """Return the error RATE_EXCEEDED, which says when there is a call again for one with so many ahead of it."""
        bucket = self._buckets.get(tenant)
        if bucket is None:  # the quota was taken away just now
            return RateError(tenant, 0, 0.0)
        with self._lock:
            bucket.fill(self._now_us())
            return RateError(tenant, bucket.rate, max(1.0 + ahead - bucket.level, 0.0) / bucket.rate)

    def _take(self, bucket: _Bucket, least: float) -> float:
        """Take a call out of a bucket that holds at least so many, and return 0, or the seconds until it does."""
        with self._lock:
            bucket.fill(self._now_us())
            # The sum of the fractions that were gained may be less by a little than what it should be.
            if bucket.level < least - 1e-9:
                return (least - bucket.level) / bucket.rate
            bucket.level -= 1.0
            return 0.0
