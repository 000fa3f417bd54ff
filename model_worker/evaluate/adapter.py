"""An ICAE adapter is measured here on text that it was not trained on, as `kvbank eval icae` does.

* Restoration of the first tokens of each document, by length at a fixed number of slots a span, and of one span's text
  by the number of slots spent on it. The number of slots an adapter makes of a span is fixed. So a text is given more
  slots as by the paper's multi-span rule, by encoding it in more pieces. An adapter with another number of slots is
  another adapter: measure several and compare.
* Restoration of the same tokens in another order, and of random ones.
* The loss of what follows (continuation.py).

findings.py says which of the paper's findings these figures show.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch

from model_worker.errors import InputError
from model_worker.evaluate.continuation import Continuation, continuation
from model_worker.evaluate.restoration import Restoration, restoration
from model_worker.icae.config import IcaeConfig
from model_worker.icae.model import Icae

PARTS = (1, 2, 4)
CONTENTS = ("natural", "shuffled", "random")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Plan:
    """What is measured, in tokens.

    lengths: of the texts that are restored. span: the length at which the rest is compared. parts: pieces that a span
    is encoded in. contexts: lengths of the text before a continuation. follow, leave: tokens behind a context, and how
    many of them carry no loss.
    """

    lengths: tuple[int, ...]
    span: int
    parts: tuple[int, ...]
    contexts: tuple[int, ...]
    follow: int
    leave: int

    @property
    def document(self) -> int:
        """Return the number of tokens that a document must have."""
        return max(*self.lengths, self.span, *(context + self.follow for context in self.contexts))


@dataclass(frozen=True)
class Evaluation:
    """The figures of one adapter.

    lengths: restorations by length. parts: restorations of one span's text by slots. contents: restorations by content.
    continuations: losses by context.
    """

    lengths: list[Restoration]
    parts: list[Restoration]
    contents: dict[str, Restoration]
    continuations: list[Continuation]

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain values, for JSON."""
        return {
            "restoration_by_length": [own.summary() for own in self.lengths],
            "restoration_by_slots": [own.summary() for own in self.parts],
            "restoration_by_content": {name: own.summary() for name, own in self.contents.items()},
            "continuation": [own.summary() for own in self.continuations],
        }


def plan(icae: Icae, *, follow: int = 64, leave: int = 8, span: int | None = None) -> Plan:
    """Plan lengths from a quarter of `span` to twice `span`, and contexts up to four times `span`.

    span: tokens, by default those of a full span of the adapter. What does not fit the model's positions is left out.
    Raises InputError where nothing is left, or nothing is scored.
    """
    whole = icae.config.capacity if span is None else span
    if whole < 4 or follow <= leave:
        raise InputError("a span of 4 tokens or more is needed, and follow above leave")
    config, limit = icae.config, icae.limit or 1 << 30

    def continued(context: int) -> bool:
        """Return whether the context and what follows fit the model; the last token that follows is not read."""
        return max(1 + context, config.before(context) + config.lm_row) + follow - 1 <= limit

    lengths = tuple(
        n for n in (whole // 4, whole // 2, 3 * whole // 4, whole, 2 * whole) if config.restoring(n) <= limit
    )
    parts = tuple(n for n in PARTS if _in_pieces(config, whole, n) <= limit)
    contexts = tuple(n for n in (whole, 2 * whole, 4 * whole) if continued(n))
    if whole not in lengths or not contexts:
        raise InputError(f"a span of {whole} tokens with its slots does not fit the model's {limit} positions")
    return Plan(lengths, whole, parts, contexts, follow, leave)


def _in_pieces(config: IcaeConfig, tokens: int, parts: int) -> int:
    """Return the positions that the restoration of a text takes which is encoded in equal pieces."""
    bounds = [round(tokens * part / parts) for part in range(parts + 1)]
    return sum(config.before(end - start) for start, end in pairwise(bounds)) + 1 + tokens


def measure(
    icae: Icae,
    documents: Sequence[Sequence[int]],
    what: Plan,
    decode: Callable[[Sequence[int]], str],
    *,
    special: Sequence[int] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure an adapter as planned. documents: `what.document` token ids each.

    decode: ids to text, for BLEU. special: ids that random text avoids. seed: of the other order and of random text.
    progress: called with (measurements done, in all). Raises InputError for documents that are too few or too short.
    """
    if len(documents) < 2 or any(len(ids) < what.document for ids in documents):
        raise InputError(f"two documents or more are needed, each of {what.document} tokens")
    total = len(what.lengths) + len(what.parts) - 1 + len(CONTENTS) - 1 + len(what.contexts)
    done = 0

    def count(made: _T) -> _T:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)
        return made

    def restored(texts: Sequence[Sequence[int]], parts: int = 1) -> Restoration:
        return count(restoration(icae, texts, decode, parts=parts))

    span = [list(ids[: what.span]) for ids in documents]
    by_length = {length: restored([ids[:length] for ids in documents]) for length in what.lengths}
    whole = by_length[what.span]
    parts = [whole, *(restored(span, number) for number in what.parts[1:])]
    shuffled, drawn = _shuffled(span, seed), _random(icae, span, special, seed)
    contents = dict(zip(CONTENTS, (whole, restored(shuffled), restored(drawn)), strict=True))
    continuations = [
        count(continuation(icae, documents, context=context, follow=what.follow, leave=what.leave))
        for context in what.contexts
    ]
    return Evaluation(list(by_length.values()), parts, contents, continuations)


def _shuffled(texts: Sequence[list[int]], seed: int) -> list[list[int]]:
    """Return the texts, each with its own tokens in another order."""
    generator = torch.Generator().manual_seed(seed)
    return [[text[i] for i in torch.randperm(len(text), generator=generator).tolist()] for text in texts]


def _random(icae: Icae, texts: Sequence[list[int]], special: Sequence[int], seed: int) -> list[list[int]]:
    """Return texts of the same lengths, of tokens drawn uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed + 1)
    allowed = torch.tensor(sorted(set(range(int(icae.decoder.config.vocab_size))) - set(special)))
    return [allowed[torch.randint(len(allowed), (len(text),), generator=generator)].tolist() for text in texts]
