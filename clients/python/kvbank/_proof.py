"""Proofs that somebody knows the nonce of a data folder, without the nonce. The service uses this file too."""

import hashlib
import hmac
import os
import secrets

from kvbank.v1 import service_pb2

SHORTEST_CHALLENGE, LONGEST_CHALLENGE = 16, 64


def challenge() -> bytes:
    """What a server is to make its proof of; never the same twice."""
    return secrets.token_bytes(32)


def of_server(nonce: bytes, challenge: bytes, folder: service_pb2.SameHost) -> bytes:
    """The server's answer to a challenge. It covers what the server says of its folder, so that nobody can hand it on
    with another folder."""
    return _proof(nonce, b"server", challenge, folder.path, folder.staging.encode(), folder.socket.encode())


def of_client(nonce: bytes) -> bytes:
    """What a client says of itself to a server that has proven the same."""
    return _proof(nonce, b"client")


def path(folder: os.PathLike[str]) -> tuple[str, bytes]:
    """The path of a folder as SameHost has it: for people, and as the system has it."""
    raw = os.fsencode(folder)
    try:
        return raw.decode(), raw
    except UnicodeDecodeError:
        return "", raw


def _proof(nonce: bytes, *fields: bytes) -> bytes:
    said = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
    return hmac.new(nonce, said, hashlib.sha256).digest()
