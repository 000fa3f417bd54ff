"""A server between a client and a real one, which changes the answers: what a broken or hostile server may send."""

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kvbank.v1 import access_pb2, service_pb2, session_pb2

SERVICE = service_pb2.DESCRIPTOR.services_by_name["MemoryService"]
ACCESS = access_pb2.DESCRIPTOR.services_by_name["AccessService"]
SESSIONS = session_pb2.DESCRIPTOR.services_by_name["SessionService"]
# The frames of an answer, one where the method does not stream, to others.
Change = Callable[[list[bytes]], Iterable[bytes]]
_DEEPEST = 5


class Relay:
    """Passes every call on; `change` changes the answers of one method."""

    def __init__(self, upstream: str) -> None:
        self._channel = grpc.insecure_channel(upstream)
        self._folder = tempfile.TemporaryDirectory()
        self._server = grpc.server(ThreadPoolExecutor(8))
        for service in (SERVICE, ACCESS, SESSIONS):
            handlers = {method.name: self._handler(method) for method in service.methods}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self.unix = f"unix:{self._folder.name}/s"
        self._server.add_insecure_port(self.unix)
        self._server.start()
        self._changes: dict[str, Change] = {}
        self._closed = threading.Event()
        self._actions: dict[str, Callable[[], object]] = {}
        self._lost: set[str] = set()
        self._written: Callable[[bytes], bytes] = lambda request: request
        self.calls: list[str] = []
        self.requests: list[bytes] = []

    def change(self, method: str, change: Change) -> None:
        """Change the answers of this method, and of no other, from here on."""
        self._changes = {method: change}

    def before(self, method: str, action: Callable[[], object]) -> None:
        """Do something before every request of a method is passed on, from here on."""
        self._actions[method] = action

    def silence(self, *methods: str) -> None:
        """Pass no more requests of these methods on, and answer none, from here on."""
        for method in methods:
            self.before(method, self._closed.wait)

    def lose_once(self, method: str) -> None:
        """Break the connection instead of answering the next call of a method, which the server has done then."""
        self._lost.add(method)

    def change_written(self, change: Callable[[bytes], bytes]) -> None:
        """Change every request of WriteChunks, from here on."""
        self._written = change

    def close(self) -> None:
        self._closed.set()
        self._server.stop(None).wait()
        self._channel.close()
        self._folder.cleanup()

    def _handler(self, method: Any) -> Any:
        path = f"/{method.containing_service.full_name}/{method.name}"

        def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
            self._noted(method.name, request)
            answer = self._passed(context, lambda: [self._channel.unary_unary(path)(request)])
            if method.name in self._lost:
                self._lost.remove(method.name)
                context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            return next(iter(self._changed(method.name, answer)), b"")

        def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            self._noted(method.name, request)
            answer = self._passed(context, lambda: list(self._channel.unary_stream(path)(request)))
            yield from self._changed(method.name, answer)

        def both(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            noted = (self._written(self._noted(method.name, request)) for request in requests)
            answer = self._passed(context, lambda: list(self._channel.stream_stream(path)(noted)))
            yield from self._changed(method.name, answer)

        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(both)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)

    def _noted(self, method: str, request: bytes) -> bytes:
        self.calls.append(method)
        self.requests.append(request)
        self._actions.get(method, bool)()
        return request

    def _passed(self, context: grpc.ServicerContext, call: Callable[[], list[bytes]]) -> list[bytes]:
        try:
            return call()
        except grpc.RpcError as error:
            trailing = error.trailing_metadata() or ()  # type: ignore[attr-defined]
            context.set_trailing_metadata([(key, value) for key, value in trailing if key.startswith("grpc-status-d")])
            context.abort(error.code(), error.details())  # type: ignore[attr-defined]
            raise

    def _changed(self, method: str, answer: list[bytes]) -> Iterable[bytes]:
        return self._changes.get(method, list)(answer)


