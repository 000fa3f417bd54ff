"""Bytes that are no message of their method are refused by us, with a reason; grpc.aio itself would answer UNKNOWN."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import DecodeError

from memory_service.errors import invalid


class _Undecodable:
    """In place of a message."""


def tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that leaves the refusal to `checked`, because nothing may be raised where gRPC calls it."""

    def call(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Undecodable()

    return call


def checked(request: Any) -> Any:
    """The request message, or the iterator of them. Errors: INVALID_FIELD for bytes that are none."""
    if isinstance(request, _Undecodable):
        raise invalid("request", "the bytes are not a message of this method")
    return _checked_each(request) if hasattr(request, "__aiter__") else request


async def _checked_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield checked(request)
