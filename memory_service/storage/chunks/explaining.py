"""What a write would evict, for a caller who asks; nothing is changed for that."""

from collections.abc import Callable
from dataclasses import dataclass

from memory_service.domain.errors import ServiceError
from memory_service.domain.eviction import NOBODY, Candidates, Victims, overflows, plan
from memory_service.domain.model import Bank

MOST_EXPLAINED = 10_000


@dataclass(frozen=True, slots=True)
class Decision:
    """What a write would evict, in order; `under_way` tells whether these chunks go in any case. `refusal` is the text
    of the error that the write would end with."""

    victims: Victims = NOBODY
    under_way: bool = False
    refusal: str = ""


def decide(bank: Bank, need: int, evicting: bool, look: Callable[[], tuple[Candidates, Victims]]) -> Decision:
    """Decide what a write of `need`, in the unit of the bank's capacity, would evict.

    evicting: whether an eviction of the bank is under way. look: returns what a plan would choose from, and what is
    left of the plan that is under way; it is called only where one of them is needed.
    """
    if bank.capacity is None:
        return Decision()
    used = int(getattr(bank.usage, bank.capacity.unit))
    try:
        if not overflows(bank.capacity, used, need) and not evicting:
            return Decision()
        candidates, doomed = look()
        if doomed:
            return Decision(doomed, under_way=True)
        return Decision(plan(candidates, bank.capacity, bank.policy, used, need))
    except ServiceError as refusal:
        return Decision(refusal=refusal.message)


def sentence(bank: Bank, need: int, decision: Decision) -> str:
    """Say in a sentence what a write would evict; "" for nothing."""
    victims, capacity = decision.victims, bank.capacity
    if not victims or capacity is None:
        return decision.refusal
    parts = ", ".join(f"{count} {reason}" for reason, count in victims.tally().items())
    verb = "are about to go" if decision.under_way else "would go"
    used = getattr(bank.usage, capacity.unit)
    figures = f"{used} of {capacity.limit} {capacity.unit} used, {need} asked for"
    return f"{len(victims)} of {bank.usage.chunks} chunks {verb} ({parts}): {figures}"
