"""Answers of a server that may be broken or hostile: what cannot be understood is an error of this package."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvbank._exceptions import Internal, InvalidArgument, ServiceError


@contextmanager
def understood() -> Iterator[None]:
    """Around what reads an answer, also as a decorator: Internal for whatever is raised, but for errors that are
    ServiceErrors already. An InvalidArgument is that of a model, and here no fault of the caller's."""
    try:
        yield
    except InvalidArgument as error:
        raise odd(str(error)) from error
    except ServiceError:
        raise
    except Exception as error:
        raise odd(f"{type(error).__name__}: {error}") from error


def odd(what: str) -> Internal:
    """The error for an answer that makes no sense, to be raised."""
    return Internal(f"the answer of the server makes no sense: {what}", reason="ODD_ANSWER")
