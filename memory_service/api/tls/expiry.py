"""The end of a certificate is told before it comes. This file owns when: in the log at 30, 7 and 1 days before it and
after it, for /readyz from 30 days on, and in a metric at all times.
"""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from memory_service.api.tls.identity import Identity, moment
from memory_service.api.tls.serving import Tls
from memory_service.observe.metrics import Metrics

# The name of the trouble for a certificate that expires soon.
_SOON = "tls-expiry"
_DAYS = (0, 1, 7, 30)
_log = logging.getLogger(__name__)


class Expiry:
    """Tells when the certificate in service expires."""

    def __init__(self, tls: Tls, metrics: Metrics, every: float) -> None:
        """Begin to count down in the metrics. every: seconds between two looks at the files."""
        self._tls, self._troubles, self._every = tls, metrics.troubles, every
        # The least number of days that was told of the certificate that expires then.
        self._told: tuple[datetime, int] | None = None
        metrics.count_down(lambda: _left(tls.identity).total_seconds())

    async def watch(self) -> None:
        """Look at the files now and again, so that what is wrong with them is told before anybody connects."""
        while True:
            await asyncio.to_thread(self.tell)
            await asyncio.sleep(self._every)

    def tell(self) -> None:
        """Look at the files, and tell of the end of the certificate in service where that is near."""
        identity = self._tls.look()
        left = _left(identity)
        days = next((days for days in _DAYS if left <= timedelta(days)), None)
        if days is None:
            self._troubles.end(_SOON)
            return
        text = f"the certificate {_ends(left)} {moment(identity.expires)}"
        self._troubles.begin(_SOON, text, wanted=True)  # wanted: it is logged here, at each of the days
        if self._told is None or self._told[0] != identity.expires or days < self._told[1]:
            _log.log(logging.ERROR if days == 0 else logging.WARNING, "%s", text)
            self._told = identity.expires, days


def _left(identity: Identity) -> timedelta:
    return identity.expires - datetime.now(UTC)


def _ends(left: timedelta) -> str:
    if left <= timedelta():
        return "has expired, on"
    return f"expires in {left.days} days, on" if left.days else "expires in less than a day, on"
