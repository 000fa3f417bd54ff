"""Recorded retrievals are replayed with smaller banks, by several policies of eviction, one policy a file.

Adding a policy is one file and one line in `REGISTRY`; see `Policy` of policy.py.
"""

from dataclasses import fields

from model_worker.compress.spec import parse, value
from model_worker.errors import InputError
from model_worker.evaluate.eviction.arc import Arc
from model_worker.evaluate.eviction.belady import Belady
from model_worker.evaluate.eviction.chance import Chance
from model_worker.evaluate.eviction.fifo import Fifo
from model_worker.evaluate.eviction.frequency import Frequency
from model_worker.evaluate.eviction.lfu import Lfu
from model_worker.evaluate.eviction.lru import Lru
from model_worker.evaluate.eviction.policy import Policy
from model_worker.evaluate.eviction.recency_half import RecencyHalf

REGISTRY: dict[str, type[Policy]] = {
    each.name: each for each in (Frequency, RecencyHalf, Lru, Lfu, Fifo, Arc, Chance, Belady)
}

__all__ = ["REGISTRY", "Policy", "policy"]


def policy(spec: str) -> Policy:
    """Return the policy that `name` or `name:parameter=value,...` asks for, such as `frequency:lower=0,target=90`.

    Parameters are percentages. Raises InputError for a name or parameter that does not exist.
    """
    name = spec.partition(":")[0]
    if name not in REGISTRY:
        raise InputError(f"unknown policy {name!r}; there are: {', '.join(REGISTRY)}")
    try:
        words = {key: value(text, int) for key, text in parse(spec)[1].items()}
        if any(number > 100 for number in words.values()):
            raise ValueError
        made = REGISTRY[name](**words)
    except (ValueError, TypeError):
        said = ",".join(f"{own.name}=PERCENT" for own in fields(REGISTRY[name]))
        raise InputError(f"policy {spec!r}: write {f'{name}:{said}' if said else name}") from None
    if isinstance(made, Frequency) and made.lower > made.upper:
        raise InputError(f"policy {spec!r}: lower is above upper")
    return made
