"""Both clients take their options of gRPC channels, default deadlines and bounds from here, and the id of a request."""

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvbank._arguments import each, expected, int32, text
from kvbank._tls import Tls
from kvbank._transport.turn import CONNECT_MS, Turn
from kvbank.wire import addresses

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class Route:
    """Where the calls of a client go, and what they take along.

    turn: the addresses. options: all gRPC channel arguments, see `with_defaults`. metadata: what goes with every call.
    tls: None where it is not spoken.
    """

    turn: Turn
    options: Sequence[tuple[str, Any]] = ()
    metadata: Metadata = ()
    tls: Tls | None = None


DEFAULT_TIMEOUT = 30.0
DEFAULT_STREAM_TIMEOUT = 120.0
MAX_MESSAGE_BYTES = 64 << 20
# For a server that does not name its bound.
DEFAULT_UNACKNOWLEDGED_BYTES = 32 << 20
# What a client keeps of a write, whatever a server allows.
MOST_UNACKNOWLEDGED_BYTES = 1 << 30
# The most pages of an answer. Those of a list are handed out one by one, and may be many; banks of statistics are kept
# until the last page is there.
MOST_PAGES = {"ListBanks": 10**9, "ListChunks": 10**9, "ListEvictions": 10**9, "GetStats": 10**4}
MOST_PAGES |= {"ListKeys": 10**9, "ListTenants": 10**9, "ListSessions": 10**9, "ListTurns": 10**9}
# The name of the gRPC metadata with the id of a request.
REQUEST_ID = "x-request-id"
# The variable by which gRPC, and nothing else, goes through a proxy.
_PROXY = "grpc_proxy"
# What switches off the proxies of names, and those of resolved addresses (GRPC_ADDRESS_HTTP_PROXY).
_NO_PROXY = {"grpc.enable_http_proxy": 0, "grpc.address_http_proxy_enabled_addresses": ""}

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
    # A proxy of the environment is meant for the web, not for a memory server beside the model; see `with_defaults`.
    ("grpc.enable_http_proxy", 0),
)


def unacknowledged_bytes(named: int) -> int:
    """Return how many bytes of a write may be unacknowledged by a server that names this bound; 0 is none named."""
    return min(named, MOST_UNACKNOWLEDGED_BYTES) if named > 0 else DEFAULT_UNACKNOWLEDGED_BYTES


def with_defaults(options: Sequence[tuple[str, Any]], *, several: bool = False) -> list[tuple[str, Any]]:
    """Return the channel arguments of this package and of the caller, whose values count where both state one.

    gRPC itself would take the first of two. several: whether there are further addresses to go to. A proxy is used
    where the environment names one for gRPC (grpc_proxy). Errors: InvalidArgument.
    """
    ours = dict(OPTIONS)
    if several:
        ours["grpc.min_reconnect_backoff_ms"] = CONNECT_MS
    if os.environ.get(_PROXY):
        ours["grpc.enable_http_proxy"] = 1
    return list((ours | dict(each("options", options, _option))).items())


def for_address(address: str, options: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the channel arguments for one address of a service: to an address of this machine no proxy is used,
    whatever says so, because it could read what goes there as plain text, keys included."""
    return list((dict(options) | (_NO_PROXY if addresses.is_own(address) else {})).items())


def _option(field: str, option: Any) -> tuple[str, str | int | bytes]:
    what = "pairs of a string and a string, bytes or a whole number of 32 bits"
    if not isinstance(option, tuple | list) or len(option) != 2:
        raise expected(field, what, option)
    name, value = option
    if isinstance(value, bytes):
        return text(field, name), value
    return text(field, name), text(field, value) if isinstance(value, str) else int32(field, value)


def new_request_id() -> str:
    """Return a new id under which the server logs a call and its retries."""
    return uuid.uuid4().hex


def metadata(request_id: str, others: Metadata = ()) -> Metadata:
    """Return the gRPC metadata of a call: the id under which the server logs it, and what goes with every call."""
    return ((REQUEST_ID, request_id), *others)
