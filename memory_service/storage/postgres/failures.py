"""What the errors of PostgreSQL mean to a caller, and after which of them a transaction is tried again."""

import psycopg
from psycopg import errors
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from memory_service.domain.errors import AwayError, ServiceError, broken_off, disk_full, refusal_for
from memory_service.storage import driver_errors

# Classes of SQLSTATE: connection exception, operator intervention (the server stops, or ended the connection).
_CONNECTION_CLASSES = ("08", "57")
# Nothing of a transaction has happened that ends so, and the next try may end well.
_TRY_AGAIN = (errors.SerializationFailure, errors.DeadlockDetected, errors.IdleInTransactionSessionTimeout)
# How the codes begin of connections that ended, and of servers that stop or start; where none was made, it has no code.
_AWAY = ("08", "57P")


def register() -> None:
    """Let `refusal_for` know the errors of the database. A second call does nothing."""
    driver_errors.register()
    refusal_for.register(psycopg.Error, from_database_error)


def from_database_error(error: psycopg.Error) -> ServiceError:
    """Return what a caller is told of an error of the database."""
    if isinstance(error, errors.QueryCanceled):
        return broken_off()
    if isinstance(error, errors.DiskFull):
        return disk_full()
    name = error.sqlstate or "no connection"
    if isinstance(error, psycopg.OperationalError) and (error.sqlstate or _AWAY[0]).startswith(_AWAY):
        return AwayError("STORAGE_ERROR", f"the database is out of reach ({name})", errno=name)
    return ServiceError("STORAGE_ERROR", f"the database answered with an error ({name})", errno=name)


def of_driver(error: BaseException) -> psycopg.Error | None:
    """Return the error of the driver that an error is, or wraps; None for another one."""
    found = error.orig if isinstance(error, DBAPIError) else error
    return found if isinstance(found, psycopg.Error) else None


def kind_of(error: BaseException) -> str:
    """Return of which kind an error is in the metrics (see `DATABASE_ERRORS`); "" for what is none of the database: the
    end of a statement whose caller has gone."""
    if isinstance(error, PoolTimeoutError):
        return "pool"
    found = of_driver(error)
    if found is None or isinstance(found, errors.QueryCanceled):
        return ""
    lost = found.sqlstate is None or found.sqlstate[:2] in _CONNECTION_CLASSES
    return "connection" if lost and isinstance(found, psycopg.OperationalError) else "statement"


def passes(error: BaseException) -> bool:
    """Tell whether a transaction can be tried again that another one has ended."""
    return isinstance(of_driver(error), _TRY_AGAIN)
