"""The quick part of a matrix of cases, and the slow rest."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

import pytest

Axis: TypeAlias = Mapping[str, Any] | Sequence[str]


def diagonal(longest: Axis, *others: Axis, first: int = 0, every: int = 1) -> list[Any]:
    """Return every combination of values, as cases of `pytest.mark.parametrize`. As many as `longest` has are quick,
    and each value of each axis is in one of them; the others have the mark `slow`.

    longest, others: the axes; values by the names that cases go by, or names that are values. first, every: of the
    longest axis one name in `every` is in a quick case, beginning with that at the place `first`.
    """
    axes = [axis if isinstance(axis, Mapping) else dict(zip(axis, axis, strict=True)) for axis in (longest, *others)]
    quick = _quick([*axes[0]][first::every], *axes[1:])
    return [
        pytest.param(
            *(axis[name] for axis, name in zip(axes, names, strict=True)),
            id="-".join(names),
            marks=() if names in quick else pytest.mark.slow,
        )
        for names in product(*axes)
    ]


def rotated(cases: Sequence[Any], first: int, every: int = 3) -> list[Any]:
    """Return cases of `pytest.mark.parametrize`, of which one in `every` is quick, beginning with that at the place
    `first`; the others have the mark `slow`. Tests with other places try others.

    cases: names, values, or tuples of the values of several arguments.
    """
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=case if isinstance(case, str) else None,
            marks=() if (place - first) % every == 0 else pytest.mark.slow,
        )
        for place, case in enumerate(cases)
    ]


def _quick(longest: Sequence[str], *others: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """Count along the longest axis; the digits of a count choose from the other axes."""
    quick = set()
    for count, name in enumerate(longest):
        names, rest = [name], count
        for other in others:
            rest, digit = divmod(rest, len(other))
            names.append([*other][digit])
        quick.add(tuple(names))
    return quick
