"""Server and client prove here that they know the nonce of a data folder, without sending it. The service uses this
file too."""

import hashlib
import hmac
import os
import secrets

from kvbank.v1 import service_pb2

SHORTEST_CHALLENGE, LONGEST_CHALLENGE = 16, 64


def challenge() -> bytes:
    """Make a random number of which a server is to make its proof; it never comes twice."""
    return secrets.token_bytes(32)


def of_server(nonce: bytes, challenge: bytes, folder: service_pb2.SameHost) -> bytes:
    """Make the server's answer to a challenge.

    The answer covers what the server says of its folder, so that it proves nothing about another folder.
    """
    return _proof(nonce, b"server", challenge, folder.path, folder.staging.encode(), folder.socket.encode())


def of_client(nonce: bytes) -> bytes:
    """Make the proof of a client, for a server that has proven itself before."""
    return _proof(nonce, b"client")


def path(folder: os.PathLike[str]) -> tuple[str, bytes]:
    """Return the path of a folder as the message SameHost has it: as text, empty where it is no UTF-8, and as bytes."""
    raw = os.fsencode(folder)
    try:
        return raw.decode(), raw
    except UnicodeDecodeError:
        return "", raw


def _proof(nonce: bytes, *fields: bytes) -> bytes:
    said = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    return hmac.new(nonce, said, hashlib.sha256).digest()
