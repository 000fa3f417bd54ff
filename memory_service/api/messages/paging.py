"""Reading what a request says of pages: how many entries it asks for, and where its page begins."""

from memory_service.domain.errors import invalid
from memory_service.domain.validate import LARGEST_INT64


def page_size(size: int, default: int = 100) -> int:
    """Read the size of a page; 0 stands for the default. Errors: INVALID_FIELD."""
    if not 0 <= size <= 1000:
        raise invalid("page_size", f"must be from 1 to 1000, or 0 for {default}")
    return size or default


def number_of(token: str, first: int) -> int:
    """Read a token that is a number; an empty one stands for `first`. Errors: INVALID_FIELD."""
    if not token:
        return first
    # The length is looked at first, because Python refuses to read a number of thousands of digits.
    if not (len(token) < 20 and token.isascii() and token.isdecimal() and int(token) <= LARGEST_INT64):
        raise invalid("page_token", "is not one that this service gave")
    return int(token)
