"""The credential of a call, out of its metadata or headers. This file owns that there is one, or the call is refused:
of two, another part of the way might have looked at the other one."""

from collections.abc import Iterable

from memory_service.domain.errors import unauthenticated

AUTHORIZATION, API_KEY = "authorization", "api-key"
_SCHEME = "bearer"
# Longer than any key or token that is taken.
_LONGEST = 8192


def of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the one credential of a call, from "authorization: Bearer CREDENTIAL" or "api-key: CREDENTIAL"; "" where
    there is none.

    metadata: names, in small letters, and values. Errors: UNAUTHENTICATED for several, and for what is none.
    """
    found = [(name, value) for name, value in metadata if name in (AUTHORIZATION, API_KEY)]
    if not found:
        return ""
    name, value = found[0]
    if len(found) > 1 or not isinstance(value, str) or len(value) > _LONGEST:
        raise unauthenticated()
    if name == AUTHORIZATION:
        scheme, _, value = value.partition(" ")
        if scheme.lower() != _SCHEME:
            raise unauthenticated()
    if not (credential := value.strip()):
        raise unauthenticated()
    return credential
