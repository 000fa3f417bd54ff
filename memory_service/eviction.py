"""Which chunks go when a bank is full. Pure; owns the policies (MemLong's strict rule, the release's half, reject)."""

from collections.abc import Sequence
from typing import NamedTuple

from memory_service.domain import Capacity, EvictionReason, Policy
from memory_service.errors import RESOURCE_EXHAUSTED, ServiceError


class Candidate(NamedTuple):
    """A live chunk; `size` in the unit of the bank's capacity."""

    chunk_id: int
    size: int
    retrievals: int


class Victim(NamedTuple):
    """A chunk that goes, and why."""

    chunk_id: int
    size: int
    reason: EvictionReason


def overflows(capacity: Capacity | None, usage: int, need: int) -> bool:
    """Whether a write of `need` makes an eviction necessary. Errors: TOO_LARGE when it can never fit."""
    if capacity is None:
        return False
    if need > capacity.limit:
        text = f"{need} {capacity.unit} do not fit in a bank of {capacity.limit}"
        raise ServiceError(RESOURCE_EXHAUSTED, "TOO_LARGE", text, limit=capacity.limit, size=need)
    return usage + need > capacity.limit


def plan(
    candidates: Sequence[Candidate], capacity: Capacity, policy: Policy, need: int, usage: int | None = None
) -> list[Victim]:
    """Victims in order for a write of `need`.

    `candidates`: live chunks, oldest first; `usage`: of the whole bank (default: the candidates' sizes).
    Errors: TOO_LARGE when `need` can never fit, BANK_FULL when the policy refuses.
    """
    usage = sum(chunk.size for chunk in candidates) if usage is None else usage
    if not overflows(capacity, usage, need):
        return []
    if policy.kind == "reject":
        text = f"the bank is full: {usage} of {capacity.limit} {capacity.unit} used, {need} asked for"
        raise ServiceError(
            RESOURCE_EXHAUSTED, "BANK_FULL", text, usage=usage, limit=capacity.limit, unit=capacity.unit, size=need
        )
    if policy.kind == "recency_half":
        victims = [Victim(chunk.chunk_id, chunk.size, "oldest_half") for chunk in candidates[: len(candidates) // 2]]
    else:
        victims = _least_retrieved(candidates, policy, _keep(usage, capacity, policy, need), usage)
    return victims + _room(candidates, victims, usage + need - capacity.limit)


def _keep(usage: int, capacity: Capacity, policy: Policy, need: int) -> int:
    """The usage at which the loop may stop.

    Counted in chunks this is MemLong's own figure, relative to what is stored: N // 2 victims at target 50.
    """
    target = capacity.limit * policy.target // 100
    if capacity.unit == "chunks":
        stored = min(usage, capacity.limit)
        target = stored - stored * (100 - policy.target) // 100
    return min(target, capacity.limit - need)


def _least_retrieved(candidates: Sequence[Candidate], policy: Policy, keep: int, usage: int) -> list[Victim]:
    """The oldest below the lower bound, then by count and age up to the upper bound until `keep` is reached."""
    lower = len(candidates) * policy.lower // 100
    upper = len(candidates) * policy.upper // 100
    victims = [Victim(chunk.chunk_id, chunk.size, "oldest") for chunk in candidates[:lower]]
    usage -= sum(victim.size for victim in victims)
    for chunk in sorted(candidates[lower:upper], key=lambda chunk: chunk.retrievals):
        if usage <= keep:
            break
        victims.append(Victim(chunk.chunk_id, chunk.size, "least_retrieved"))
        usage -= chunk.size
    return victims


def _room(candidates: Sequence[Candidate], victims: Sequence[Victim], excess: int) -> list[Victim]:
    """Protected chunks, oldest first, until the new one fits."""
    excess -= sum(victim.size for victim in victims)
    gone = {victim.chunk_id for victim in victims}
    room: list[Victim] = []
    for chunk in candidates:
        if excess <= 0:
            break
        if chunk.chunk_id not in gone:
            room.append(Victim(chunk.chunk_id, chunk.size, "room"))
            excess -= chunk.size
    return room
