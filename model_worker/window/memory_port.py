"""The port through which a window speaks to a memory; `remember.Memory` has its members."""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from model_worker.window.capture import Captured
from model_worker.window.recalled import RecalledChunk


class MemoryPort(Protocol):
    """A memory as a cache sees it.

    chunk: tokens that leave the window at once. cadence: tokens of text between two recalls. query_tokens: the last
    tokens that a recall is made for. query: `with_input` where these may be the ones that just come in, else `past`.
    recent: the last chunks that left a row's window and are attended to always.
    """

    chunk: int
    cadence: int
    query_tokens: int
    query: str
    recent: int

    @property
    def needs_queries(self) -> bool:
        """Tell whether queries of memory layers are to be captured too."""

    def remember(self, rows: Sequence[Captured | None]) -> Sequence[RecalledChunk | None] | None:
        """Keep what left the local window; one entry a batch row.

        Returns the chunks as they are stored where `recent` asks for them, whether the bank has them already or not.
        """

    def recall(
        self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None
    ) -> list[list[RecalledChunk]] | None:
        """Return chunks for each row, in the order of attention; None to go on with what was recalled before.

        without: chunks of each row that are attended to anyway, and are not returned.
        """


Answer = Callable[[], list[list[RecalledChunk]] | None]
"""Waits until a recall is answered, and returns what `MemoryPort.recall` returns, or raises what that raises."""

Begun = Future[list[list[RecalledChunk]] | None]
"""A recall that another thread makes, whose result is what `MemoryPort.recall` returns or raises."""


@runtime_checkable
class AskedAhead(MemoryPort, Protocol):
    """A memory that may be asked before a recall is due. ahead: so many tokens of text before; 0: when it is due."""

    ahead: int

    def ask(self, rows: Sequence[Sequence[int]], without: Sequence[Collection[RecalledChunk]] | None = None) -> Begun:
        """Begin a recall in another thread, and return it. rows, without: as in `recall`."""
