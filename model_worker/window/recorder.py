"""A recorder notes what a cache recalls and what its layers attend to, forward by forward, and makes a trace of it.

Sums stay on the model's device until a trace is asked for, so that nothing waits for them while text is written.
"""

from collections.abc import Sequence
from typing import Any

from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.window.columns import Columns
from model_worker.window.recalled import Recalled
from model_worker.window.trace import Trace
from model_worker.window.trace_runs import Run, trace_of


class Recorder:
    """What one cache recalled and attended to since the recorder was put on it.

    tokenizer: turns queries, and chunks without a text, into texts. every: of so many tokens that are written in a run,
    one is looked at, the first of them.
    """

    def __init__(self, attachment: Attachment, tokenizer: Any, every: int = 1):
        self._layers, self._tokenizer, self._every = attachment.plan.retrieval_layers, tokenizer, every
        self._runs: list[Run] = []
        self._query: tuple[int, ...] = ()
        self._answered: bool | None = None
        self._asked = False  # whether a recall took place since the last forward
        self._offset = 0

    def recalled(self, rows: Sequence[Sequence[int]], answered: bool) -> None:
        """Note the token ids of a query, and whether the memory answered it."""
        self._query, self._answered, self._asked = tuple(rows[0]), answered, True

    def run(self, recalled: Recalled, columns: Columns, prompt: bool) -> Run | None:
        """Return the run to which the forward belongs that comes in; None where it is not looked at.

        columns: of the window, with the new tokens. prompt: whether these are read, and not written. Raises
        InputError for a batch.
        """
        if columns.rows > 1:
            raise InputError(f"a trace is of one prompt, and this cache follows {columns.rows}")
        tokens = int(columns.valid[0, -columns.newest :].sum())
        last = self._runs[-1] if self._runs else None
        if last is None or self._asked or last.prompt != prompt or last.listed is not recalled.chunks:
            begin = 0 if last is None else last.begin + last.tokens
            self._runs.append(Run(prompt, self._query, self._answered, recalled.chunks, begin))
        self._asked = False
        run = self._runs[-1]
        looks = prompt or run.tokens % self._every == 0
        run.tokens += tokens
        if prompt or len(self._runs) == 1:
            self._offset = int(columns.positions[0, -1]) + columns.origin + 1
        return run if looks else None

    def trace(self) -> Trace:
        """Return what was recorded up to now. Raises InputError where no token came in."""
        whole = [run for run in self._runs if len(run.sums) == len(self._layers)]  # a forward may have failed half-way
        if not whole:
            raise InputError("nothing was recorded: no token came in while the recorder was on the cache")
        return trace_of(whole, self._layers, self._offset, self._decoded)

    def _decoded(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))
