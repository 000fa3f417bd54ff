"""File descriptors of this process. This file owns that connections leave enough of them for files."""

import resource
from contextlib import suppress

from memory_service.domain.limits import STANDARD

# Descriptors that are kept for payloads that are being sent, for the database in each thread, indexes, logs, sockets
# that listen, and direct calls.
_FOR_FILES = STANDARD.open_files + 256
# Connections that are accepted however few descriptors there are.
_FEWEST = 16


def raise_limit() -> None:
    """Let this process have as many descriptors as the system allows; for a process that is a server and nothing
    else."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says that there is no bound, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def for_connections(wanted: int) -> int:
    """Return how many connections to accept, at most `wanted`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(_FEWEST, soft - _FOR_FILES))
