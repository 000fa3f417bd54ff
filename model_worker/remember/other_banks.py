"""Banks that a memory recalls from besides its own: they are read, and never written to.

This file owns the rule that a bank which goes away ends no conversation: it is told of in one line, and left out from
then on. What may pass, such as a damaged chunk, leaves the bank out of one recall.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

import kvbank
from model_worker.attachment.attachment import Attachment
from model_worker.embed import Embedder
from model_worker.errors import BankMismatch
from model_worker.remember.opening import readable_bank
from model_worker.remember.recalling import Ranking
from model_worker.remember.service_link import AWAY
from model_worker.window.recalled import RecalledChunk

# Errors after which a bank is not asked again: it is gone, of another model or embedder by now, or not the caller's.
_GONE = (kvbank.BankNotFound, kvbank.FailedPrecondition, kvbank.PermissionDenied)
# Asks a bank for the rows of a batch by vectors of an embedder.
Ask = Callable[[str, Embedder, list[int]], list[Ranking]]


class OtherBanks:
    """The other banks of one memory, each with the form of the memory's embedder by which it is searched."""

    def __init__(self, client: kvbank.Client, attachment: Attachment):
        self._client, self._attachment = client, attachment
        self._embedders: dict[str, Embedder] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the banks that are read."""
        return tuple(self._embedders)

    def take(self, names: Iterable[str], embedder: Embedder) -> None:
        """Read these banks from now on, and no others; those that cannot be read are told of and left out.

        embedder: of the memory. Raises kvbank.Unavailable and alike where the service does not say.
        """
        self._embedders = {}
        for name in names:
            try:
                self._embedders[name] = readable_bank(self._client, name, self._attachment, embedder)
            except AWAY:
                raise
            except (BankMismatch, kvbank.ServiceError) as error:
                _tell(f"bank {name!r} is not read: {error}")

    def rankings(
        self, vectors_of: Callable[[Embedder], NDArray[np.float32]], ask: Ask
    ) -> Iterator[tuple[int, Ranking]]:
        """Yield what each bank has for a row of the batch, with the row.

        vectors_of: gives the queries of an embedder, `[B, dimension]`. ask: see `Ask`. Raises what `ask` raises where
        the service is away.
        """
        for name, embedder in list(self._embedders.items()):
            rows = np.flatnonzero(vectors_of(embedder).any(axis=1)).tolist()
            if not rows:
                continue
            try:
                found = ask(name, embedder, rows)
            except AWAY:
                raise
            except _GONE as error:
                del self._embedders[name]
                _tell(f"bank {name!r} is not read any more: {error}")
                continue
            except kvbank.ServiceError as error:
                _tell(f"nothing was recalled from bank {name!r}: {error}")
                continue
            for row, ranking in zip(rows, found, strict=True):
                yield row, replace(ranking, chunks=[self._placed(chunk) for chunk in ranking.chunks])

    def _placed(self, chunk: RecalledChunk) -> RecalledChunk:
        """Return a chunk where the conversation can see it: with positions `original`, just before its first token.

        Offsets of another text would put the chunk in the middle of this one, or behind it. All other positions do not
        depend on offsets.
        """
        if self._attachment.plan.positions != "original":
            return chunk
        back = chunk.start + len(chunk.token_ids)
        layers = {layer: (keys, values, offsets - back) for layer, (keys, values, offsets) in chunk.layers.items()}
        return replace(chunk, layers=layers)


def _tell(what: str) -> None:
    warnings.warn(what, RuntimeWarning, stacklevel=3)