_NUMBERS = (0, -1, 1, 2**31 - 1, 2**63 - 1, -(2**63))
_VALUES: dict[int, tuple[Any, ...]] = {
    Field.CPPTYPE_INT32: (0, -1, 2**31 - 1, -(2**31)),
    Field.CPPTYPE_INT64: _NUMBERS,
    Field.CPPTYPE_UINT32: (0, 1, 2**32 - 1),
    Field.CPPTYPE_UINT64: (0, 1, 2**64 - 1),
    Field.CPPTYPE_FLOAT: (float("nan"), float("inf"), -1.0),
    Field.CPPTYPE_DOUBLE: (float("nan"), float("-inf"), -1.0),
    Field.CPPTYPE_BOOL: (False, True),
    Field.CPPTYPE_ENUM: (0, 99, -1),
    Field.CPPTYPE_STRING: ("", "\0", "x" * 10_000, "../../etc/passwd"),
}


def changes(method: Any) -> Iterator[tuple[str, Change]]:
    """Yield every way to change the answers of a method, each with its name."""
    kind = method.output_type
    for path in _paths(kind, (), _DEEPEST):
        field = path[-1]
        name = ".".join(each.name for each in path)
        yield f"{name} cleared", _on_first(kind, path, _clear)
        if field.message_type is None:
            values = (b"", b"\xff" * 7) if field.type == Field.TYPE_BYTES else _VALUES[field.cpp_type]
            for value in values:
                yield f"{name} = {value!r:.20}", _on_first(kind, path, lambda m, f, v=value: _set(m, f, v))
        if field.is_repeated and not _is_map(field):
            yield f"{name} doubled", _on_first(kind, path, _double)
            yield f"{name} shortened", _on_first(kind, path, _shorten)
    yield "no frames", lambda _: []
    yield "empty frame first", lambda frames: [b"", *frames]
    yield "empty frame last", lambda frames: [*frames, b""]
    yield "frames twice", lambda frames: [*frames, *frames]
    yield "last frame twice", lambda frames: [*frames, *frames[-1:]]
    yield "first frame left out", lambda frames: frames[1:]
    yield "last frame left out", lambda frames: frames[:-1]
    yield "frames backwards", lambda frames: frames[::-1]
    yield "no message", lambda frames: [b"\xff\xff\xff", *frames]
    yield "cut message", lambda frames: [frame[: len(frame) // 2] for frame in frames]
    yield "text that is no UTF-8", lambda frames: [frame.replace(b"b", b"\xff") for frame in frames]
    yield "data first", lambda frames: [b"\x12\x03abc", *frames]
    yield "much more data", lambda frames: [*frames, *[b"\x12\x80\x80\x40" + bytes(1 << 20)] * 3]


def _paths(kind: Descriptor, path: tuple[Field, ...], deepest: int) -> Iterator[tuple[Field, ...]]:
    for field in kind.fields:
        yield (*path, field)
        inner = field.message_type
        if inner is not None and deepest and not _is_map(field) and inner not in {f.message_type for f in path}:
            yield from _paths(inner, (*path, field), deepest - 1)


def _is_map(field: Field) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _on_first(kind: Descriptor, path: tuple[Field, ...], change: Callable[[Message, Field], None]) -> Change:
    """Make a change of the field at `path`, of the first of each repeated message on the way, in every frame that has
    it."""

    def changed(frames: list[bytes]) -> Iterator[bytes]:
        for frame in frames:
            message = GetMessageClass(kind)()
            try:
                message.ParseFromString(frame)
            except DecodeError:
                yield frame
                continue
            if message.ByteSize() < 1 << 16 and not getattr(message, "data", b""):
                _apply(message, path, change)
            yield message.SerializeToString()

    return changed


def _apply(message: Any, path: tuple[Field, ...], change: Callable[[Message, Field], None]) -> None:
    for field in path[:-1]:
        inner = getattr(message, field.name)
        if field.is_repeated:
            inner = inner[0] if inner else inner.add()
        message = inner
    change(message, path[-1])


def _clear(message: Any, field: Field) -> None:
    message.ClearField(field.name)


def _set(message: Any, field: Field, value: Any) -> None:
    if field.is_repeated:
        message.ClearField(field.name)
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


def _double(message: Any, field: Field) -> None:
    getattr(message, field.name).extend(list(getattr(message, field.name)))


def _shorten(message: Any, field: Field) -> None:
    del getattr(message, field.name)[-1:]
