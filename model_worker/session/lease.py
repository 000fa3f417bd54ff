"""The lease of a session: while a worker has the lease, no other one can append to the session.

The service ends a lease that is not renewed. This file owns the rule that a worker which has a session open keeps it,
also while it waits for a person or writes a long answer: a thread renews the lease at a third of its time.
"""

import threading
import time
from contextlib import suppress
from datetime import timedelta

import kvbank
from model_worker.remember.service_link import START_S
from model_worker.session.holder import has_died, own_holder

LEASE_S = 30.0


class Lease:
    """A worker's lease of the session `session_id`, which is held from `take` to `release`.

    holder: what the worker calls itself. seconds: how long a lease lasts that is not renewed. epoch: of the lease; the
    service refuses whatever comes with an earlier one.
    """

    def __init__(
        self, client: kvbank.Client, session_id: str, holder: str | None = None, seconds: float = LEASE_S
    ) -> None:
        self._client, self._session_id, self._seconds = client, session_id, seconds
        self.holder = holder or own_holder()
        self.epoch = 0
        self._lost: kvbank.LeaseLost | None = None
        self._due = 0.0  # when the lease is to be renewed, by the monotonic clock
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost(self) -> bool:
        """Tell whether the lease is known to have ended."""
        return self._lost is not None

    def take(self) -> kvbank.Session:
        """Take the lease, under a new epoch, and return the session as it is now. Raises kvbank.LeaseHeld.

        A lease of a process of this machine that has died is taken over at once.
        """
        try:
            session = self._acquired(self.holder)
        except kvbank.LeaseHeld as error:
            if not has_died(error.holder):
                raise
            left = self._acquired(error.holder).lease
            assert left is not None
            self._client.sessions.release(self._session_id, left.epoch)
            session = self._acquired(self.holder)
        assert session.lease is not None
        self.epoch, self._lost = session.lease.epoch, None
        self.was_renewed()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name=f"lease-{self._session_id[:8]}", daemon=True)
            self._thread.start()
        return session

    def _acquired(self, holder: str) -> kvbank.Session:
        return self._client.sessions.acquire(self._session_id, holder, ttl=timedelta(seconds=self._seconds))

    def check(self) -> None:
        """Raise kvbank.LeaseLost where the lease is known to have ended."""
        if self._lost is not None:
            raise self._lost

    def renew(self, timeout: float | None = None) -> None:
        """Begin the time of the lease anew. timeout: seconds. Raises kvbank.LeaseLost, and other ServiceErrors."""
        epoch = self.epoch
        try:
            self._client.sessions.renew(self._session_id, epoch, ttl=timedelta(seconds=self._seconds), timeout=timeout)
        except kvbank.LeaseLost as error:
            if epoch == self.epoch:  # else another thread has taken it anew
                self._lost = error
            raise
        self.was_renewed()

    def was_renewed(self) -> None:
        """Note that a call has renewed the lease."""
        self._due = time.monotonic() + self._seconds / 3

    def _keep(self) -> None:
        """Renew the lease until it is released; a service that is away is asked again."""
        while not self._ended.wait(max(0.0, self._due - time.monotonic())):
            if time.monotonic() < self._due:
                continue
            self._due = time.monotonic() + self._seconds / 6
            if self._lost is None:
                with suppress(kvbank.KVBankError):
                    self.renew(START_S)

    def release(self) -> None:
        """Let another worker have the session at once; a service that is away lets it go when the lease ends."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self.epoch and self._lost is None:
            with suppress(kvbank.KVBankError):
                self._client.sessions.release(self._session_id, self.epoch, timeout=START_S)
