"""The frozen decoder over slots: losses, logits and greedy texts.

They are computed in padded batches with masks and positions; sequences are those of layout.py. This file owns the rule
that nothing is read beyond the positions that the model was made for: everything here raises InputError there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model_worker.attachment.attention import RetrievedKV
from model_worker.attachment.hf_caches import DynamicCache
from model_worker.attachment.model_parts import evaluating
from model_worker.attachment.view import ForwardView
from model_worker.errors import InputError
from model_worker.icae.layout import LEAVE, Row, answer_row, continue_row, restore_row
from model_worker.icae.model import Icae
from model_worker.icae.slots import Slots, combine

NEW_TOKENS = 512  # as in the authors' code


def restore(icae: Icae, slots: Slots, *, max_new_tokens: int | None = None) -> list[int]:
    """Restore the text of the slots, greedily, without EOS; by default at most as long as the source."""
    return generate(icae, [restore_row(icae, slots, (), ends=False)], max_new_tokens or slots.tokens + 1)[0]


def continue_(icae: Icae, slots: Slots, ids: Sequence[int] = (), *, max_new_tokens: int | None = None) -> list[int]:
    """Write what follows the slots' context and `ids`, greedily, without EOS; by default 512 tokens, or what fits."""
    row = continue_row(icae, slots, ids)
    return generate(icae, [row], max_new_tokens or _room(icae, row))[0]


def answer(
    icae: Icae, several: Sequence[Slots], prompt: Sequence[int], *, max_new_tokens: int | None = None
) -> list[int]:
    """Answer `prompt` from several contexts, in this order, greedily, without EOS; as long as `continue_` writes."""
    row = answer_row(icae, combine(several), prompt, ends=False)
    return generate(icae, [row], max_new_tokens or _room(icae, row))[0]


def loss(icae: Icae, slots: Slots | None, ids: Sequence[int], objective: str = "ae", *, leave: int = LEAVE) -> Tensor:
    """Compute the nats per scored token of `ids` given the slots, or given nothing; a scalar, differentiable.

    objective: `ae` (they are the slots' own text) or `lm` (they follow it; the first `leave` are not scored).
    """
    if objective == "ae":
        row = restore_row(icae, slots, ids)
    elif objective == "lm":
        row = continue_row(icae, slots, ids, leave=leave)
    else:
        raise InputError(f"objective {objective!r} is not ae or lm")
    totals, counts = losses(icae, [row])
    if not counts[0]:
        raise InputError(f"{len(ids)} tokens leave none to score")
    return totals[0] / counts[0]


