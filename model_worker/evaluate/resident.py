"""The memory of this process is read here, where the system says it."""

import os
from pathlib import Path


def resident_bytes() -> int | None:
    """Return the bytes of this process that are in memory now; None where the system does not tell (not Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
