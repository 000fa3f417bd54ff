"""Requests, from the bytes that came to the message that a method takes. This file owns the bound on the memory that
the bytes of one request may become.

Protobuf makes an object of as little as two bytes of a message, which takes fifty times their memory. So a message is
bounded by its size, and the parts of a large one are counted before any of them is made. Bytes that are no message of
the method are refused with a reason, because grpc.aio itself would answer UNKNOWN.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from memory_service.domain.errors import ServiceError, invalid

# The most bytes of a message that moves no vectors or tensors.
LARGEST_REQUEST = 4 * 1024 * 1024
# The parts of a message are its fields and those of the messages in it; each takes about 100 bytes of memory. Eight
# bytes of packed numbers count as a part, or four where the numbers have 64 bits.
MOST_PARTS = 500_000
# Messages within messages, which protobuf takes no more of itself.
MOST_NESTED = 100
# Shorter messages cost less than a visit to another thread.
SHORT = 16 * 1024
# Shorter messages are not counted: a part has a byte that says its field, and one at least that says its value.
_FEW = 2 * MOST_PARTS
_LONG = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_DOUBLE)
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


class TooManyParts(ServiceError):
    """The error TOO_LARGE for a message that has more parts than are taken."""

    def __init__(self, field: str) -> None:
        """Name the field in which that was seen."""
        text = f"{field}: the message has more than {MOST_PARTS} parts; send fewer at once"
        super().__init__("TOO_LARGE", text, limit=MOST_PARTS, field=field)


class Parser:
    """Makes the messages of one type."""

    def __init__(self, kind: type[Message], most_bytes: int = LARGEST_REQUEST) -> None:
        """Take messages of at most `most_bytes`."""
        self._kind = kind
        self._most_bytes = most_bytes

    def __call__(self, data: bytes) -> Any:
        """Make the message of some bytes; this blocks for as long as a tenth of a second. Errors: TOO_LARGE;
        INVALID_FIELD for bytes that are no such message."""
        if (size := len(data)) > self._most_bytes:
            text = f"a request of {size} bytes; at most {self._most_bytes} are taken"
            raise ServiceError("TOO_LARGE", text, limit=self._most_bytes, size=size)
        try:
            if size > _FEW:
                _counted(data, 0, size, _schema(self._kind.DESCRIPTOR), MOST_PARTS, MOST_NESTED)
            return self._kind.FromString(data)
        except (DecodeError, IndexError):
            raise invalid("request", "the bytes are not a message of this method") from None


class Received(NamedTuple):
    """The bytes of a request, with the parser that makes its message."""

    data: bytes
    parser: Parser

    def message(self) -> Any:
        """Make the message of the bytes. Errors: those of `Parser`."""
        return self.parser(self.data)


class _Field(NamedTuple):
    """What a length-delimited field has in it: a message whose fields are `schema`, or, where that is None, packed
    numbers, of which `packed` bytes count as a part."""

    name: str
    schema: "Mapping[int, _Field] | None"
    packed: int = 0


def _schema(kind: Any) -> Mapping[int, _Field]:
    """Return the fields of a message that have parts, by number. Texts and bytes have none."""
    if kind.full_name in _schemas:
        return _schemas[kind.full_name]
    # Known before its fields are looked at, because a message may have others of its own kind in it.
    made = _schemas[kind.full_name] = {}
    for field in kind.fields:
        if field.message_type is not None:
            made[field.number] = _Field(field.name, _schema(field.message_type))
        elif field.is_repeated and field.cpp_type != FieldDescriptor.CPPTYPE_STRING:
            made[field.number] = _Field(field.name, None, 4 if field.cpp_type in _LONG else 8)
    return made


_schemas: dict[str, dict[int, _Field]] = {}


def _counted(data: bytes, at: int, end: int, schema: Mapping[int, _Field], left: int, nested: int) -> int:
    """Count the parts of the message at `at` to `end`, and return how many of `left` are left. nested: how many
    messages may be within each other in it. Errors: TooManyParts; IndexError for bytes that are no message.

    This is one loop without calls for the common cases, because it looks at every field of a large message.
    """
    while at < end:
        left -= 1
        tag = data[at]
        at += 1
        if tag > 0x7F:
            tag, at = _varint(data, at - 1)
        wire = tag & 7
        field = schema.get(tag >> 3)
        if left < 0:
            raise TooManyParts(field.name if field else "request")
        if wire == _DELIMITED:
            length = data[at]
            at += 1
            if length > 0x7F:
                length, at = _varint(data, at - 1)
            if at + length > end:
                raise IndexError
            if field is not None:
                left = _left_after(data, at, at + length, field, left, nested)
            at += length
        elif wire == _VARINT:
            while data[at] > 0x7F:
                at += 1
            at += 1
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:  # a group, which no message of ours has
            raise IndexError
    return left


def _left_after(data: bytes, begin: int, end: int, field: _Field, left: int, nested: int) -> int:
    """Count the parts of a field's content, and return how many of `left` are left. Errors: those of `_counted`."""
    if field.schema is not None:
        if not nested:
            raise IndexError
        return _counted(data, begin, end, field.schema, left, nested - 1)
    left -= (end - begin) // field.packed
    if left < 0:
        raise TooManyParts(field.name)
    return left


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of variable length, and return it with the place where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError


def deserializer(kind: Descriptor, most_bytes: int) -> Callable[[bytes], Received]:
    """Make the function that gRPC calls in the event loop with the bytes of a request; it raises nothing, as gRPC
    demands. kind: the messages of the method. most_bytes: of one message."""
    parser = Parser(GetMessageClass(kind), most_bytes)
    return lambda data: Received(data, parser)