def losses(icae: Icae, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Compute sum of nats and number of scored tokens of each row, `[B]` both; differentiable, the sum in float32."""
    nats, scored = token_losses(icae, rows)
    return nats.sum(-1), scored.sum(-1)


def token_losses(icae: Icae, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Compute the nats of each label and whether it is scored, `[B, t]`, aligned at the end of each row.

    t covers all scored labels.
    """
    out, labels = scores(icae, rows)
    nats = nn.functional.cross_entropy(out.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return nats.view_as(labels), labels >= 0


def scores(icae: Icae, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Compute logits `[B, t, V]` and the labels `[B, t]` that they predict, aligned at the end of each row.

    t covers all scored labels.
    """
    _check_fits(icae, rows, -1)
    labels = _left([row.labels for row in rows], -100)[:, 1:]
    scored = (labels >= 0).any(0).nonzero()
    keep = labels.shape[1] - int(scored[0]) if len(scored) else 1
    keep = min(keep, labels.shape[1])
    # Only what is scored goes through the head; the last position predicts nothing.
    return _forward(icae, rows, keep + 1)[:, :-1], labels[:, labels.shape[1] - keep :]


def logits(icae: Icae, rows: Sequence[Row]) -> list[Tensor]:
    """Compute the logits `[T, V]` of each row, at every position."""
    _check_fits(icae, rows, 0)
    found = _forward(icae, rows, 0)
    return [own[len(own) - len(row) :] for own, row in zip(found, rows, strict=True)]


@torch.no_grad()
def generate(icae: Icae, rows: Sequence[Row], max_new_tokens: int) -> list[list[int]]:
    """Continue each row greedily until EOS, which is left out, or `max_new_tokens`."""
    _check_fits(icae, rows, max_new_tokens - 1)
    with evaluating(icae.decoder):
        return list(_greedy(icae, rows, max_new_tokens))


def _check_fits(icae: Icae, rows: Sequence[Row], more: int) -> None:
    """Raise InputError where a row and `more` tokens behind it go beyond the model's positions.

    more: -1 where the last token of a row is predicted, and never read.
    """
    needed = max(row.start + len(row) for row in rows) + more
    if icae.limit is not None and needed > icae.limit:
        raise InputError(
            f"slots and text need {needed} positions, this model has {icae.limit}: take fewer or shorter contexts, a "
            "shorter text, or fewer new tokens"
        )


def _room(icae: Icae, row: Row) -> int:
    """Return how many tokens are written by default: the authors' number, or what the model's positions hold."""
    return NEW_TOKENS if icae.limit is None else max(1, min(NEW_TOKENS, icae.limit - row.start - len(row) + 1))


# -- batches ------------------------------------------------------------------------------------------------------


def _forward(icae: Icae, rows: Sequence[Row], keep: int, **more: Any) -> Tensor:
    """Run the decoder over rows padded on the left, and return the logits of the last `keep` positions (0: of all)."""
    embeds = _left([row.embeds for row in rows], 0.0)
    mask, positions = _places(rows, embeds.device)
    given = {"use_cache": False, **more} if "kvbank" in more else {"use_cache": False, **_memory(icae, rows), **more}
    found: Tensor = icae.decoder(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=keep,
        return_dict=True,
        **given,
    ).logits
    return found


def _places(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mask and positions of rows padded on the left, `[B, T]` both."""
    mask = _left([torch.ones(len(row), dtype=torch.long, device=device) for row in rows], 0)
    starts = torch.tensor([row.start for row in rows], device=device)[:, None]
    return mask, (mask.cumsum(-1) - 1).clamp(min=0) + starts


def _left(tensors: Sequence[Tensor], value: float) -> Tensor:
    """Stack rows of different lengths as one tensor, padded in front with `value`."""
    longest = max(len(t) for t in tensors)
    return torch.stack(
        [
            torch.cat([t.new_full((longest - len(t), *t.shape[1:]), value), t]) if len(t) < longest else t
            for t in tensors
        ]
    )


def _memory(icae: Icae, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the forward's keyword by which attention sees the K-V of the rows' slots at their positions, if any."""
    if not any(row.memory for row in rows):
        return {}
    places = _left([row.places for row in rows], 0)
    valid = _left([torch.ones_like(row.places, dtype=torch.bool) for row in rows], False)
    retrieved = {}
    for layer, rope in icae.reader.ropes.items():
        like = next(row.memory[layer][0] for row in rows if row.memory).to(device=icae.device, dtype=icae.dtype)
        nothing = like.new_zeros(like.shape[0], 0, like.shape[2])
        own = [row.memory[layer] if row.memory else (nothing, nothing) for row in rows]
        keys, values = (
            _left([pair[side].transpose(0, 1).to(like) for pair in own], 0.0).transpose(1, 2) for side in (0, 1)
        )
        retrieved[layer] = RetrievedKV(rope.rotate(keys, places), values, None if bool(valid.all()) else valid)
    return {"kvbank": ForwardView(retrieved)}


def _greedy(icae: Icae, rows: Sequence[Row], max_new_tokens: int) -> Iterator[list[int]]:
    """Yield the greedy continuation of each row, as `generate` describes it."""
    given = {"past_key_values": DynamicCache(config=icae.decoder.config), "use_cache": True, **_memory(icae, rows)}
    out = _forward(icae, rows, 1, **given)[:, -1]
    mask, positions = _places(rows, out.device)
    at = positions[:, -1:]
    texts: list[list[int]] = [[] for _ in rows]
    going = [True] * len(rows)
    for step in range(1, max_new_tokens + 1):
        best = out.argmax(-1)
        for index, token in enumerate(best.tolist()):
            going[index] = going[index] and token not in icae.stops
            if going[index]:
                texts[index].append(token)
        if step == max_new_tokens or not any(going):
            break
        at, mask = at + 1, torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        out = icae.decoder(
            inputs_embeds=icae.embed(best[:, None]), attention_mask=mask, position_ids=at, return_dict=True, **given
        ).logits[:, -1]
    yield from texts
