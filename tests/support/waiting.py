"""Waiting for what another thread or process does, without knowing how long that takes."""

import time
from collections.abc import Callable

# Between two looks: short beside anything that is waited for, long beside a look.
PAUSE_S = 0.005


def wait_until(holds: Callable[[], object], why: str = "", seconds: float = 60.0) -> None:
    """Wait until `holds` says so, and ask it again and again. After so many seconds this fails, and says `why`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why
        time.sleep(PAUSE_S)
