"""Whether the memory service answers, and when a service that was away is asked again.

This file owns the rule that a lost service does not hold up every token: it is asked again only after a pause, in one
short call, and the pause doubles up to a minute.
"""

import time
import warnings

import kvbank

# Errors that say that the service is away for now, as opposed to those by which it refuses a call.
AWAY = (kvbank.Unavailable, kvbank.DeadlineExceeded, kvbank.DiskFull)
START_S = 3.0  # for a first answer, so that a service that is not there is noticed soon
_LONGEST_PAUSE_S = 60.0


class ServiceLink:
    """One memory's view of its service.

    patience: seconds that one call may take. retry_after: seconds of the first pause.
    """

    def __init__(self, client: kvbank.Client, patience: float, retry_after: float):
        self.client, self.patience = client, patience
        self._retry_after = self._pause = retry_after
        self._retry_at = 0.0  # by the monotonic clock; 0 while the service answers

    @property
    def away(self) -> bool:
        """Tell whether the service did not answer when it was asked last."""
        return self._retry_at > 0

    def lost(self, error: kvbank.ServiceError) -> None:
        """Note, with a warning, that the service is away, and do not ask it again before the pause is over."""
        warnings.warn(f"the memory service is away: {error}", RuntimeWarning, stacklevel=2)
        self.pause_for(self._pause)
        self._pause = min(2 * self._pause, max(_LONGEST_PAUSE_S, self._retry_after))

    def pause_for(self, seconds: float) -> None:
        """Do not ask the service for so many seconds."""
        self._retry_at = time.monotonic() + seconds

    def worth_trying(self) -> bool:
        """Tell whether a call makes sense now: the service answered last, or answers again after its pause."""
        return time.monotonic() >= self._retry_at and (not self.away or self.answers_again(self.patience / 4))

    def answers_again(self, timeout: float) -> bool:
        """Ask a lost service whether it is back, in one call of at most `timeout` seconds."""
        try:
            self.client.server_info(timeout=timeout)
        except kvbank.ServiceError as error:
            self.lost(error)
            return False
        self._retry_at, self._pause = 0.0, self._retry_after
        return True
