"""Single arguments are checked here.

Every check takes the name of an argument and its value, and returns the value in its plain form, or raises
InvalidArgument with the name, what was expected and what was given.
"""

import math
import operator
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from kvbank import _arrays
from kvbank._exceptions import InvalidArgument
from kvbank.wire.scalars import Scalar

T = TypeVar("T")

# About as many seconds as a socket can wait.
LONGEST_WAIT_S = 2_000_000.0
_LONGEST_SHOWN = 60
_INT32, _INT64 = (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)


def invalid(field: str, text: str) -> InvalidArgument:
    """Return the error for an argument; the caller raises it."""
    return InvalidArgument(f"{field}: {text}", reason="INVALID_FIELD", metadata={"field": field})


def expected(field: str, what: str, value: object) -> InvalidArgument:
    """Return the error for an argument of another type or out of range; the caller raises it."""
    return invalid(field, f"expected {what}, got {shown(value)}")


def shown(value: object) -> str:
    """Write a value for a message: in full where it is short, else its type."""
    if _arrays.is_array(value):
        with suppress(RuntimeError):  # a nested tensor has no shape
            return f"an array of {value.dtype}, of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
    if isinstance(value, float | bool | type(None)) or (isinstance(value, int) and value.bit_length() < 200):
        return repr(value)
    if isinstance(value, str | bytes) and len(value) <= _LONGEST_SHOWN:
        return ascii(value)
    return f"a value of type {type(value).__name__}"


def instance(field: str, value: object, kind: type[T]) -> T:
    """Check that a value is of a type, such as one of the models."""
    if not isinstance(value, kind):
        raise expected(field, f"a {kind.__name__}", value)
    return value


