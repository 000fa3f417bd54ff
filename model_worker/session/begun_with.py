"""What a session was begun with, as it stands in the settings of the session in the service.

The settings of a session are texts. This file owns how they are read and written; what is empty is left out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

from model_worker.errors import SessionError


@dataclass(frozen=True, slots=True)
class BegunWith:
    """What any worker needs to go on with a session; all of it is fixed when the session begins.

    chunk: tokens of a chunk; it is fixed so that a chunk which is written again begins where it began before. model:
    the name that the model was loaded by. sinks: how many of the first tokens stay for good. system: the system prompt,
    which stands before the first turn; empty for none. embed: how the embedder of the bank is called. adapter: the
    folder of the model's adapter; empty for none. Names that were not told are empty too.
    """

    chunk: int
    model: str = ""
    sinks: int = 0
    system: str = ""
    embed: str = ""
    adapter: str = ""

    @classmethod
    def of(cls, settings: Mapping[str, str], session: str) -> Self:
        """Return what settings say. session: its name, for the error. Raises SessionError where no worker wrote
        them."""
        found = {field.name: settings[field.name] for field in fields(cls) if field.name in settings}
        try:
            numbers = {name: int(found.pop(name)) for name in ("chunk", "sinks") if name in found}
            return cls(**found, **numbers)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise SessionError(
                f"session {session!r} has no settings of a worker: they do not say how long a chunk is"
            ) from None

    @property
    def settings(self) -> dict[str, str]:
        """Return the settings of a session that say this."""
        return {name: str(value) for name, value in asdict(self).items() if value not in ("", 0)}
