"""Where things are kept. This file owns the choice of an engine: what is above it knows only the protocols of
`memory_service.storage.base`."""

from memory_service.domain.clock import Clock
from memory_service.domain.limits import NO_PAUSES, STANDARD, Limits, Pauses
from memory_service.observe.metrics import Metrics
from memory_service.settings import Settings
from memory_service.storage.base import DerivedId, Engine
from memory_service.storage.local.engine import LocalEngine, explaining

__all__ = ["explaining", "open_engine"]


def open_engine(
    settings: Settings,
    metrics: Metrics,
    derived_id: DerivedId,
    clock: Clock | None = None,
    *,
    limits: Limits = STANDARD,
    pauses: Pauses = NO_PAUSES,
) -> Engine:
    """Open the engine that the settings ask for: a data folder, which this process owns until the engine is closed.

    The caller tells the followers of the store, begins the engine, and at the end lets it rest and closes it. clock:
    the clock to go by, None for that of the machine. derived_id: where records were lost, ids that are still known
    outside of them are not given again. Errors: StartError.
    """
    return LocalEngine(settings, metrics, derived_id, clock, limits, pauses)
