"""Functions from texts to vectors are embedders by the class of the SDK, which refuses here with the worker's error."""

from typing import Any

from kvbank.embed import callable as of_sdk
from model_worker.embed.base import Vectors, input_errors


class CallableEmbedder(of_sdk.CallableEmbedder):
    __doc__ = str(of_sdk.CallableEmbedder.__doc__).replace("Errors: InvalidArgument", "Raises InputError")

    def __init__(self, function: of_sdk.Function, **named: Any):
        with input_errors():
            super().__init__(function, **named)

    def embed(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`. Raises InputError where the function gives something else."""
        with input_errors():
            return super().embed(texts)

    def embed_queries(self, texts: list[str]) -> Vectors:
        """Return a row for each of `texts`, which are searched for. Raises InputError as `embed`."""
        with input_errors():
            return super().embed_queries(texts)
