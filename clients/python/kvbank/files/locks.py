"""Processes lock files and folders against each other here. A lock belongs to an open descriptor, and ends when the
descriptor is closed."""

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
