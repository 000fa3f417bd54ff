"""The requests of the last minutes. This file owns that a retrieval which is asked again counts once, and that the
requests of one tenant neither count for, nor push out, those of another."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

# Seconds since a request id was last seen. They are more than the SDK lets pass between two calls of one retrieval: its
# attempts have two minutes, and as long has what may lie between (fetching what could not be read of files).
REMEMBERED_S = 300.0


class RecentRequests:
    """Remembers the ids of requests. Threads may share it."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Remember at most so many ids of each tenant. clock: tells the time in seconds."""
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        # By tenant and id, when each was last seen, ascending; a tenant of which nothing is remembered has no entry.
        self._seen: dict[str, OrderedDict[bytes, float]] = {}

    def first(self, tenant: str, request_id: bytes) -> bool:
        """Tell whether this id of a tenant was not seen within REMEMBERED_S, and remember it. An empty id is always
        new."""
        if not request_id:
            return True
        now = self._clock()
        with self._lock:
            # Those of other tenants are looked at where this one has none yet, so that no tenant's stay for good.
            for known in [tenant] if tenant in self._seen else list(self._seen):
                self._forget(known, now)
            seen = self._seen.setdefault(tenant, OrderedDict())
            new = request_id not in seen
            seen[request_id] = now
            seen.move_to_end(request_id)
            if len(seen) > self._most:
                seen.popitem(last=False)
            return new

    def _forget(self, tenant: str, now: float) -> None:
        """Forget what was seen of a tenant too long ago."""
        seen = self._seen[tenant]
        while seen and next(iter(seen.values())) < now - REMEMBERED_S:
            seen.popitem(last=False)
        if not seen:
            del self._seen[tenant]
