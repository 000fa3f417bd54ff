"""Waiting for what another thread or process does, without knowing how long that takes."""

import time
from collections.abc import Callable

# Between two looks: short beside anything that is waited for, long beside a look.
PAUSE_S = 0.005


def wait_until(holds: Callable[[], object], why: str = "", seconds: float = 60.0) -> None:
    """Until `holds` says so, asked again and again. Fails, and says `why`, after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, why
        time.sleep(PAUSE_S)
