"""How a route asks the memory service: with the key of its caller, and not for long."""

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

import kvbank
from model_worker.http.session_name import key_of
from model_worker.serve.answering import START_S
from model_worker.serve.served import Served

# For one call; a service that is away is told of after these.
SECONDS = START_S


@contextmanager
def client_of(served: Served, request: Request) -> Iterator[kvbank.Client]:
    """Yield a client of the service with the key of a request. Raises ApiError where there is no key and has to be."""
    with served.clients.client(key_of(request, needed=served.needs_key)) as client:
        yield client
