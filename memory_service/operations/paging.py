"""Pages of a list: each has as many items as were asked for, or fewer where these are large."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
# How large a page becomes, about.
PAGE_BYTES = 2 * 1024 * 1024


def page(found: Iterable[T], limit: int, size: Callable[[T], int]) -> tuple[list[T], bool]:
    """Return the first items of `found`, at most `limit`, and whether there are more. At most one item more is read.

    size: tells the bytes of an item.
    """
    taken, left = list[T](), PAGE_BYTES
    for item in found:
        if len(taken) == limit or left < 0:
            return taken, True
        taken.append(item)
        left -= size(item)
    return taken, False
