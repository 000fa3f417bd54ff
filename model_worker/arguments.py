"""Arguments are checked here: every check takes an argument's name and value, and returns the value in its plain form.

This file owns the rule that a value of a wrong kind or size ends in one InputError that names the argument. Whole
numbers may come as any integer type (numpy's and 0-d tensors too), texts and token ids in any of the forms that
tokenizers and models give them in.
"""

import math
import operator
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from model_worker.errors import InputError

Value = TypeVar("Value")


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return `value` as an int of at least `least`. Raises InputError."""
    try:
        number = None if _is_flag(value) else operator.index(value)
    except (TypeError, ValueError):  # ValueError: an array or tensor of several numbers
        number = None
    if number is None:
        raise InputError(f"{name} is a whole number, not {_shown(value)}")
    if number < least:
        raise InputError(f"{name} is at least {least}, not {number}")
    return number


def finite(name: str, value: Any, *, above: float = -math.inf) -> float:
    """Return `value` as a finite float that is greater than `above`. Raises InputError."""
    if _is_array(value) and value.ndim == 0 and not _is_time(value):
        value = value.item()
    if not isinstance(value, Real) or _is_flag(value) or _is_time(value) or not math.isfinite(value):
        raise InputError(f"{name} is a finite number, not {_shown(value)}")
    if value <= above:
        raise InputError(f"{name} is greater than {above:g}, not {value}")
    return float(value)


def choice(name: str, value: Any, options: Collection[str]) -> str:
    """Return `value` if it is one of the strings `options`. Raises InputError."""
    if not isinstance(value, str) or value not in options:
        raise InputError(f"{name} is one of {', '.join(options)}, not {_shown(value)}")
    return value


def flag(name: str, value: Any) -> bool:
    """Return `value` as True or False. Raises InputError for a value that only counts as true or false, such as 1."""
    if not _is_flag(value) or np.ndim(value):
        raise InputError(f"{name} is True or False, not {_shown(value)}")
    return bool(value)


def of_kind(name: str, value: Value, kind: type) -> Value:
    """Return `value` if it is an instance of `kind`. Raises InputError."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is a {kind.__name__}, not {_shown(value)}")
    return value


def words(name: str, value: Any) -> list[str]:
    """Return the strings of any ordered collection as a list. Raises InputError."""
    found = _listed(name, value)
    for word in found:
        if not isinstance(word, str):
            raise InputError(f"{name} is a string or several, not {_shown(word)}")
    return found


def text_or_ids(name: str, value: Any) -> str | list[int]:
    """Return one text, or the list of its token ids.

    Ids may come as a sequence, an array or tensor `[T]` or `[1, T]`, or as a tokenizer gives them: a mapping with
    `input_ids`, and `attention_mask` for those that count. Raises InputError for anything else, and for several texts.
    """
    rows, _ = texts_or_ids(name, value)
    if len(rows) != 1:
        raise InputError(f"{name} is one text, not {len(rows)}")
    return rows[0]


def texts_or_ids(name: str, value: Any) -> tuple[list[str | list[int]], bool]:
    """Return texts or rows of token ids, and whether `value` was a single one without a batch around it.

    `value` has one of the forms of `text_or_ids`, or is a sequence of them. Raises InputError.
    """
    if isinstance(value, str):
        return [str.__str__(value)], True  # the characters, also where str() prints something else, as for an enum
    if isinstance(value, Mapping):
        return _encoded(name, value)
    found = _listed(name, value)
    if not any(isinstance(item, str | Mapping) or _is_sequence(item) for item in found):
        return [[whole(f"a token id of {name}", item, least=0) for item in found]], True
    return [text_or_ids(f"{name}[{index}]", item) for index, item in enumerate(found)], False


def token_rows(name: str, value: Any) -> list[list[int]]:
    """Return rows of token ids, of which each may be empty. Raises InputError."""
    return [
        [whole(f"a token id of {name}", token, least=0) for token in _listed(f"{name}[{index}]", row)]
        for index, row in enumerate(_listed(name, value))
    ]


def _encoded(name: str, value: Mapping[str, Any]) -> tuple[list[str | list[int]], bool]:
    """Return the ids that a tokenizer gave, by row, without those that its attention mask leaves out.

    The second value is as in `texts_or_ids`.
    """
    if "input_ids" not in value:
        raise InputError(f"{name} is a mapping without input_ids: {', '.join(map(repr, value)) or 'it is empty'}")
    rows, single = texts_or_ids(f"{name}['input_ids']", value["input_ids"])
    if value.get("attention_mask") is None:
        return rows, single
    mask = value["attention_mask"]
    if _is_array(mask) and _is_flag(mask):
        mask = mask * 1  # True and False as numbers, of numpy and torch alike
    masks, _ = texts_or_ids(f"{name}['attention_mask']", mask)
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise InputError(f"input_ids and attention_mask of {name} have different shapes")
    kept: list[str | list[int]] = [
        [token for token, seen in zip(row, mask, strict=True) if seen]  # type: ignore[misc]
        for row, mask in zip(rows, masks, strict=True)
    ]
    return kept, single


def _listed(name: str, value: Any) -> list[Any]:
    """Return the items of an ordered collection; those of an array or tensor as Python's numbers and strings."""
    if _is_array(value):
        if value.ndim == 0:
            raise InputError(f"{name} is a single number, not a sequence: {_shown(value)}")
        if _is_time(value):
            raise InputError(f"{name} is a string or a sequence of strings or numbers, not {_shown(value)}")
        return list(value.tolist())
    if isinstance(value, bytes | bytearray | memoryview):
        raise InputError(f"{name} is bytes; decode them to a string first")
    if isinstance(value, str | Mapping | AbstractSet) or not isinstance(value, Iterable):
        raise InputError(f"{name} is a string or a sequence, not {_shown(value)}")
    return list(value)


def _is_sequence(value: Any) -> bool:
    if _is_array(value):
        return bool(value.ndim > 0)
    return isinstance(value, Iterable)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool) or (_is_array(value) and str(value.dtype) in ("bool", "torch.bool"))


def _is_time(value: Any) -> bool:
    """Tell whether `value` holds numpy's points or spans of time, which would become numbers without their unit."""
    return getattr(getattr(value, "dtype", None), "kind", None) in ("m", "M")


def _is_array(value: Any) -> bool:
    """Tell whether `value` is an array, a scalar or a tensor of numpy or torch, without importing torch."""
    return all(hasattr(value, name) for name in ("ndim", "dtype", "tolist"))


def _shown(value: Any) -> str:
    """Write a value for an error message: in full where it is short, else its type."""
    if _is_array(value) and value.ndim == 0 and not _is_time(value):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if _is_array(value):
        return f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
