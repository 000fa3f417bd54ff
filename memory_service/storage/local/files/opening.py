"""How a file of a data folder is opened: no link is followed, and no pipe is waited for at its other end."""

import os


def opener(path: str, flags: int) -> int:
    """Open a file: the argument of this name of `open`. Errors: OSError, with ELOOP for a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
