"""Whether a server shares its data folder with this process is found out here.

This file owns what is believed of such a server: that it knows what is in a file which only this user can read, once
it has proven that, and nothing more.
"""

import hmac
import os
import stat
from typing import Any

from google.protobuf.message import DecodeError

from kvbank._calls import reading
from kvbank._exceptions import DeadlineExceeded, ServiceError
from kvbank._transport import status
from kvbank._transport.folder import Folder, plain
from kvbank._transport.same_host import SameHost
from kvbank.v1 import direct_pb2, service_pb2
from kvbank.wire import proof as _proof
from kvbank.wire.local_socket import Direct

_NONCE_FILE, _LARGEST_NONCE = "same-host.nonce", 1024
# The methods that a direct call can ask for, and the fields of their requests and answers.
_DIRECT = {"RetrieveFiles": "retrieve", "FetchFiles": "fetch"}


class Sharing:
    """What a client knows of the data folder that it may share with its server.

    folder: the folder that the server has proven to serve; None where there is none.
    """

    def __init__(self, address: str, mapped: bool = False) -> None:
        """Begin without a folder.

        address: of the server, which is to be asked for its folder where it listens on a unix socket: no other address
        says that it is on this machine. mapped: see `kvbank.ConnectOptions`.
        """
        self._mapped = mapped
        self.folder: SameHost | None = None
        self._direct: Direct | None = None
        self._refused: SameHost | None = None
        self._unknown = address.startswith("unix:")

    def unknown(self) -> bool:
        """Tell whether the server is to be asked by GetServerInfo."""
        return self._unknown

    @staticmethod
    def question() -> service_pb2.GetServerInfoRequest:
        """Make the request that lets the server prove that it knows the nonce."""
        return service_pb2.GetServerInfoRequest(challenge=_proof.challenge())

    def learn(self, asked: service_pb2.GetServerInfoRequest, info: service_pb2.GetServerInfoResponse) -> None:
        """Take the folder that an answer to `question` names, where the server has proven to know its nonce."""
        found = _proven(info.same_host, asked.challenge, self._mapped) if info.HasField("same_host") else None
        found = None if found is None or found.same(self._refused) else found
        if found is None or not found.same(self.folder):
            self.close()
            self._direct = Direct(found.folder.reached(found.socket), found.folder) if found and found.socket else None
            self.folder = found
        self._unknown = False

    def failed(self, call: reading.Call, error: ServiceError) -> None:
        """Note in which error a call ended: a server that does not take the proof of its folder is another one since,
        or shares nothing any more, and is to be asked again."""
        if isinstance(call.folder, SameHost) and reading.shares_nothing(error):
            self._refused, self._unknown = call.folder, True

    def doubted(self) -> None:
        """Note that the server did not take a staged file: it may be another server since, and is to be asked again."""
        self._unknown = self.folder is not None

    def ask(self, method: str, request: Any, timeout: float, request_id: str) -> Any:
        """Return the answer of a direct call; None where it cannot be had so, and gRPC is to be asked.

        Errors: DeadlineExceeded; the ServiceError that the server answers.
        """
        field = _DIRECT.get(method)
        if (direct := self._direct) is None or field is None:
            return None
        try:
            answer = direct.call(direct_pb2.DirectRequest(request_id=request_id, **{field: request}), timeout)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout:.3g} s", code="DEADLINE_EXCEEDED") from None
        except (OSError, DecodeError):
            return None
        if answer.HasField("error"):
            raise status.from_status(answer.error, request_id)
        return getattr(answer, field) if answer.HasField(field) else None

    def close(self) -> None:
        """End the connections for direct calls."""
        if self._direct is not None:
            self._direct.close()


def _proven(info: service_pb2.SameHost, challenge: bytes, mapped: bool) -> SameHost | None:
    """Return the folder that a server names; None where the server has not proven that it knows what is in the nonce
    file, which must belong to this user and be closed to others."""
    if info.nonce_file != _NONCE_FILE or not info.path.startswith(b"/"):
        return None
    try:
        folder = Folder(info.path)
        with folder.opened(_NONCE_FILE) as descriptor:
            found = os.fstat(descriptor)
            own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
            if not own or stat.S_IMODE(found.st_mode) & 0o077:
                return None
            nonce = os.read(descriptor, _LARGEST_NONCE)
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return None
    if not nonce or not hmac.compare_digest(info.proof, _proof.of_server(nonce, challenge, info)):
        return None
    if not plain(info.staging):
        return None
    return SameHost(folder, info.staging, nonce, info.socket if plain(info.socket) else "", mapped)
