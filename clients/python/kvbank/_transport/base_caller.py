"""Both clients keep here what they know of a server; how their calls travel is in `caller` and in `async_caller`."""

import os
from typing import Any, Unpack

from kvbank import _arguments, _headers, _tls
from kvbank._exceptions import ServiceError
from kvbank._options import ConnectOptions, check_names
from kvbank._targets import checked_address, each_address
from kvbank._transport import channel, status
from kvbank._transport.retrying import FIRST_CONTACT_S, Attempts, Contact
from kvbank._transport.sharing import Sharing
from kvbank._transport.turn import Turn
from kvbank.v1 import service_pb2


class BaseCaller:
    """What a client of either kind knows of its server, and how long its calls may take.

    sharing: what is known of the server's data folder. contact: whether the server was reached. pid: the process that
    made the client. bound: bytes of a write that may be unacknowledged; 0 before the server was asked. inline: bytes of
    tensors that the header of a chunk may bring along; likewise.
    typed: whether the server keeps other metadata than strings; False before it was asked. alternatives: whether it
    knows alternatives of a filter; likewise.
    route: where calls go, and what they take along.
    """

    def __init__(self, address: str, timeout: float, **options: Unpack[ConnectOptions]) -> None:
        """Take the arguments of a client, see `kvbank.ConnectOptions`. Errors: InvalidArgument, TypeError."""
        check_names("connect", options, ConnectOptions)
        self.address = checked_address("address", address)
        stream_timeout = options.get("stream_timeout", channel.DEFAULT_STREAM_TIMEOUT)
        mapped, first_contact = options.get("mapped", False), options.get("first_contact", FIRST_CONTACT_S)
        addresses, spread = each_address(self.address), options.get("spread")
        headers = _headers.given(options.get("metadata", ()), options.get("api_key"))
        self.route = channel.Route(
            Turn(addresses, spread=_arguments.flag("spread", False if spread is None else spread)),
            channel.with_defaults(options.get("options", ()), several=len(addresses) > 1),
            headers,
            _tls.given(self.address, options, keyed=_headers.have_key(headers)),
        )
        self._timeout = _arguments.seconds("timeout", timeout)
        self._stream_timeout = _arguments.seconds("stream_timeout", stream_timeout)
        self.sharing = Sharing(address, _arguments.flag("mapped", mapped))
        self.contact = Contact(_arguments.seconds("first_contact", first_contact))
        self.pid = os.getpid()
        self.bound = self.inline = 0
        self.typed = False
        self.alternatives = False

    def attempts(self, timeout: float | None) -> Attempts:
        """Return the attempts of a single call, within `timeout` seconds or the client's."""
        return self._attempts(timeout, self._timeout)

    def stream_attempts(self, timeout: float | None) -> Attempts:
        """Return the attempts of a call that moves tensors, within `timeout` seconds or the client's."""
        return self._attempts(timeout, self._stream_timeout)

    def _attempts(self, timeout: float | None, default: float) -> Attempts:
        # A caller who says how long a call may take says so for a server that was never reached, too.
        return Attempts(default, self.contact) if timeout is None else Attempts(_arguments.seconds("timeout", timeout))

    def learned(self, info: service_pb2.GetServerInfoResponse) -> None:
        """Keep what the server says of writes."""
        self.bound = channel.unacknowledged_bytes(info.max_unacknowledged_bytes)
        self.inline = info.max_inline_bytes
        self.typed = info.typed_metadata
        self.alternatives = info.alternatives

    def error(self, error: Any, at: int, request_id: str) -> ServiceError:
        """Return the error of this package for a `grpc.RpcError` of a call that went to the address `at`. Where that
        does not answer, further calls go to the next one."""
        turn = self.route.turn
        where = turn.addresses[at] if len(turn.addresses) > 1 else ""
        found = status.from_rpc_error(error, request_id, tls=self.route.tls is not None, where=where)
        if found.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            turn.leave(at)
        return found

    def reached(self, at: int) -> None:
        """Note that the address `at` has answered."""
        self.contact.made = True
        self.route.turn.answered(at)
