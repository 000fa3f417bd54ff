"""Messages are built here out of arguments. The descriptor of a message says what each of its fields takes, and every
argument is checked against that before protobuf sees it: protobuf would take some values for others, and its errors do
not name the field."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor as Field

from kvbank import _arguments

T = TypeVar("T")
Check = Callable[[str, Any], Any]

_CHECKS: Mapping[int, Check] = {
    Field.TYPE_STRING: _arguments.text,
    Field.TYPE_BYTES: _arguments.raw_bytes,
    Field.TYPE_BOOL: _arguments.flag,
    Field.TYPE_FLOAT: _arguments.number,
    Field.TYPE_DOUBLE: _arguments.number,
    Field.TYPE_INT32: _arguments.int32,
    Field.TYPE_INT64: _arguments.integer,
    Field.TYPE_UINT32: partial(_arguments.integer, bounds=(0, 2**32 - 1)),
    Field.TYPE_FIXED64: partial(_arguments.integer, bounds=(0, 2**64 - 1)),
}

# By the type of a map's values.
_OF_MAPS: Mapping[int, Check] = {
    Field.TYPE_STRING: _arguments.texts_by_text,
    Field.TYPE_INT64: _arguments.whole_by_text,
}


def build(kind: Callable[..., T], /, **fields: Any) -> T:
    """Build a message of type `kind` with these fields; None leaves out a field that may be absent.

    Errors: InvalidArgument with the name of a field whose value does not fit.
    """
    checks = _checks(kind)
    return kind(**{name: checks[name](name, value) for name, value in fields.items()})


@lru_cache
def _checks(kind: Any) -> Mapping[str, Check]:
    return {field.name: _check(field) for field in kind.DESCRIPTOR.fields}


def _check(field: Field) -> Check:
    # A message was built with checks of its own, and a number of an enum was looked up.
    one = _CHECKS.get(field.type, _as_it_is)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _OF_MAPS.get(field.message_type.fields_by_name["value"].type, one)
    if field.is_repeated:
        return partial(_arguments.each, check=one)
    return partial(_unless_absent, one) if field.has_presence else one


def _as_it_is(_: str, value: Any) -> Any:
    return value


def _unless_absent(check: Check, field: str, value: Any) -> Any:
    return None if value is None else check(field, value)
