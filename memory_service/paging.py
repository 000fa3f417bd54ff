"""Pages of an answer: as many as were asked for, and fewer where they are large."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
# Of a page, about.
PAGE_BYTES = 2 * 1024 * 1024


def page(found: Iterable[T], limit: int, size: Callable[[T], int]) -> tuple[list[T], bool]:
    """The first of `found`, and whether there are more. No more are read than that takes."""
    taken, left = list[T](), PAGE_BYTES
    for item in found:
        if len(taken) == limit or left < 0:
            return taken, True
        taken.append(item)
        left -= size(item)
    return taken, False
