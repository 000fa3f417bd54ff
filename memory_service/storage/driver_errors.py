"""What the errors of SQLAlchemy mean to a caller: what the error of the driver means that each wraps. This file owns
that engines of several drivers can be open at once."""

from sqlalchemy.exc import DBAPIError

from memory_service.domain.errors import ServiceError, refusal_for


def register() -> None:
    """Let `refusal_for` know the errors that wrap one of a driver, which its engine registers itself. A second call
    does nothing."""
    refusal_for.register(DBAPIError, _from_wrapped)


def _from_wrapped(error: DBAPIError) -> ServiceError | None:
    return refusal_for(error.orig) if isinstance(error.orig, Exception) else None
