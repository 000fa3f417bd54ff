"""The sequences that the decoder reads: slots, trained rows and tokens in the order of each task, with labels.

| task | sequence | scored |
|---|---|---|
| restore (`ae`) | slots, AE, text, EOS | text, EOS |
| continue (`lm`) | slots, LM where the adapter says so, continuation | continuation after its first `leave` tokens |
| answer (`ft`) | prefix, slots, FT, prompt, suffix, answer, EOS | answer, EOS |
| no slots | BOS, text (, EOS after `ae`) | text (after `leave` for `lm`), EOS |

With the interface `kv` the slots are no part of the sequence: their K-V stand before it, also before a prefix, and its
positions go on behind them. A model without EOS ends nothing; one without BOS begins with the text, whose first token
then has nothing that predicts it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_worker.errors import InputError
from model_worker.icae.model import Icae
from model_worker.icae.slots import Slots

UNSCORED = -100
LEAVE = 8  # first tokens of a continuation that carry no loss, as in the authors' code


@dataclass(frozen=True)
class Row:
    """One sequence that the decoder reads.

    embeds: `[T, d]`. labels: `[T]` long, token ids, -100 where nothing is scored; the label of t is predicted at t - 1,
    that of 0 by nothing: it is never scored.
    start: position of the first embedding. memory: K-V that stand before it, layer -> (keys `[Hkv, R, D]` before RoPE,
    values), at `places` `[R]`; empty unless the interface is `kv`.
    """

    embeds: Tensor
    labels: Tensor
    start: int
    memory: Mapping[int, tuple[Tensor, Tensor]]
    places: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def restore_row(icae: Icae, slots: Slots | None, ids: Sequence[int], *, ends: bool = True) -> Row:
    """Lay out the task `ae`. ends: whether EOS follows (not where a restoration only begins)."""
    tail = _eos(icae) if ends else []
    if slots is None:
        return _plain(icae, ids, tail, 0)
    return _row(icae, slots, [], [icae.row("ae")], list(ids) + tail, len(ids) + len(tail))


def continue_row(icae: Icae, slots: Slots | None, ids: Sequence[int], *, leave: int = LEAVE) -> Row:
    """Lay out the task `lm`: `ids` follow the context of the slots. leave: how many of them carry no loss."""
    if slots is None:
        return _plain(icae, ids, [], leave)
    first = [icae.row("lm")] if icae.config.lm_row else []
    return _row(icae, slots, [], first, list(ids), max(len(ids) - leave, 0))


def answer_row(
    icae: Icae, slots: Slots, prompt: Sequence[int], answer: Sequence[int] = (), *, ends: bool = True
) -> Row:
    """Lay out the task `ft`, with the adapter's prefix and suffix. ends: whether EOS follows the answer."""
    asked, answered = [*prompt, *icae.config.suffix_ids], [*answer, *(_eos(icae) if ends else [])]
    return _row(icae, slots, icae.config.prefix_ids, [icae.row("ft")], asked + answered, len(answered))


def _row(icae: Icae, slots: Slots, prefix: Sequence[int], rows: list[Tensor], ids: list[int], scored: int) -> Row:
    """Lay out prefix, slots, trained `rows` and `ids`, of which the last `scored` carry a loss.

    Raises InputError for slots of the adapter's other interface, and where nothing is to be read.
    """
    if (slots.soft is None) != (icae.config.interface == "kv"):
        raise InputError(f"these slots are not of this adapter's interface, {icae.config.interface}")
    soft = [] if slots.soft is None else [slots.soft.to(device=icae.device, dtype=icae.dtype)]
    embeds = torch.cat([icae.embed(list(prefix)), *soft, *(row[None] for row in rows), icae.embed(ids)])
    if not len(embeds):
        raise InputError("there is nothing to go on from: give a token, or train the adapter with lm_row")
    labels = torch.full((len(embeds),), UNSCORED, device=icae.device)
    if scored:
        labels[-scored:] = torch.tensor(ids[-scored:], device=icae.device)
    labels[0] = UNSCORED  # nothing predicts it
    if slots.layers is None:
        return Row(embeds, labels, 0, {}, torch.empty(0, dtype=torch.long, device=icae.device))
    return Row(embeds, labels, slots.next_position, slots.layers, slots.positions.to(icae.device))


def _plain(icae: Icae, ids: Sequence[int], tail: list[int], leave: int) -> Row:
    """Lay out BOS, `ids` and `tail` for the frozen base without a memory: what slots are compared with."""
    bos = [] if icae.bos is None or list(ids[:1]) == [icae.bos] else [icae.bos]
    whole = [*bos, *ids, *tail]
    labels = torch.tensor(whole, device=icae.device)
    labels[: max(len(bos) + leave, 1)] = UNSCORED
    return Row(icae.embed(whole), labels, 0, {}, torch.empty(0, dtype=torch.long, device=icae.device))


def _eos(icae: Icae) -> list[int]:
    """Return the id that ends a text, where the model has one."""
    return [] if icae.eos is None else [icae.eos]
