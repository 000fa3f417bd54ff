"""What slots are worth to the text that follows is measured here, as the loss of that text.

Four readers have before it the whole context, the context's slots, as many of its last tokens as there are slots, and
nothing. The following tokens are the same for every reader and every context length, so differences are paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_worker.errors import InputError
from model_worker.evaluate.interval import interval
from model_worker.icae.decode import losses
from model_worker.icae.layout import Row, continue_row
from model_worker.icae.model import Icae

_BATCH, _LOGITS = 32, 1 << 26
READERS = ("full", "slots", "last", "none")


@dataclass(frozen=True)
class Continuation:
    """The losses of N texts in nats per token, `[N]` for each reader.

    full: behind `context` tokens. slots: behind their `budget` slots. last: behind their last `budget` tokens. none:
    behind nothing.
    """

    context: int
    budget: int
    full: Tensor
    slots: Tensor
    last: Tensor
    none: Tensor

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain values: means and half widths of their 95 % intervals."""
        found: dict[str, Any] = {"context": self.context, "slots": self.budget, "texts": len(self.full)}
        for reader in READERS:
            own = interval(getattr(self, reader))
            found |= {f"{reader}_nats": own.mean, f"{reader}_width": own.width}
        return found


@torch.no_grad()
def continuation(
    icae: Icae, documents: Sequence[Sequence[int]], *, context: int, follow: int, leave: int
) -> Continuation:
    """Measure the loss of the last `follow` tokens of each document, given the `context` tokens before.

    The first `leave` of the tokens that follow carry no loss. Raises InputError where the lengths do not fit the
    documents.
    """
    if len(documents) < 2 or any(len(ids) < context + follow for ids in documents) or follow <= leave or context < 1:
        raise InputError("two documents or more are needed, each of context + follow tokens, and follow above leave")
    training = icae.training
    icae.eval()
    found: dict[str, list[Tensor]] = {reader: [] for reader in READERS}
    size = max(1, min(_BATCH, _LOGITS // (follow * int(icae.decoder.config.vocab_size))))
    budget = 0
    try:
        for at in range(0, len(documents), size):
            before = [ids[len(ids) - follow - context : len(ids) - follow] for ids in documents[at : at + size]]
            after = [list(ids[len(ids) - follow :]) for ids in documents[at : at + size]]
            slots = icae.encode(before)
            budget = len(slots[0])
            rows = {
                "full": [_raw(icae, own, ids, leave) for own, ids in zip(before, after, strict=True)],
                "slots": [continue_row(icae, own, ids, leave=leave) for own, ids in zip(slots, after, strict=True)],
                "last": [_raw(icae, own[-budget:], ids, leave) for own, ids in zip(before, after, strict=True)],
                "none": [_raw(icae, (), ids, leave) for ids in after],
            }
            for reader, own in rows.items():
                nats, count = losses(icae, own)
                found[reader].append((nats / count).double().cpu())
    finally:
        icae.train(training)
    return Continuation(context, budget, **{reader: torch.cat(parts) for reader, parts in found.items()})


def _raw(icae: Icae, before: Sequence[int], after: Sequence[int], leave: int) -> Row:
    """Return the row of the frozen model over tokens alone; `leave` more tokens than those before carry no loss."""
    return continue_row(icae, None, [*before, *after], leave=len(before) + leave)
