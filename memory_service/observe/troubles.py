"""The troubles of the service: what goes wrong, for as long as it does. This file owns the answer to whether the
service can serve at all.

Each trouble has a fixed name, and is logged when it begins and when it is over.
"""

import logging
import threading
from typing import NamedTuple

# The most characters of the text of a trouble.
_LONGEST = 400
_log = logging.getLogger(__name__)


class Trouble(NamedTuple):
    """One thing that goes wrong, as a text for operators. `stops` tells whether nothing can be served meanwhile;
    otherwise one thing, such as writing, does not work, and the rest does."""

    text: str
    stops: bool


class Troubles:
    """Holds the troubles of a service at this moment. Threads may share the object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._troubles: dict[str, Trouble] = {}

    def begin(self, name: str, text: str, *, stops: bool = False, wanted: bool = False) -> None:
        """Note that the trouble of this name is there, or still is.

        text: what goes wrong. stops: whether nothing can be served meanwhile. wanted: whether an operator has asked for
        the trouble, such as a stop, so that it is not logged.
        """
        text = " ".join(text.split())[:_LONGEST]
        with self._lock:
            new = name not in self._troubles
            self._troubles[name] = Trouble(text, stops)
        if new and not wanted:
            _log.warning("%s: %s", name, text)

    def end(self, name: str) -> None:
        """Note that the trouble of this name is over. Costs next to nothing where there was none."""
        if name in self._troubles:
            with self._lock:
                ended = self._troubles.pop(name, None)
            if ended is not None:
                _log.info("%s: well again", name)

    def all(self) -> dict[str, Trouble]:
        """Return the troubles of this moment by name."""
        with self._lock:
            return dict(self._troubles)

    def ready(self) -> bool:
        """Tell whether the service can serve, though perhaps not everything."""
        return not any(trouble.stops for trouble in self.all().values())