def text(field: str, value: object) -> str:
    """Check a string, which UTF-8 must be able to encode."""
    if not isinstance(value, str):
        raise expected(field, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = ascii(value[error.start])
        raise invalid(field, f"expected text, got the lone surrogate {found} at character {error.start}") from None
    return plain(value)


def plain(value: str) -> str:
    """Return the characters of a string, also of a subclass that prints as something else, such as an enum of
    strings."""
    return str.__str__(value)


def raw_bytes(field: str, value: object) -> bytes:
    """Check bytes, a bytearray or a memoryview."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise expected(field, "bytes", value)
    try:
        return bytes(value)
    except ValueError:  # a view that was released
        raise expected(field, "bytes", value) from None


def raw_view(field: str, value: object) -> memoryview:
    """Check bytes, a bytearray or a memoryview without gaps, and return a view of its bytes."""
    try:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise TypeError
        return memoryview(value).cast("B")
    except (TypeError, ValueError):  # also a view that was released, or one with gaps
        raise expected(field, "bytes", value) from None


def flag(field: str, value: object) -> bool:
    """Check True or False, of Python or numpy."""
    if not isinstance(value, bool | np.bool_):
        raise expected(field, "True or False", value)
    return bool(value)


def integer(field: str, value: Any, bounds: tuple[int, int] = _INT64) -> int:
    """Check a whole number of Python, numpy or torch within `bounds`, which are inclusive; a bool is refused."""
    if type(value) is not int:
        try:
            if isinstance(value, bool | np.bool_) or _is_bool(value):
                raise TypeError
            value = operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            raise expected(field, "a whole number", value) from None
    if not bounds[0] <= value <= bounds[1]:
        raise expected(field, f"a whole number from {bounds[0]} to {bounds[1]}", value)
    return int(value)


def int32(field: str, value: Any) -> int:
    """Check a whole number of 32 bits."""
    return integer(field, value, _INT32)


def number(field: str, value: Any) -> float:
    """Check a number of Python, numpy or torch; NaN and bools are refused."""
    if type(value) is not float:
        try:
            value = _float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise expected(field, "a number", value) from None
    if math.isnan(value):
        raise expected(field, "a number", value)
    return float(value)


def _float(value: Any) -> float:
    value = _arrays.to_numpy(value)
    if isinstance(value, str | bytes | bytearray | bool | np.bool_) or np.ndim(value) or _is_bool(value):
        raise TypeError
    if np.iscomplexobj(value):  # float() would take its real part
        raise TypeError
    return float(value)


def _is_bool(value: Any) -> bool:
    """Tell whether a value is an array, of numpy or torch, of truth values."""
    return _arrays.is_array(value) and "bool" in str(value.dtype)


def _is_time(array: Any) -> bool:
    """Tell whether an array has points or spans of time, of which numpy makes bare numbers without their unit."""
    return isinstance(array, np.ndarray) and array.dtype.kind in "mM"


def seconds(field: str, value: Any) -> float:
    """Check a deadline in seconds, which is above 0; a longer one than some 23 days, such as infinity, becomes that."""
    wanted = number(field, value)
    if wanted <= 0:
        raise expected(field, "a number of seconds above 0", value)
    return min(wanted, LONGEST_WAIT_S)


def iterable(field: str, value: Any) -> Iterable[Any]:
    """Check that a value is iterable, and return it; text, bytes, mappings and awaitables are refused as mistakes."""
    try:
        if isinstance(value, str | bytes | bytearray | memoryview | Mapping | Awaitable):
            raise TypeError
        iter(value)  # an array without dimensions has the method, too
    except TypeError:
        raise expected(field, "a list", value) from None
    return value  # type: ignore[no-any-return]


def items(field: str, value: Any) -> list[Any]:
    """Return the items of an iterable; those of an array, which must have one dimension, as numbers of Python."""
    if not _arrays.is_array(value):
        return list(iterable(field, value))
    try:
        numbers = _arrays.to_numpy(value)
    except Exception as error:  # torch's, for a tensor without data or in a form of its own
        raise invalid(field, f"expected a list, got {shown(value)}: {error}") from None
    if numbers.ndim != 1 or _is_time(numbers):
        raise expected(field, "a list", value)
    return list(numbers.tolist())


def each(field: str, value: Any, check: Callable[[str, Any], T]) -> list[T]:
    """Check all items of a list by `check`."""
    return [check(field, item) for item in items(field, value)]


def mapping(field: str, value: Any) -> Mapping[Any, Any]:
    """Check that a value is a mapping."""
    if not isinstance(value, Mapping):
        raise expected(field, "a mapping", value)
    return value


def texts_by_text(field: str, value: Any) -> dict[str, str]:
    """Check a mapping of strings to strings."""
    return {text(field, key): text(field, found) for key, found in mapping(field, value).items()}


def whole_by_text(field: str, value: Any) -> dict[str, int]:
    """Check a mapping of strings to whole numbers of 64 bits."""
    return {text(field, key): integer(field, found) for key, found in mapping(field, value).items()}


def scalar(field: str, value: Any, key: str | None = None) -> Scalar:
    """Check a value of metadata: a string, a whole number of 64 bits, a finite number, or True or False.

    key: of the value, for the message of the error.
    """
    if _arrays.is_array(value) and value.ndim == 0 and not _is_time(value):
        with suppress(RuntimeError, TypeError):  # what has no data stays what it is, and is refused
            value = _arrays.to_numpy(value).item()
    if isinstance(value, str):
        return text(field, value)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer) and _INT64[0] <= value <= _INT64[1]:
        return int(value)
    if isinstance(value, float | np.floating) and math.isfinite(value):
        return float(value)
    of_key = "" if key is None else f" for {shown(key)}"
    raise expected(field, f"a string, a finite number of 64 bits, or True or False{of_key}", value)


def checked_metadata(value: Any, field: str = "metadata") -> dict[str, Scalar]:
    """Check a mapping of strings to values of metadata."""
    return {text(field, key): scalar(field, found, key) for key, found in mapping(field, value).items()}


def finite(field: str, value: Any) -> int | float:
    """Check a bound of a range: a whole number of 64 bits or a finite number."""
    found = scalar(field, value)
    if isinstance(found, str | bool):
        raise expected(field, "a number", value)
    return found


def choice(field: str, value: Any, known: Mapping[str, T]) -> T:
    """Return what a word stands for, which must be one of `known`."""
    if not isinstance(value, str) or value not in known:
        raise invalid(field, f"{shown(value)} is unknown; known: {', '.join(known)}")
    return known[value]
