"""A question to the banks of a batch: asked once for each bank, and no trouble where there is no answer.

This file owns the rule that a recall which fails leaves a model with what it has, and a warning (`strict` raises).
"""

import time
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

import kvbank
from model_worker.errors import InputError
from model_worker.remember.service_link import AWAY, ServiceLink
from model_worker.remember.stats import MemoryStats

Answer = TypeVar("Answer")


def answered(ask: Callable[[], Answer], link: ServiceLink, stats: MemoryStats, strict: bool) -> Answer | None:
    """Return what `ask` returns, counted and timed in `stats`; None where the service did not say.

    strict: errors of the service are raised. Raises ServiceError only then.
    """
    if not strict and not link.worth_trying():
        stats.failed_recalls += 1
        return None
    begin = time.perf_counter()
    try:
        found = ask()
    except kvbank.ServiceError as error:
        if strict:
            raise
        stats.failed_recalls += 1
        if isinstance(error, AWAY):
            link.lost(error)
        else:
            warnings.warn(f"nothing was recalled: {error}", RuntimeWarning, stacklevel=2)
        return None
    stats.recalls += 1
    stats.recall_seconds.append(time.perf_counter() - begin)
    return found


def rows_by_bank(vectors: NDArray[np.float32], bank_of: Callable[[int], str]) -> dict[str, list[int]]:
    """Return the rows of `vectors` `[B, dimension]` that each bank is asked for.

    bank_of: gives the bank of a row. A query without a word, whose vector is zero, is asked of no bank.
    """
    found: dict[str, list[int]] = {}
    for row in np.flatnonzero(vectors.any(axis=1)).tolist():
        found.setdefault(bank_of(row), []).append(row)
    return found


def bank_of(banks: str | list[str], row: int) -> str:
    """Return the bank of a row, of the one bank of all rows or of one for each. Raises InputError for a row without."""
    if isinstance(banks, str):
        return banks
    if row >= len(banks):
        raise InputError(f"row {row} of the batch has no bank: {len(banks)} were given")
    return banks[row]
