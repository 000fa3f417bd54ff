"""How a worker calls itself when it takes the lease of a session.

The name says in which process of which machine the worker runs. So a worker that finds a session held by a process of
its own machine that has died need not wait until the lease ends: it asks under the name of the dead one, to which the
service gives the session at once. A lease has an epoch, so that this is safe even where the other one is not dead.
"""

import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def own_holder() -> str:
    """Return a name for one session of this process."""
    return f"{_machine()}:{os.getpid()}:{_started(os.getpid())}:{secrets.token_hex(4)}"


def has_died(holder: str) -> bool:
    """Tell whether a holder was a process of this machine that is no longer there; False where that cannot be known."""
    parts = holder.split(":")
    if len(parts) != 4 or not _started(os.getpid()):
        return False
    machine, pid, started, _ = parts
    return machine == _machine() and pid.isdecimal() and bool(started) and _started(int(pid)) != started


def shown(holder: str) -> str:
    """Return a holder in words for a person: the machine and the process."""
    parts = holder.split(":")
    return f"process {parts[1]} on {parts[0].partition('/')[0]}" if len(parts) == 4 else holder


def _machine() -> str:
    """Return this machine, its start, and the processes that can be seen here (a container has its own)."""
    boot = namespace = ""
    with suppress(OSError):
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = str(os.stat(_PROC / "self/ns/pid").st_ino)
    return "/".join((socket.gethostname().replace(":", "-")[:64], boot, namespace))


def _started(pid: int) -> str:
    """Return when a process was started, in ticks since the machine was; empty where there is none."""
    with suppress(OSError):
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19]
    return ""
