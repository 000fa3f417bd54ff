"""What a caller may give: checks of single arguments. Every one returns the value in its plain form, or raises
InvalidArgument with the name of the argument, what was expected and what was given."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from kvbank import _arrays
from kvbank._exceptions import InvalidArgument
from kvbank._scalars import Scalar

T = TypeVar("T")

# About as many seconds as a socket can wait.
LONGEST_WAIT_S = 2_000_000.0
_LONGEST_SHOWN = 60
_INT32, _INT64 = (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)


def invalid(field: str, text: str) -> InvalidArgument:
    """The error for an argument, to be raised."""
    return InvalidArgument(f"{field}: {text}", reason="INVALID_FIELD", metadata={"field": field})


def expected(field: str, what: str, value: object) -> InvalidArgument:
    """The error for an argument of another type or out of range, to be raised."""
    return invalid(field, f"expected {what}, got {shown(value)}")


def shown(value: object) -> str:
    """A value in a message: in full where it is short, else its type."""
    if _arrays.is_array(value):
        return f"an array of {value.dtype}, of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
    if isinstance(value, float | bool | type(None)) or (isinstance(value, int) and value.bit_length() < 200):
        return repr(value)
    if isinstance(value, str | bytes) and len(value) <= _LONGEST_SHOWN:
        return ascii(value)
    return f"a value of type {type(value).__name__}"


def instance(field: str, value: object, kind: type[T]) -> T:
    """A value of a type, such as one of the models."""
    if not isinstance(value, kind):
        raise expected(field, f"a {kind.__name__}", value)
    return value


def text(field: str, value: object) -> str:
    """A string that UTF-8 can say."""
    if not isinstance(value, str):
        raise expected(field, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = ascii(value[error.start])
        raise invalid(field, f"expected text, got the lone surrogate {found} at character {error.start}") from None
    return plain(value)


def plain(value: str) -> str:
    """The characters of a string, also of a subclass that prints as something else, such as an enum of strings."""
    return str.__str__(value)


def raw_bytes(field: str, value: object) -> bytes:
    """Bytes."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise expected(field, "bytes", value)
    try:
        return bytes(value)
    except ValueError:  # a view that was released
        raise expected(field, "bytes", value) from None


def flag(field: str, value: object) -> bool:
    """True or False, of Python or numpy."""
    if not isinstance(value, bool | np.bool_):
        raise expected(field, "True or False", value)
    return bool(value)


def integer(field: str, value: Any, bounds: tuple[int, int] = _INT64) -> int:
    """A whole number of Python, numpy or torch within `bounds`; a bool is none."""
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
    """A whole number of 32 bits."""
    return integer(field, value, _INT32)


def number(field: str, value: Any) -> float:
    """A number of Python, numpy or torch; NaN and a bool are none."""
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
    return float(value)


def _is_bool(value: Any) -> bool:
    """Whether an array, of numpy or torch, has truth values."""
    return _arrays.is_array(value) and "bool" in str(value.dtype)


def _is_time(array: Any) -> bool:
    """Whether an array has points or spans of time, which become bare numbers where nobody asks for their unit."""
    return isinstance(array, np.ndarray) and array.dtype.kind in "mM"


def seconds(field: str, value: Any) -> float:
    """A deadline: above 0; one of more than some 23 days, such as infinity, is one of 23 days."""
    wanted = number(field, value)
    if wanted <= 0:
        raise expected(field, "a number of seconds above 0", value)
    return min(wanted, LONGEST_WAIT_S)


def iterable(field: str, value: Any) -> Iterable[Any]:
    """What can be gone through; text, bytes and mappings are taken for a mistake."""
    try:
        if isinstance(value, str | bytes | bytearray | memoryview | Mapping):
            raise TypeError
        iter(value)  # an array without dimensions has the method, too
    except TypeError:
        raise expected(field, "a list", value) from None
    return value  # type: ignore[no-any-return]


def items(field: str, value: Any) -> list[Any]:
    """The items of an iterable; of an array, which must have one dimension, as numbers of Python."""
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
    """A list whose items all pass `check`."""
    return [check(field, item) for item in items(field, value)]


def mapping(field: str, value: Any) -> Mapping[Any, Any]:
    """A mapping."""
    if not isinstance(value, Mapping):
        raise expected(field, "a mapping", value)
    return value


def texts_by_text(field: str, value: Any) -> dict[str, str]:
    """A mapping of strings to strings."""
    return {text(field, key): text(field, found) for key, found in mapping(field, value).items()}


def scalar(field: str, value: Any, key: str | None = None) -> Scalar:
    """A value of metadata, of this key: a string, a whole number of 64 bits, a finite number, or True or False."""
    if _arrays.is_array(value) and value.ndim == 0 and not _is_time(value):
        with suppress(RuntimeError):  # a tensor without data stays what it is, and is refused
            value = value.item()
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


def metadata(value: Any, field: str = "metadata") -> dict[str, Scalar]:
    """A mapping of strings to values of metadata, which are plain then."""
    return {text(field, key): scalar(field, found, key) for key, found in mapping(field, value).items()}


def finite(field: str, value: Any) -> int | float:
    """A whole number of 64 bits or a finite number."""
    found = scalar(field, value)
    if isinstance(found, str | bool):
        raise expected(field, "a number", value)
    return found


def choice(field: str, value: Any, known: Mapping[str, T]) -> T:
    """What one of some words stands for."""
    if not isinstance(value, str) or value not in known:
        raise invalid(field, f"{shown(value)} is unknown; known: {', '.join(known)}")
    return known[value]
