"""What `connect` takes is told apart here: the name of a folder, or the address of a server."""

import os
import re
from pathlib import Path

from kvbank._arguments import expected, plain, text
from kvbank._exceptions import InvalidArgument
from kvbank.wire import addresses

_TARGETS = "host:port, unix:PATH or a folder such as ./memory"
_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:,\[\]]+):(?P<port>\d{1,5})")


def parse_target(target: str | os.PathLike[str]) -> str | Path:
    """Tell a folder from an address: return a folder as `Path`, an address as `str`.

    The first of these forms that fits counts: a path object is a folder; "unix:PATH", "dns:...", "ipv4:..." and
    "ipv6:..." are addresses; a string with a path separator, "." or "..", or the name of an existing folder is a
    folder; "host:port" is an address, and "host:port,host:port" are several of one service.
    Errors: InvalidArgument for anything else.
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
        return checked_address("target", target)
    if "/" in target or os.sep in target or target in (".", "..") or (target and _is_folder(Path(target))):
        return _folder(Path(target))
    for address in target.split(","):
        match = _HOST_PORT.fullmatch(address)
        if match is None:
            raise _bad_target(target, "it has no port" if re.fullmatch(r"[\w.-]+", address) else "it is none of these")
        if not 0 < int(match["port"]) < 65536:
            raise _bad_target(target, "ports are 1 to 65535")
    return checked_address("target", target)


def each_address(address: str) -> list[str]:
    """Return the addresses of a list "host:port,host:port"; any other address alone."""
    parts = address.split(",")
    return parts if all(map(_HOST_PORT.fullmatch, parts)) else [address]


def checked_address(field: str, address: object) -> str:
    """Check an address, and return it. The path of a unix socket may have bytes that are no UTF-8. Errors:
    InvalidArgument."""
    checked = _characters(field, address)
    if not checked or "\0" in checked:
        raise expected(field, "an address", checked)
    return checked


def _characters(field: str, address: object) -> str:
    if isinstance(address, str) and address.startswith(addresses.SCHEME):
        return plain(address)
    return text(field, address)


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
