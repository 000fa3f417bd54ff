"""A condition on metadata becomes SQL over `chunks.meta`, a JSON object. This file owns which values are compared with
which: numbers with numbers of either type, exactly; strings with strings; bools with bools."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import ge, gt, le, lt
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Column, ColumnElement

from memory_service.domain.model import Condition, Range, Scalar

_NUMBERS = ("integer", "real")
_BOUNDS: Mapping[str, Callable[[Any, Any], Any]] = {"at_least": ge, "above": gt, "at_most": le, "below": lt}


def holds(meta: Column[str], condition: Condition) -> ColumnElement[bool]:
    """Build the expression that tells whether a row meets a condition."""
    entry = sa.func.json_each(meta).table_valued("key", "value", "type")
    where = [entry.c.key == condition.key]
    if condition.values:
        where.append(sa.or_(*_one_of(entry.c, condition.values)))
    if condition.range is not None:
        where += [entry.c.type.in_(_NUMBERS), *_within(entry.c.value, condition.range)]
    found = sa.select(entry.c.key).where(*where).exists()
    return ~found if condition.negate else found


def of_stretches(
    meta: Column[str], start: Column[int], stretches: Sequence[tuple[str, int | None]]
) -> ColumnElement[bool]:
    """Build the expression that tells whether a row is of one of these stretches; see `Filter.stretches`. However many
    they are, a row costs the same."""
    each = sa.func.json_each(json.dumps(stretches)).table_valued("value")
    branch, before = (sa.func.json_extract(each.c.value, f"$[{place}]") for place in (0, 1))
    # Materialized, because SQLite makes an index of such a table by itself, and none of `json_each`.
    line = sa.select(branch.label("branch"), before.label("before")).cte().prefix_with("MATERIALIZED")
    within = sa.or_(line.c.before.is_(None), start < line.c.before)
    return sa.select(line.c.branch).where(line.c.branch == sa.func.json_extract(meta, "$.branch"), within).exists()


def _one_of(entry: Any, values: tuple[Scalar, ...]) -> Iterator[ColumnElement[bool]]:
    if strings := [value for value in values if isinstance(value, str)]:
        yield sa.and_(entry.type == "text", entry.value.in_(strings))
    if numbers := [_number(value) for value in values if not isinstance(value, str | bool)]:
        yield sa.and_(entry.type.in_(_NUMBERS), entry.value.in_(numbers))
    if flags := ["true" if value else "false" for value in values if isinstance(value, bool)]:
        yield entry.type.in_(flags)


def _within(value: Any, wanted: Range) -> Iterator[ColumnElement[bool]]:
    for name, compare in _BOUNDS.items():
        if (bound := getattr(wanted, name)) is not None:
            yield compare(value, _number(bound))


def _number(number: float) -> Any:
    """Bind a number as a parameter. A float goes through JSON, as those in the rows did, so that equal floats are equal
    to the last bit."""
    return number if isinstance(number, int) else sa.func.json_extract(json.dumps(number), "$")
