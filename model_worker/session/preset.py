"""How a conversation with a model goes best, as its configuration says in the entry `session` of its `kvbank` entry.

A conversation is not read as a book is: what a small model said itself stands in its window, and makes it heed what was
recalled less the longer the window is. So a model may have another window, and other recent chunks, for sessions.
"""

from dataclasses import dataclass
from typing import Any, Self, TypedDict

from model_worker.arguments import whole
from model_worker.errors import InputError

_ENTRY = "the session entry of the model's kvbank entry"


class RecentOption(TypedDict, total=False):
    """The option `recent` of a memory, where it is given."""

    recent: int


@dataclass(frozen=True, slots=True)
class SessionPreset:
    """The window of a session, in tokens, and how many chunks are recent; None for what the model has for all uses."""

    window: int | None = None
    recent: int | None = None

    @classmethod
    def of(cls, model: Any, chunk: int, *, window: int | None = None, recent: int | None = None) -> Self:
        """Return the preset of a model's configuration; `window` and `recent`, where a person gave them, stand instead.

        chunk: tokens of a chunk, below which no window of the preset is. Raises InputError for an entry that makes no
        sense.
        """
        entry = (getattr(model.config, "kvbank", None) or {}).get("session") or {}
        if not isinstance(entry, dict):
            raise InputError(f"{_ENTRY} is no mapping")
        if window is None and "window" in entry:
            window = max(whole(f"window in {_ENTRY}", entry["window"]), chunk)
        if recent is None and "recent" in entry:
            recent = whole(f"recent in {_ENTRY}", entry["recent"], least=0)
        return cls(window, recent)

    @property
    def memory(self) -> RecentOption:
        """Return what of the preset is a setting of the session's memory."""
        return {} if self.recent is None else {"recent": self.recent}
