"""Requests that are many times larger when they are decoded: for every field that a message can have, at any depth, as
many of its smallest values as some bytes hold."""

import socket
from collections.abc import Iterator
from functools import reduce
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from kvbank.v1 import direct_pb2
from kvbank.wire import local_socket
from memory_service.api.server import SERVICES

MIB = 1 << 20
# In bytes: about as large as all methods take, of about as many parts as they take, and beyond both.
SIZES = {"large": 7 * MIB // 2, "many": 7 * MIB // 10, "larger": 20 * MIB}
METHODS = {method.name: method for service in SERVICES for method in service.methods}
DIRECT = direct_pb2.DirectRequest.DESCRIPTOR
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED = {
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FIXED64: _FIXED64,
    FieldDescriptor.TYPE_SFIXED64: _FIXED64,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_FIXED32: _FIXED32,
    FieldDescriptor.TYPE_SFIXED32: _FIXED32,
}


def floods(message: Descriptor, size: int) -> Iterator[tuple[str, bytes]]:
    """Yield (what is flooded, the bytes of the message), about `size` bytes each."""
    yield "numbers of no field", (_tag(1999, _VARINT) + b"\1") * (size // 3)
    yield "texts of no field", (_tag(1998, _DELIMITED) + b"\0") * (size // 3)
    yield from _of(message, size, "", ())


def flood(message: Descriptor, path: str, size: int) -> bytes:
    """Return the bytes that flood one field, which is named as in `floods`."""
    return next(data for name, data in floods(message, size) if name == path)


def _of(message: Descriptor, size: int, path: str, above: tuple[FieldDescriptor, ...]) -> Iterator[tuple[str, bytes]]:
    for field in message.fields:
        name = f"{path}{field.name}"
        for kind, values in _values(field, size):
            yield f"{name}{kind}", reduce(lambda data, parent: _within(parent, data), reversed(above), values)
        # A message may hold others of its kind, as a filter does: these are gone into once.
        if field.message_type is not None and [each.message_type for each in above].count(field.message_type) < 2:
            yield from _of(field.message_type, size, f"{name}.", (*above, field))


def _values(field: FieldDescriptor, size: int) -> Iterator[tuple[str, bytes]]:
    """Return values for a field. A singular field that comes again and again is merged, or replaced."""
    if field.message_type is not None or (field.cpp_type == FieldDescriptor.CPPTYPE_STRING and field.is_repeated):
        one = _tag(field.number, _DELIMITED) + b"\0"
        yield "", one * (size // len(one))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        yield "", _within(field, b"x" * size)
    else:
        wire = _FIXED.get(field.type, _VARINT)
        value = b"\1" + bytes({_VARINT: 0, _FIXED32: 3, _FIXED64: 7}[wire])
        one = _tag(field.number, wire) + value
        yield (" one by one" if field.is_repeated else ""), one * (size // len(one))
        if field.is_repeated:
            yield " packed", _within(field, value * (size // len(value)))


def _within(field: FieldDescriptor, data: bytes) -> bytes:
    return _tag(field.number, _DELIMITED) + _varint(len(data)) + data


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*written, value))


def all_floods(size: int) -> Iterator[tuple[str, str, bytes]]:
    """(method, what it floods, the bytes) of all methods and of direct calls ("direct")."""
    for method in METHODS.values():
        yield from ((method.name, path, data) for path, data in floods(method.input_type, size))
    yield from (("direct", path, data) for path, data in floods(DIRECT, size))


def send_directly(path: str, data: bytes) -> bytes:
    """Call over the socket for direct calls, once; the bytes of the answer. Errors: OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(100)
        connection.connect(path)
        local_socket.send(connection, data)
        return local_socket.receive(connection) or b""


def send(channel: Any, method: str, data: bytes, **options: Any) -> None:
    """Call a method with these bytes, once. Errors: grpc.RpcError."""
    found = METHODS[method]
    kind = ("stream" if found.client_streaming else "unary") + ("_stream" if found.server_streaming else "_unary")
    call = getattr(channel, kind)(f"/{found.containing_service.full_name}/{method}")
    answer = call(iter([data]) if found.client_streaming else data, **options)
    for _ in answer if found.server_streaming else ():
        pass
