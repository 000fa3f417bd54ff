"""Connections of callers who speak no protocol, or a broken one: bytes at random, HTTP/2, TLS and HTTP/1.1 that are
cut, changed, or full of characters that mean something to a terminal."""

import random
import socket
import struct
from collections.abc import Callable, Sequence

# What nothing that is logged may have in it as it is.
ESCAPE = "\x1b[31mkvbank\x1b[0m"
SECONDS = 60
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
# The kinds of frames of HTTP/2, and one that there is not.
_KINDS = range(11)
_HELLO = bytes.fromhex("16030100c8010000c40303")


def _noise(choose: random.Random) -> bytes:
    return choose.randbytes(choose.choice((0, 1, 9, 100, 5000)))


def _http2(choose: random.Random) -> bytes:
    """Make the beginning of a connection of gRPC, and frames behind it whose lengths, flags and streams are chosen."""
    frames = b""
    for _ in range(choose.randint(0, 5)):
        body = choose.choice((b"", choose.randbytes(4), choose.randbytes(60), ESCAPE.encode(), _headers(choose)))
        length = len(body) if choose.random() < 0.8 else choose.choice((0, 1, 2**14 + 1, 2**24 - 1))
        kind, flags = choose.choice(_KINDS), choose.choice((0, 1, 4, 5, 255))
        frames += (
            struct.pack(">I", length)[1:] + bytes((kind, flags)) + struct.pack(">I", choose.choice((0, 1, 3, 2**31)))
        )
        frames += body
    return _PREFACE + choose.choice((b"", _SETTINGS)) + frames


def _headers(choose: random.Random) -> bytes:
    """Make a block of headers, as literals that are not indexed."""
    named = [(":method", "POST"), (":scheme", "http"), (":path", choose.choice(("/", f"/{ESCAPE}", "/a/b" * 999)))]
    named += [("te", "trailers"), ("content-type", "application/grpc"), ("authorization", f"Bearer {ESCAPE}")]
    block = b""
    for name, value in choose.sample(named, choose.randint(1, len(named))):
        block += b"\0" + _text(name.encode()) + _text(value.encode())
    return block


def _text(text: bytes) -> bytes:
    length, rest = min(len(text), 127), len(text) - 127
    more = b""
    while rest >= 128:
        more, rest = more + bytes((rest & 127 | 128,)), rest >> 7
    return bytes((length,)) + (more + bytes((rest,)) if length == 127 else b"") + text


def _tls(choose: random.Random) -> bytes:
    """Make the beginning of a handshake, with a name of a server that a terminal would obey."""
    return _HELLO + choose.randbytes(32) + ESCAPE.encode() + choose.randbytes(choose.choice((0, 50, 150)))


def _http1(choose: random.Random) -> bytes:
    """Make a request of HTTP/1.1."""
    method = choose.choice(("GET", "POST", "PRI", ESCAPE, "G" * 9000))
    path = choose.choice(("/metrics", "/healthz", "/", f"/{ESCAPE}", "/../../etc/passwd", "/%00%1b", "/" + "a" * 9000))
    lines = [f"{method} {path} {choose.choice(('HTTP/1.1', 'HTTP/1.0', 'HTTP/9.9', ESCAPE, ''))}"]
    header = (
        "Host: a",
        f"Authorization: Bearer {ESCAPE}",
        "Content-Length: -1",
        "Transfer-Encoding: chunked",
        "no colon",
    )
    lines += [choose.choice(header) for _ in range(choose.choice((0, 1, 3, 300)))]
    return choose.choice(("\r\n", "\n")).join((*lines, "", "")).encode()


_MADE: Sequence[Callable[[random.Random], bytes]] = (_noise, _http2, _tls, _http1)


def greet(address: str, connections: int, seed: int) -> None:
    """Connect so often to HOST:PORT, each time with other bytes, some of which are cut, and leave: at once, or when the
    server has said all that it has to say."""
    host, _, port = address.rpartition(":")
    for number in range(seed, seed + connections):
        choose = random.Random(number)
        sent = choose.choice(_MADE)(choose)
        if choose.random() < 0.3:
            sent = sent[: choose.randrange(len(sent) + 1)]
        with socket.create_connection((host.strip("[]"), int(port)), SECONDS) as connection:
            try:
                _speak(connection, sent, stays=choose.random() < 0.5)
            except OSError as error:  # the server has closed its end, which it may
                if isinstance(error, TimeoutError):
                    raise


def _speak(connection: socket.socket, sent: bytes, *, stays: bool) -> None:
    connection.sendall(sent)
    if stays:
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


def free_address() -> str:
    """Return a HOST:PORT at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"127.0.0.1:{found.getsockname()[1]}"


def unescaped(log: str) -> list[str]:
    """Return the lines of a log that have characters in them which a terminal would obey."""
    return [repr(line) for line in log.split("\n") if not line.replace("\t", "").isprintable() and line]
