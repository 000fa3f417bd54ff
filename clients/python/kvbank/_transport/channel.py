"""What both transports agree on: the forms of a target, channel options and default deadlines."""

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbank._arguments import each, expected, int32, plain, text
from kvbank._exceptions import InvalidArgument
from kvbank.v1 import service_pb2, service_pb2_grpc
from kvbank.wire import addresses, frames

DEFAULT_TIMEOUT = 30.0
DEFAULT_STREAM_TIMEOUT = 120.0
MAX_MESSAGE_BYTES = 64 << 20
# For a server that does not name its bound.
DEFAULT_UNACKNOWLEDGED_BYTES = 32 << 20
# What a client keeps of a write, whatever a server allows.
MOST_UNACKNOWLEDGED_BYTES = 1 << 30

_SERVICE = "kvbank.v1.MemoryService"

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A dead peer is noticed within some 80 s; more frequent pings would need the server's consent.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Between attempts to connect, so that a restart is noticed soon; gRPC's own values are 1 s and 120 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # What one attempt may take before the next one; gRPC's own value is 20 s.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # A proxy of the environment is meant for the web, not for a memory server beside the model.
    ("grpc.enable_http_proxy", 0),
)


def stub(channel: Any) -> Any:
    """The methods of the service; the data frames of the streams pass protobuf by."""
    methods: Any = service_pb2_grpc.MemoryServiceStub(channel)  # type: ignore[no-untyped-call]
    methods.WriteChunks = channel.stream_stream(
        f"/{_SERVICE}/WriteChunks",
        request_serializer=frames.serializer,
        response_deserializer=service_pb2.WriteChunksResponse.FromString,
    )
    methods.Retrieve = channel.unary_stream(
        f"/{_SERVICE}/Retrieve",
        request_serializer=service_pb2.RetrieveRequest.SerializeToString,
        response_deserializer=frames.deserializer(service_pb2.RetrieveResponse),
    )
    methods.FetchChunks = channel.unary_stream(
        f"/{_SERVICE}/FetchChunks",
        request_serializer=service_pb2.FetchChunksRequest.SerializeToString,
        response_deserializer=frames.deserializer(service_pb2.FetchChunksResponse),
    )
    return methods


def unacknowledged_bytes(named: int) -> int:
    """How much of a write may be on its way to a server that names this bound."""
    return min(named, MOST_UNACKNOWLEDGED_BYTES) if named > 0 else DEFAULT_UNACKNOWLEDGED_BYTES


# Of an answer in pages. Those of a list are handed out one by one, and may be many; banks of statistics are kept until
# the last page is there.
MOST_PAGES = {"ListBanks": 10**9, "ListChunks": 10**9, "ListEvictions": 10**9, "GetStats": 10**4}


def with_defaults(options: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Our channel arguments, and over them the caller's; gRPC itself would take the first of two."""
    return list(dict((*OPTIONS, *each("options", options, _option))).items())


def _option(field: str, option: Any) -> tuple[str, str | int | bytes]:
    what = "pairs of a string and a string, bytes or a whole number of 32 bits"
    if not isinstance(option, tuple | list) or len(option) != 2:
        raise expected(field, what, option)
    name, value = option
    if isinstance(value, bytes):
        return text(field, name), value
    return text(field, name), text(field, value) if isinstance(value, str) else int32(field, value)


REQUEST_ID = "x-request-id"


def new_request_id() -> str:
    """Under which the server logs a call; one for the call, its retries included."""
    return uuid.uuid4().hex


def metadata(request_id: str) -> tuple[tuple[str, str], ...]:
    """What travels with a call."""
    return ((REQUEST_ID, request_id),)


_TARGETS = "host:port, unix:PATH or a folder such as ./memory"
_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:\[\]]+):(?P<port>\d{1,5})")


def parse_target(target: str | os.PathLike[str]) -> str | Path:
    """A folder as `Path`, an address as `str`; InvalidArgument for anything else.

    In this order: a path object is a folder; "unix:PATH", "dns:...", "ipv4:..." and "ipv6:..." are addresses; a string
    with a path separator, "." or "..", or the name of an existing folder is a folder; "host:port" is an address.
    """
    if isinstance(target, os.PathLike):
        return _folder(_path(target))
    if not isinstance(target, str):
        raise expected("target", _TARGETS, target)
    target = plain(target)
    if "://" in target and not target.startswith(_SCHEMES):
        raise _bad_target(target, "no URL: kvbank speaks gRPC")
    if target.startswith(_SCHEMES):
        if target in _SCHEMES:
            raise _bad_target(target, "nothing follows the scheme")
        return addresses.checked("target", target)
    if "/" in target or os.sep in target or target in (".", "..") or (target and _is_folder(Path(target))):
        return _folder(Path(target))
    match = _HOST_PORT.fullmatch(target)
    if match is None:
        raise _bad_target(target, "it has no port" if re.fullmatch(r"[\w.-]+", target) else "it is none of these")
    if not 0 < int(match["port"]) < 65536:
        raise _bad_target(target, "ports are 1 to 65535")
    return addresses.checked("target", target)


def _path(target: os.PathLike[str]) -> Path:
    try:
        return Path(os.fsdecode(target))
    except TypeError:  # it says that it is a path, and has none
        raise expected("target", _TARGETS, target) from None


def _folder(path: Path) -> Path:
    try:
        path = path.expanduser()
        is_file = path.exists() and not path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long; no such user; with a NUL character
        raise _bad_target(str(path), str(error)) from None
    if is_file:
        raise _bad_target(str(path), "it is a file")
    return path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # too long for a name
        return False


def _bad_target(target: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"cannot connect to {target!r}: {why}; expected {_TARGETS}",
        reason="INVALID_FIELD",
        metadata={"field": "target"},
    )
