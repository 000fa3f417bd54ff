"""A filter becomes SQL over the columns of `chunks`. This file owns which values of metadata are compared with which:
numbers with numbers of either type, exactly; strings with strings; bools with bools.

PostgreSQL compares numbers of JSON as decimals. So a float is written as the decimal that it is exactly, both in the
column `tags` and in a condition; the shortest decimal that names the same float may be another number.
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from memory_service.domain.model import Condition, Filter, Metadata, Scalar
from memory_service.domain.validate import LARGEST_INT64
from memory_service.storage.postgres.rows.sought import sought

_BOUNDS = {"at_least": ">=", "above": ">", "at_most": "<=", "below": "<"}


def tags(metadata: Metadata) -> str:
    """Return metadata as the JSON that filters are held against."""
    return "{" + ", ".join(f"{json.dumps(key)}: {_exact(value)}" for key, value in metadata.items()) + "}"


def _exact(value: Scalar) -> str:
    if isinstance(value, float):
        return format(Decimal(value), "f")
    return json.dumps(sought(value) if isinstance(value, str) else value)


def passing(where: Filter, values: list[Any]) -> str:
    """Build the condition that a filter lets a chunk pass, and append its values, which stand in its order. The
    cheapest parts come first."""
    return " AND ".join(["true", *_parts(where, values)])


def _parts(where: Filter, values: list[Any]) -> Iterator[str]:
    bounds = (
        ("created >= %s", where.created_from),
        ("created < %s", where.created_before),
        ("start >= %s", where.start_from),
        ("start < %s", where.start_before),
        ("pinned = %s", where.pinned),
    )
    for text, bound in bounds:
        if bound is not None:
            values.append(bound)
            yield text
    for condition in where.metadata:
        yield _holds(condition, values)
    if where.stretches:
        yield _of_stretches(where, values)
    if where.any_of:
        yield "(" + " OR ".join(f"({passing(each, values)})" for each in where.any_of) + ")"


def _holds(condition: Condition, values: list[Any]) -> str:
    key = sought(condition.key)
    values.append(key)
    parts = ["jsonb_exists(tags, %s)"]
    if condition.values:
        values += [key, [_exact(value) for value in condition.values]]
        parts.append("tags -> %s = ANY(%s::text[]::jsonb[])")
    if condition.range is not None:
        values.append(key)
        compared = []
        for name, sign in _BOUNDS.items():
            if (bound := getattr(condition.range, name)) is not None:
                values += [key, _exact(bound)]
                compared.append(f"(tags -> %s)::numeric {sign} %s::numeric")
        held = " AND ".join(compared) or "true"
        parts.append(f"CASE WHEN jsonb_typeof(tags -> %s) = 'number' THEN {held} ELSE false END")
    found = " AND ".join(parts)
    return f"NOT coalesce({found}, false)" if condition.negate else f"({found})"


def _of_stretches(where: Filter, values: list[Any]) -> str:
    """Build the condition that a chunk is of one of the stretches. However many they are, a row costs about the same:
    of each branch the longest stretch is looked up."""
    ends: dict[str, int] = {}
    for name, before in where.stretches:
        branch = sought(name)
        ends[branch] = max(ends.get(branch, 0), LARGEST_INT64 if before is None else before)
    values.append(json.dumps(ends))
    found = "coalesce((%s::jsonb ->> (tags ->> 'branch'))::int8, 0)"
    return f"(jsonb_typeof(tags -> 'branch') = 'string' AND start < {found})"
