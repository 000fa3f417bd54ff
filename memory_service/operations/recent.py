"""The requests of the last minutes. This file owns that a retrieval which is asked again counts once."""

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
        """Remember at most so many ids. clock: tells the time in seconds."""
        self._most = most
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, float] = OrderedDict()  # when it was last seen, ascending

    def first(self, request_id: bytes) -> bool:
        """Tell whether this id was not seen within REMEMBERED_S, and remember it. An empty id is always new."""
        if not request_id:
            return True
        now = self._clock()
        with self._lock:
            while self._seen and next(iter(self._seen.values())) < now - REMEMBERED_S:
                self._seen.popitem(last=False)
            new = request_id not in self._seen
            self._seen[request_id] = now
            self._seen.move_to_end(request_id)
            if len(self._seen) > self._most:
                self._seen.popitem(last=False)
            return new
