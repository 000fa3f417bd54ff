"""Whether a server shares its data folder with this process is found out here.

This file owns what is believed of such a server: that it knows what is in a file which only this user can read, once
it has proven that, and nothing more.
"""

import hmac
import os
import stat

from kvbank._calls import reading
from kvbank._exceptions import ServiceError
from kvbank._transport.folder import Folder, plain
from kvbank._transport.same_host import SameHost
from kvbank.v1 import service_pb2
from kvbank.wire import proof as _proof

_NONCE_FILE, _LARGEST_NONCE = "same-host.nonce", 1024


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
