"""Lists are answered in pages; where the next one begins is said here."""

from typing import Any

from kvbank._calls.answers import odd


def turned(request: Any, page: Any) -> bool:
    """Let a request be that of the page after `page`; return False after the last one.

    The turns of a session are paged by their numbers, all other lists by tokens. Errors: Internal (ODD_ANSWER) for a
    page that does not go on.
    """
    if hasattr(page, "next_after"):
        if page.next_after and page.next_after <= request.after:
            raise odd("the page after this one begins before its end")
        request.after = page.next_after
        return bool(page.next_after)
    if page.next_page_token and page.next_page_token == request.page_token:
        raise odd("the page after this one is this one")
    request.page_token = page.next_page_token
    return bool(page.next_page_token)
