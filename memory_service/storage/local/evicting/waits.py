"""What writes wait for: that a bank whose capacity was lowered is down to it. This file owns that each wait ends
once."""

import threading
from concurrent.futures import Future


class Waits:
    """Holds a future for each bank that is waited for. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: dict[int, Future[None]] = {}

    def __len__(self) -> int:
        return len(self._futures)

    def of(self, bank_id: int) -> "tuple[Future[None], bool]":
        """Return the future of a bank, and whether it is new; then the caller sees to it that it is settled."""
        with self._lock:
            waited = self._futures.get(bank_id)
            if waited is not None:
                return waited, False
            waited = Future()
            # Before another thread can settle it: a future that is done cannot begin to run.
            waited.set_running_or_notify_cancel()
            self._futures[bank_id] = waited
        return waited, True

    def settle(self, bank_id: int, error: BaseException | None = None) -> None:
        """End the wait of those who wait for a bank, with an error where there is one."""
        with self._lock:
            waited = self._futures.pop(bank_id, None)
        if waited is None:
            return
        if error is None:
            waited.set_result(None)
        else:
            waited.set_exception(error)

    def settle_all(self, error: BaseException) -> None:
        """End the wait of all with an error."""
        for bank_id in list(self._futures):
            self.settle(bank_id, error)
