"""Room for new data in a database and a bucket, which tell that they are full only when something is written
to them."""

from types import TracebackType


class _Nothing:
    """A reservation of no room; implements `memory_service.storage.base.Reservation`."""

    def give(self) -> None:
        """Return at once, because nothing was reserved."""

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Unbounded:
    """Implements `memory_service.storage.base.Space` without a bound."""

    def for_records(self, size: int = 0) -> _Nothing:
        """Return a reservation of nothing."""
        return _Nothing()

    def for_payload(self, size: int) -> _Nothing:
        """Return a reservation of nothing."""
        return _Nothing()

    def free(self) -> int | None:
        """Return None, which stands for room that is not known."""
        return None
