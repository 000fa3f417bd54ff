"""Both clients keep here what they know of a server; how their calls travel is in `caller` and in `async_caller`."""

import os
from collections.abc import Sequence
from typing import Any

from kvbank import _api_key, _arguments
from kvbank._targets import checked_address
from kvbank._transport import channel
from kvbank._transport.retrying import Attempts, Contact
from kvbank._transport.sharing import Sharing
from kvbank.v1 import service_pb2


class BaseCaller:
    """What a client of either kind knows of its server, and how long its calls may take.

    sharing: what is known of the server's data folder. contact: whether the server was reached. pid: the process that
    made the client. bound: bytes of a write that may be unacknowledged; 0 before the server was asked.
    typed: whether the server keeps other metadata than strings; False before it was asked.
    metadata: what goes with every call as gRPC metadata.
    """

    def __init__(
        self,
        address: str,
        timeout: float,
        *,
        stream_timeout: float,
        options: Sequence[tuple[str, Any]],
        mapped: bool,
        first_contact: float,
        api_key: str | None = None,
    ) -> None:
        """Take the arguments of a client, see `kvbank.ConnectOptions`. Errors: InvalidArgument."""
        self.address = checked_address("address", address)
        self.options = channel.with_defaults(options)
        self.metadata = _api_key.metadata(_api_key.given(api_key))
        self._timeout = _arguments.seconds("timeout", timeout)
        self._stream_timeout = _arguments.seconds("stream_timeout", stream_timeout)
        self.sharing = Sharing(address, _arguments.flag("mapped", mapped))
        self.contact = Contact(_arguments.seconds("first_contact", first_contact))
        self.pid = os.getpid()
        self.bound = 0
        self.typed = False

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
        self.typed = info.typed_metadata
