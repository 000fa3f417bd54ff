"""Methods with many options take them as these typed dictionaries say.

Each key is a keyword argument of its method, and may be left out.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from kvbank import _models as m
from kvbank.wire.scalars import Scalar


class ConnectOptions(TypedDict, total=False):
    """What `connect` and `connect_async` take besides the target and `timeout`.

    stream_timeout: default deadline of calls that move tensors, seconds (120).
    options: gRPC channel arguments, pairs of a name and a value; they replace those of this package.
    mapped: True gives tensors that are views of the payload files of a server on this machine, instead of copies
        (False). Views are verified when they are handed out, read-only, and faster for large tensors. A program that
        truncates such a file while a view of it is in use ends this process with SIGBUS; the server does not.
    first_contact: seconds (5) after which a call without a `timeout` of its own gives a server up that was never
        reached. A server that was reached once is waited for until the deadline of the call, because it may restart.
    tls: True speaks TLS with the server, False never; the default is True where another option or variable of TLS is
        given. A unix socket has none.
    root_certificates: the authorities, of one of which the server's certificate must be: PEM as bytes, or the file
        that has it (KVBANK_TLS_CA). The default is those that gRPC trusts.
    client_certificate, client_key: what this client shows of itself, PEM as bytes or files (KVBANK_TLS_CLIENT_CERT,
        KVBANK_TLS_CLIENT_KEY).
    server_name: the name that the server's certificate must have, where it is not that of the address
        (KVBANK_TLS_SERVER_NAME).
    metadata: what goes with every call as gRPC metadata, by name or as pairs, such as the headers that a proxy needs.
    api_key: the key that goes with every call, or "@FILE" for the file that has it; the default is what the variable
        KVBANK_API_KEY says, where the target is an address, and none for a folder. To another machine it goes over TLS,
        or with `tls=False`, and so does one among the metadata.
    spread: True spreads calls over several addresses, of services on one database, each of which answers for all; False
        makes them to the first that answers. The default is what the variable KVBANK_SPREAD says, else False.
    """

    stream_timeout: float
    options: Sequence[tuple[str, Any]]
    mapped: bool
    first_contact: float
    tls: bool | None
    root_certificates: str | os.PathLike[str] | bytes | None
    client_certificate: str | os.PathLike[str] | bytes | None
    client_key: str | os.PathLike[str] | bytes | None
    server_name: str | None
    metadata: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
    api_key: str | None
    spread: bool | None


class BankSettings(TypedDict, total=False):
    """What `create_bank` takes besides the specs of a bank. `update_bank` can change all of it later.

    capacity: when the bank evicts; None, the default, is never.
    policy: which chunks an eviction takes; the default is `Policy()`.
    metadata: values of the caller's, by key.
    quota: when the bank refuses a write; None, the default, is never.
    expiry: when chunks go that state no expiry; None, the default, is never.
    index: how the bank is searched, see `Bank`; the default is "auto".
    """

    capacity: m.Capacity | None
    policy: m.Policy | None
    metadata: Mapping[str, Scalar]
    quota: m.Quota | None
    expiry: m.Expiry | None
    index: m.IndexKind


class RetrieveOptions(TypedDict, total=False):
    """What `retrieve` takes besides the query, the filter and the digests.

    min_score: hits below it are left out.
    min_share: from 0 to 1; of each query's hits, those with less than this share of the best score are left out.
    layers: memory layers whose tensors are sent; None, the default, is all.
    held: payloads that the caller has and that are not sent again; the `tensors` of these chunks are None.
    payload: False sends hits and metadata only, and then `reader_digest` may be left out. The default is True.
    count: False leaves the retrieval counts of the hits as they are. The default is True. A call that is made again
        counts once, unless the server was started anew in between, or another one answers.
    """

    min_score: float | None
    min_share: float | None
    layers: Iterable[int] | None
    held: m.Held | None
    payload: bool
    count: bool


def check_names(method: str, options: Mapping[str, object], kind: Any) -> None:
    """Check that every option of a method is a key of `kind`, one of the classes above. Errors: TypeError."""
    for name in options:
        if name not in kind.__annotations__:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
