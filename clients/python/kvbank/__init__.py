"""kvbank: a memory that language models attend to.

    with kvbank.connect("host:7400") as client:      # or a folder: "./memory"
        client.create_bank("notes", kv=None, embedding=kvbank.EmbeddingSpec("my-embedder", 384))

Names load at first use, so that the generated stubs (`kvbank.v1`) and the command line do not pay for gRPC and numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbank._async_client import AsyncClient as AsyncClient
    from kvbank._client import Client as Client
    from kvbank._connect import connect as connect
    from kvbank._connect import connect_async as connect_async
    from kvbank._exceptions import AlreadyExists as AlreadyExists
    from kvbank._exceptions import BankFull as BankFull
    from kvbank._exceptions import BankNotFound as BankNotFound
    from kvbank._exceptions import ChunkNotFound as ChunkNotFound
    from kvbank._exceptions import ClientClosed as ClientClosed
    from kvbank._exceptions import ClientForked as ClientForked
    from kvbank._exceptions import DataLoss as DataLoss
    from kvbank._exceptions import DeadlineExceeded as DeadlineExceeded
    from kvbank._exceptions import DiskFull as DiskFull
    from kvbank._exceptions import EmbedderMismatch as EmbedderMismatch
    from kvbank._exceptions import FailedPrecondition as FailedPrecondition
    from kvbank._exceptions import Internal as Internal
    from kvbank._exceptions import InvalidArgument as InvalidArgument
    from kvbank._exceptions import KVBankError as KVBankError
    from kvbank._exceptions import LoopMismatch as LoopMismatch
    from kvbank._exceptions import MissingExtra as MissingExtra
    from kvbank._exceptions import NotFound as NotFound
    from kvbank._exceptions import PermissionDenied as PermissionDenied
    from kvbank._exceptions import QuotaExceeded as QuotaExceeded
    from kvbank._exceptions import ReaderMismatch as ReaderMismatch
    from kvbank._exceptions import ResourceExhausted as ResourceExhausted
    from kvbank._exceptions import ServiceError as ServiceError
    from kvbank._exceptions import TooLarge as TooLarge
    from kvbank._exceptions import Unauthenticated as Unauthenticated
    from kvbank._exceptions import Unavailable as Unavailable
    from kvbank._models import Bank as Bank
    from kvbank._models import BankStats as BankStats
    from kvbank._models import BankUsage as BankUsage
    from kvbank._models import Capacity as Capacity
    from kvbank._models import Chunk as Chunk
    from kvbank._models import Compacted as Compacted
    from kvbank._models import EmbeddingSpec as EmbeddingSpec
    from kvbank._models import Eviction as Eviction
    from kvbank._models import EvictionPlan as EvictionPlan
    from kvbank._models import Expiry as Expiry
    from kvbank._models import Filter as Filter
    from kvbank._models import Held as Held
    from kvbank._models import Hit as Hit
    from kvbank._models import IndexStats as IndexStats
    from kvbank._models import KVSpec as KVSpec
    from kvbank._models import MetricSample as MetricSample
    from kvbank._models import NewChunk as NewChunk
    from kvbank._models import Policy as Policy
    from kvbank._models import Producer as Producer
    from kvbank._models import Quota as Quota
    from kvbank._models import Range as Range
    from kvbank._models import Retrieval as Retrieval
    from kvbank._models import ServerInfo as ServerInfo
    from kvbank._models import Stats as Stats
    from kvbank._models import TensorInfo as TensorInfo
    from kvbank._models import WriteResult as WriteResult

__version__ = "0.1.0"

_EXPORTS = {
    "_async_client": ["AsyncClient"],
    "_client": ["Client"],
    "_connect": ["connect", "connect_async"],
    "_exceptions": [
        "AlreadyExists",
        "BankFull",
        "BankNotFound",
        "ChunkNotFound",
        "ClientClosed",
        "ClientForked",
        "DataLoss",
        "DeadlineExceeded",
        "DiskFull",
        "EmbedderMismatch",
        "FailedPrecondition",
        "Internal",
        "InvalidArgument",
        "KVBankError",
        "LoopMismatch",
        "MissingExtra",
        "NotFound",
        "PermissionDenied",
        "QuotaExceeded",
        "ReaderMismatch",
        "ResourceExhausted",
        "ServiceError",
        "TooLarge",
        "Unauthenticated",
        "Unavailable",
    ],
    "_models": [
        "Bank",
        "BankStats",
        "Compacted",
        "BankUsage",
        "Capacity",
        "Chunk",
        "EmbeddingSpec",
        "Eviction",
        "EvictionPlan",
        "Expiry",
        "Filter",
        "Held",
        "Hit",
        "IndexStats",
        "KVSpec",
        "MetricSample",
        "NewChunk",
        "Policy",
        "Producer",
        "Quota",
        "Range",
        "Retrieval",
        "ServerInfo",
        "Stats",
        "TensorInfo",
        "WriteResult",
    ],
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvbank' has no attribute {name!r}")
    value = getattr(import_module(f"kvbank.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
