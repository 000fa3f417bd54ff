"""The queries of a window: when it recalls, and for which tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model_worker.window.memory_port import MemoryPort


class Queries:
    """The last tokens of each row, and how many came in since the last recall.

    memory: says how many tokens a query has, and how often to recall; None for no recall at all.
    """

    def __init__(self, memory: MemoryPort | None):
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """Forget the tokens, and recall for the next ones."""
        self._recent: list[list[int]] = []
        self._since: int | None = None
        self._answered = False  # whether the forward that comes in was recalled for
        self._question: list[list[int]] = []
        self._prompt = 0  # columns to come that belong to the question's prompt

    def ask(self, rows: Sequence[Sequence[int]], prompt: int) -> None:
        """Recall for these tokens of each row, and no others, in every forward of the next `prompt` columns."""
        keep = self._memory.query_tokens if self._memory else 0
        self._question, self._prompt = [list(row)[-keep:] for row in rows], prompt

    @property
    def in_prompt(self) -> bool:
        """Tell whether the tokens that come in next belong to the prompt of a question."""
        return self._prompt > 0

    def due(self, ids: Tensor, valid: Tensor) -> list[list[int]]:
        """Return the query tokens of each row where a recall is due before `ids` `[B, Q]` come in, else an empty list.

        A recall is due at a chunk boundary, and whenever a prompt comes in (more than one token). A prompt speaks for
        itself, as a segment does in MemLong; a few tokens do not, and are asked for with those before them. Where a
        question was asked, its tokens are the query until its prompt has come in.
        """
        memory = self._memory
        if memory is not None and self._prompt:
            return self._question if any(self._question) else []
        if memory is None or not (ids.shape[1] > 1 or self._is_due(memory.cadence)):
            return []
        return self._last(memory, ids, valid)

    def soon(self, ids: Tensor, valid: Tensor, ahead: int) -> list[list[int]]:
        """Return the query tokens of each row as `ids` `[B, 1]` come in, where a recall is due `ahead` tokens behind
        them while text is written, else an empty list. ahead: 0 for never."""
        memory = self._memory
        if memory is None or not ahead or ids.shape[1] > 1 or self._prompt or self._since is None:
            return []
        near = memory.cadence - ahead <= self._since < memory.cadence
        return self._last(memory, ids, valid) if near else []

    def _last(self, memory: MemoryPort, ids: Tensor, valid: Tensor) -> list[list[int]]:
        """Return the last tokens of each row as `ids` `[B, Q]` come in; an empty list where no row has any."""
        queries = []
        for index, past in enumerate(self._recent or [[] for _ in ids]):
            new = ids[index][valid[index]].tolist() if memory.query == "with_input" else []
            enough = len(new) > 1 and 8 * len(new) >= memory.query_tokens
            queries.append((new if enough else past + new)[-memory.query_tokens :])
        return queries if any(queries) else []

    @property
    def due_next(self) -> bool:
        """Tell whether a recall is due before the next token, where that is written and belongs to no prompt."""
        return self._memory is not None and not self._prompt and self._is_due(self._memory.cadence)

    def _is_due(self, cadence: int) -> bool:
        """Tell whether a written token is recalled for. A cadence of 1 means each of them, as in MemLong."""
        return cadence == 1 or self._since is None or self._since >= cadence

    def recalled(self) -> None:
        """Count from here to the next recall; a prompt that was recalled for does not count."""
        self._since, self._answered = 0, True

    def append(self, ids: Tensor, valid: Tensor) -> None:
        """Note tokens that came in; `valid` is false for pads. Both `[B, Q]`."""
        if not (self._answered and ids.shape[1] > 1):
            self._since = (self._since or 0) + ids.shape[1]
        self._answered = False
        self._prompt = max(0, self._prompt - ids.shape[1])
        keep = self._memory.query_tokens if self._memory else 0
        recent = self._recent or [[] for _ in ids]
        self._recent = [(row + ids[i][valid[i]].tolist())[-keep:] if keep else [] for i, row in enumerate(recent)]

    def state(self) -> dict[str, Tensor]:
        """Return what is noted of the first row, by name."""
        recent = torch.tensor(self._recent[0], dtype=torch.long)
        return {"recent": recent, "since_recall": torch.tensor(self._since or 0)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what a `state` noted, for one row."""
        self._recent, self._since = [state["recent"].tolist()], int(state["since_recall"])
