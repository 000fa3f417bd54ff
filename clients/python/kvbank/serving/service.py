"""The memory service behind a server of HTTP is checked here.

This file owns the rule that no caller of such a server becomes the owner of a store: it stands in front of a service
that tells its callers apart, and of no folder.
"""

import shlex
from contextlib import suppress
from pathlib import Path

import kvbank
from kvbank.console.ending import USAGE, Failed


def service_address(memory: str) -> str:
    """Return the address of the memory service. Raises Failed for a folder and for a unix socket."""
    target = kvbank.parse_target(memory)
    if isinstance(target, Path):
        raise Failed(
            f"--memory {memory} is a folder, and a server of HTTP needs a service: kvbank serve --data "
            f"{shlex.quote(memory)} --listen 127.0.0.1:7400, then --memory 127.0.0.1:7400",
            USAGE,
        )
    if target.startswith("unix:"):
        raise Failed(
            f"--memory {memory} is a unix socket, on which every caller of this server would be the owner of the "
            "store: let the service listen on HOST:PORT",
            USAGE,
        )
    return target


def check_asks_for_keys(target: str) -> None:
    """Refuse a service that asks for no key, for a server that others can reach. Raises Failed."""
    with kvbank.connect(target) as client, suppress(kvbank.Unauthenticated):
        client.server_info()
        raise Failed(
            f"the service at {target} asks for no key, so whoever reaches this server would be the owner of its store: "
            "make a key first (kvbank key create), listen on 127.0.0.1, or allow it by --insecure"
        )
