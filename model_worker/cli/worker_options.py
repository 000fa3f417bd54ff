"""The options of `kvbank worker`: the model and its memory as in `kvbank chat`, where it listens, and what it takes on.

The module is light to import: no torch.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from model_worker.attachment.model_names import SHIPPED
from model_worker.settings.base import LARGEST_COUNT, Compressor, Count, CountOrZero, ModelName, described
from model_worker.settings.model_run import ModelRun

_SERVES = "How it serves"


class WorkerOptions(ModelRun):
    """Options of `kvbank worker`."""

    model: ModelName = SHIPPED
    name: Annotated[
        str | None, described("What callers name the model; by default as --model does.", panel=_SERVES)
    ] = None
    listen: Annotated[str, described("HOST:PORT (port 0: any free one).", panel=_SERVES)] = "127.0.0.1:8000"
    tls_cert: Annotated[
        Path | None,
        described("File of the certificate (PEM, with those that it was signed by), for HTTPS.", panel=_SERVES),
    ] = None
    tls_key: Annotated[Path | None, described("File of the certificate's key (PEM).", panel=_SERVES)] = None
    insecure: Annotated[
        bool, described("Allow addresses that others can reach without TLS or without a key.", panel=_SERVES)
    ] = False
    running: Annotated[Count, described("Requests that are answered at a time.", panel=_SERVES)] = 8
    waiting: Annotated[CountOrZero, described("Requests that may wait besides.", panel=_SERVES)] = 64
    max_new_tokens: Annotated[Count, described("Tokens of the longest answer.", panel=_SERVES)] = 1024
    max_body: Annotated[
        int, Field(ge=1024, le=LARGEST_COUNT), described("Bytes of the longest request.", panel=_SERVES)
    ] = 4 * 1024 * 1024
    grace: Annotated[
        float, Field(ge=0, le=3600), described("Seconds that running answers get at the end.", panel=_SERVES)
    ] = 30.0
    trace: Annotated[
        CountOrZero,
        described("Look at one in so many tokens of an answer, to keep why it came; 0: keep nothing.", panel=_SERVES),
    ] = 8
    local: Annotated[
        str | None, described("What each layer keeps of the local tokens: tova:m=N; by default the window.")
    ] = None
    compressor: Compressor = "none"
