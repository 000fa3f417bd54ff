"""How clients of this host and the service prove to each other that they see the same data folder, and which files the
service takes over from such clients. This file owns the nonce, which only the service's user can read, and the folder
in which clients stage payloads.
"""

import os
import re
import secrets
import time
from hmac import compare_digest
from pathlib import Path

from kvbank.files import private
from kvbank.v1 import service_pb2 as pb
from kvbank.wire import proof as _proof
from memory_service.api.local_socket import SOCKET, DirectCalls
from memory_service.domain.errors import staged_file
from memory_service.storage.base import Staged

NONCE_FILE = "same-host.nonce"
# Seconds after which a staged file that no write has taken over counts as forgotten by its maker.
FORGOTTEN_S = 3600.0
_NAME = re.compile(r"[0-9a-f]{32}")


class SameHost:
    """Keeps the nonce by which clients of this host and the service prove themselves to each other, and the folder in
    which such clients stage payloads."""

    def __init__(self, data: Path, staging: Path) -> None:
        """Remove what was staged for the server before this one, and make a new nonce. data: the data folder. staging:
        the folder in it for what clients stage. Errors: OSError."""
        self._root = data.resolve()
        self._staging = self._root / staging.name
        private.make_folder(self._staging)
        # The time (monotonic) at which each file was seen first.
        self._seen: dict[str, float] = {}
        self.sweep(0)
        self._nonce = secrets.token_bytes(32)
        self._proof_of_client = _proof.of_client(self._nonce)
        path = self._root / NONCE_FILE
        path.unlink(missing_ok=True)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(self._nonce)
        except OSError:
            self.close()
            raise

    def message(self, challenge: bytes) -> pb.SameHost:
        """Make what GetServerInfo says of the shared folder, with a proof where a challenge asks for one."""
        socket = SOCKET if DirectCalls.possible(self.socket) else ""
        root, path = _proof.path(self._root)
        folder = pb.SameHost(root=root, path=path, nonce_file=NONCE_FILE, staging=self._staging.name, socket=socket)
        if _proof.SHORTEST_CHALLENGE <= len(challenge) <= _proof.LONGEST_CHALLENGE:
            folder.proof = _proof.of_server(self._nonce, challenge, folder)
        return folder

    @property
    def socket(self) -> Path:
        """Return the path of the socket for direct calls."""
        return self._root / SOCKET

    def proven(self, proof: bytes) -> bool:
        """Tell whether a caller has read the nonce file."""
        return compare_digest(proof, self._proof_of_client)

    def staged(self, message: pb.StagedPayload) -> Staged:
        """Return the staged file that a header names, which is not looked at yet. Errors: STAGED_FILE."""
        if not self.proven(message.proof):
            raise staged_file(message.name, "comes without a proof that its maker has read the nonce of this server")
        if not _NAME.fullmatch(message.name) or not 8 <= message.offset <= 1 << 20 or message.offset % 8:
            raise staged_file(message.name, "has a name of other than 32 hex digits, or no good offset")
        return Staged(message.name, message.offset)

    def sweep(self, age: float = FORGOTTEN_S) -> None:
        """Remove staged files that were seen here for `age` seconds. The times of the files are not asked, because they
        are of a clock that can be set."""
        now = time.monotonic()
        names = [entry.name for entry in os.scandir(self._staging) if not entry.is_dir(follow_symlinks=False)]
        self._seen = {name: self._seen.get(name, now) for name in names}
        for name, since in self._seen.items():
            if since <= now - age:
                (self._staging / name).unlink(missing_ok=True)  # missing: taken over

    def close(self) -> None:
        """Remove the nonce, so that nothing can be proven with it any more."""
        (self._root / NONCE_FILE).unlink(missing_ok=True)
