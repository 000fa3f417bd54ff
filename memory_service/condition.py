"""What goes wrong for as long as it does. Owns the answer to whether the service can be asked at all.

Each trouble has a name of ours, and is said when it begins and when it is over. Threads may share this.
"""

import logging
import threading
from typing import NamedTuple

_LONGEST = 200
_log = logging.getLogger(__name__)


class Trouble(NamedTuple):
    """`stops`: nothing can be served meanwhile; else something does not work, such as writing, and the rest does."""

    text: str
    stops: bool


class Condition:
    """The troubles of a service at this moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._troubles: dict[str, Trouble] = {}

    def begin(self, name: str, text: str, *, stops: bool = False, wanted: bool = False) -> None:
        """It goes wrong, or still does. `wanted`: somebody asked for it, so that it is not said."""
        text = " ".join(text.split())[:_LONGEST]
        with self._lock:
            new = name not in self._troubles
            self._troubles[name] = Trouble(text, stops)
        if new and not wanted:
            _log.warning("%s: %s", name, text)

    def end(self, name: str) -> None:
        """It goes well; costs next to nothing where it did before."""
        if name in self._troubles:
            with self._lock:
                ended = self._troubles.pop(name, None)
            if ended is not None:
                _log.info("%s: well again", name)

    def troubles(self) -> dict[str, Trouble]:
        """By name."""
        with self._lock:
            return dict(self._troubles)

    def ready(self) -> bool:
        """Whether the service can be asked."""
        return not any(trouble.stops for trouble in self.troubles().values())
