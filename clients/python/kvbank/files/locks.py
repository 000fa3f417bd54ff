"""Locks of files and folders between processes. A lock is of the open descriptor, and ends when that is closed."""

import fcntl


def take(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file or folder without waiting; return False where another process holds a lock that forbids it.

    shared: whether other processes may take a shared lock at the same time. Errors: OSError.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
