"""Calls through the stubs that carry a key."""

from collections.abc import Callable
from typing import Any

import grpc


class WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Adds a key to the metadata of every call."""

    def __init__(self, key: str) -> None:
        self._key = key

    def _called(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=[*(details.metadata or ()), ("api-key", self._key)]), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_stream = _called


def channel(address: str, key: str) -> grpc.Channel:
    """Open a channel whose calls carry a key."""
    return grpc.intercept_channel(grpc.insecure_channel(address), WithKey(key))
