"""Services of this process have their sockets in folders of their own, in the folder for temporary files.

This file owns the rule that no such folder is left for good. A process that was killed removes nothing, so the next
process removes the folders that no living process has locked.
"""

import atexit
import fcntl
import os
import re
import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

_NAME = re.compile(r"kvbank-[a-z0-9_]{8}")
SOCKET = "socket"
# Between the making of a folder and its lock.
_YOUNG_S = 60.0


def made(parent: str, stack: ExitStack) -> str:
    """Return a new folder that only this user may enter; `stack` or the end of the process removes it.

    Errors: OSError.
    """
    sweep(parent)
    folder = tempfile.mkdtemp(prefix="kvbank-", dir=parent)
    # Not tempfile.TemporaryDirectory, which a forked child removes at its end.
    remove = partial(_remove, folder, os.getpid())
    atexit.register(remove)
    stack.callback(atexit.unregister, remove)
    stack.callback(remove)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return folder


def sweep(parent: str) -> None:
    """Remove the folders of processes that are gone. A folder with other things in it is none of these."""
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _sweep(Path(entry.path))


def _sweep(folder: Path) -> None:
    found = folder.lstat()
    if found.st_uid != os.geteuid() or abs(time.time() - found.st_mtime) < _YOUNG_S:
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if set(os.listdir(folder)) <= {SOCKET}:
            (folder / SOCKET).unlink(missing_ok=True)
            folder.rmdir()
    finally:
        os.close(descriptor)


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
