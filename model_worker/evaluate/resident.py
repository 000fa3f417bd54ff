"""The memory of this process is read here, where the system says it."""

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

_RESET = Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Return the bytes of this process that are in memory now; None where the system does not tell (not Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class ResidentPeak:
    """The most memory of this process while the block runs, above what it had before.

    bytes: after the block; None where the system does not tell (not Linux).
    """

    bytes: int | None = None

    def __enter__(self) -> Self:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc's: what is free already would hide what the block takes
        self._before = resident_bytes()
        with suppress(OSError):
            _RESET.write_text("5", encoding="ascii")  # the peak begins with what there is now: proc(5), clear_refs
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            peak = next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
            if peak is not None and self._before is not None:
                self.bytes = max(0, peak - self._before)
