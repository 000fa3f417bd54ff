"""What the errors of SQLAlchemy mean to a caller: what the error of the driver means that each wraps, and that no
connection became free in time. This file owns that engines of several drivers can be open at once."""

from sqlalchemy.exc import DBAPIError, TimeoutError

from memory_service.domain.errors import ServiceError, refusal_for


def register() -> None:
    """Let `refusal_for` know the errors of SQLAlchemy; those of a driver are registered by its engine. A second call
    does nothing."""
    refusal_for.register(DBAPIError, _from_wrapped)
    refusal_for.register(TimeoutError, _from_wait)


def _from_wrapped(error: DBAPIError) -> ServiceError | None:
    return refusal_for(error.orig) if isinstance(error.orig, Exception) else None


def _from_wait(_error: TimeoutError) -> ServiceError:
    return ServiceError("NOT_SERVING", "no connection to the records became free in time")
