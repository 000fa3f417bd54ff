"""How well texts come back from their memory slots is measured here: losses, accuracy, and what a decoder writes
freely.

Every text has three readers: the frozen model with the text's own slots, with another text's slots, and with none. The
same texts serve all, so differences are paired. EOS is not scored.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.errors import InputError
from model_worker.evaluate.interval import Interval, interval
from model_worker.icae.decode import generate, scores
from model_worker.icae.layout import Row, restore_row
from model_worker.icae.model import Icae
from model_worker.icae.slots import Slots, combine

_LOGITS = 1 << 26  # numbers at a time
_BATCH = 32
_FORCED = ("nats", "right")


@dataclass(frozen=True)
class Reader:
    """The figures of one reader over N texts.

    nats: `[N]` per token, teacher-forced. right: `[N]` share of tokens whose most likely prediction is right. prefix:
    `[N]` share of the text before the first wrong token of a greedy restoration (the paper's EM). exact: `[N]` 1 where
    all of the text is right. bleu: of all texts together (sacrebleu, 0 to 100). The last three are None where nothing
    was written.
    """

    nats: Tensor
    right: Tensor
    prefix: Tensor | None
    exact: Tensor | None
    bleu: float | None


@dataclass(frozen=True)
class Restoration:
    """The restoration of N texts of `tokens` tokens in `slots` slots each.

    own, other, plain: readers with the text's own slots, with another text's, and with none.
    """

    tokens: int
    slots: int
    own: Reader
    other: Reader
    plain: Reader

    @property
    def below_other(self) -> Interval:
        """Return by how many nats per token a text's own slots are better than another text's."""
        return interval(self.other.nats - self.own.nats)

    @property
    def below_plain(self) -> Interval:
        """Return by how many nats per token a text's own slots are better than none."""
        return interval(self.plain.nats - self.own.nats)

    def summary(self) -> dict[str, Any]:
        """Return the figures as plain values: of `own`, `other` and `plain` the means and half widths of 95 %
        intervals.
        """
        readers = {name: _summary(getattr(self, name)) for name in ("own", "other", "plain")}
        return {"tokens": self.tokens, "slots": self.slots, "texts": len(self.own.nats), **readers}


@torch.no_grad()
def restoration(
    icae: Icae, texts: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str], *, parts: int = 1
) -> Restoration:
    """Restore texts of one length. parts: equal pieces that each is encoded in, for so many times the slots.

    The slots of another text are those of the text half the list away. Raises InputError for fewer than two texts, for
    texts of different lengths or shorter than `parts`, and without sacrebleu.
    """
    if len(texts) < 2 or len({len(text) for text in texts}) > 1 or len(texts[0]) < parts:
        raise InputError(f"two texts or more are needed, all of one length of {parts} tokens or more")
    training = icae.training
    icae.eval()
    try:
        slots = [_in_parts(icae, text, parts) for text in texts]
        away = len(texts) // 2
        return Restoration(
            len(texts[0]),
            len(slots[0]),
            _read(icae, texts, slots, decode),
            _read(icae, texts, [*slots[away:], *slots[:away]], decode),
            _read(icae, texts, [None] * len(texts), decode),
        )
    finally:
        icae.train(training)


def _in_parts(icae: Icae, text: Sequence[int], parts: int) -> Slots:
    """Return the slots of a text that is encoded in `parts` pieces of equal length.

    A single part is cut into spans as the adapter itself does.
    """
    bounds = [round(len(text) * part / parts) for part in range(parts + 1)]
    return combine(icae.encode([text[start:end] for start, end in pairwise(bounds)]))


def _read(
    icae: Icae, texts: Sequence[Sequence[int]], slots: Sequence[Slots | None], decode: Callable[[Sequence[int]], str]
) -> Reader:
    length = len(texts[0])
    forced: list[tuple[Tensor, Tensor]] = []
    written: list[list[int]] = []
    starts = _starts(icae, slots)
    for at in _batches(icae, len(texts), length + (0 if slots[0] is None else len(slots[0]))):
        rows = [restore_row(icae, own, text, ends=False) for own, text in zip(slots[at], texts[at], strict=True)]
        forced.append(_forced(icae, rows))
        if starts is not None and (len(starts) > 1 or not written):
            written += generate(icae, starts[at], length)
    nats, right = (torch.cat(column) for column in zip(*forced, strict=True))
    if starts is None:
        return Reader(nats, right, None, None, None)
    if len(starts) == 1:
        written *= len(texts)
    prefix = torch.tensor([_agreeing(own, text) / length for own, text in zip(written, texts, strict=True)])
    return Reader(nats, right, prefix, (prefix == 1).double(), _bleu(written, texts, decode))


def _starts(icae: Icae, slots: Sequence[Slots | None]) -> list[Row] | None:
    """Return the rows that a free restoration begins with.

    Without slots one row serves all texts; None where there is neither a slot nor a BOS to begin with.
    """
    if slots[0] is not None:
        return [restore_row(icae, own, (), ends=False) for own in slots]
    return None if icae.bos is None else [restore_row(icae, None, [icae.bos], ends=False)]


def _forced(icae: Icae, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return nats per scored token and the share of right ones, `[B]` both."""
    logits, labels = scores(icae, rows)
    scored = labels >= 0
    nats = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    right = (logits.argmax(-1) == labels) & scored
    count = scored.sum(-1)
    return (nats.view_as(labels).sum(-1) / count).double().cpu(), (right.sum(-1) / count).double().cpu()


def _batches(icae: Icae, count: int, length: int) -> Iterator[slice]:
    size = max(1, min(_BATCH, _LOGITS // (length * int(icae.decoder.config.vocab_size))))
    for start in range(0, count, size):
        yield slice(start, start + size)


def _agreeing(written: Sequence[int], text: Sequence[int]) -> int:
    """Return the number of tokens before the first difference."""
    for index, token in enumerate(text):
        if index >= len(written) or written[index] != token:
            return index
    return len(text)


def _bleu(
    written: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], decode: Callable[[Sequence[int]], str]
) -> float:
    """Return the BLEU of the corpus by sacrebleu's default (13a, up to 4-grams).

    Raises InputError without sacrebleu.
    """
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise InputError(f"BLEU needs sacrebleu ({error}): pip install 'kvbank[icae]'") from None
    return float(corpus_bleu([decode(ids) for ids in written], [[decode(ids) for ids in texts]]).score)


def _summary(reader: Reader) -> dict[str, Any]:
    found: dict[str, Any] = {"bleu": reader.bleu}
    for name in (*_FORCED, "prefix", "exact"):
        values = getattr(reader, name)
        own = None if values is None else interval(values)
        found |= {name: None if own is None else own.mean, f"{name}_width": None if own is None else own.width}
    return found
