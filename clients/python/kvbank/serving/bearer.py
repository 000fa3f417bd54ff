"""The key of a caller is read here from the header of a request over HTTP."""

from kvbank._exceptions import Unauthenticated


def key_of(authorization: str | None) -> str:
    """Return the key of a header `Authorization: Bearer KEY`; "" where there is none. Raises Unauthenticated."""
    if authorization is None:
        return ""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("the header Authorization is 'Bearer KEY'")
    return key.strip()
