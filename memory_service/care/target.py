"""What a backup is made in, be it a folder or a bucket."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from memory_service.care.transfer import Destination


class Target(NamedTuple):
    """A backup in the making: the folder in which its records are put together, where its payloads are brought to, and
    what makes it whole when both are there, with the manifest among the records."""

    partial: Path
    payloads: Destination
    finish: Callable[[], None]
