"""Whatever is given to the SDK: the call works, or ends in an error of the SDK that names the argument.

The cases come from the signatures, so that a new method, parameter or model is tried by itself.
"""

import asyncio
import dataclasses
import inspect
import typing
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import timedelta
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvbank
from tests.sdk.odd_values import ODD

Make = Callable[..., kvbank.NewChunk]
Good = Mapping[str, Any]

# What a call may end in besides, where a value is of the right type: it names what is not there, or what differs.
_MEANT = (kvbank.NotFound, kvbank.FailedPrecondition, kvbank.AlreadyExists, kvbank.ResourceExhausted)
_METHODS = [name for name, _ in inspect.getmembers(kvbank.Client, inspect.isfunction) if not name.startswith("_")]
_OF_SESSIONS = [name for name, _ in inspect.getmembers(kvbank.Sessions, inspect.isfunction) if not name.startswith("_")]
_MODELS = [kind for kind in (getattr(kvbank, name) for name in kvbank.__all__) if dataclasses.is_dataclass(kind)]
# Of the models, those that go into a client; the others come out of it, and take what they are given.
_GIVEN: Mapping[str, Good] = {
    "Capacity": {"chunks": 5},
    "EmbeddingSpec": {"embedder_digest": "e", "dimension": 16},
    "Expiry": {"ttl": timedelta(days=1)},
    "Filter": {},
    "Item": {"role": "user"},
    "Held": {"store_id": "s", "checksums": {1: 2}},
    "KVSpec": {"reader_digest": "r", "layers": (1, 3), "kv_heads": 2, "head_dim": 8},
    "NewChunk": {"embedding": np.ones(16)},
    "Policy": {},
    "Producer": {"method": "none"},
    "Quota": {"chunks": 5},
    "Range": {"below": 5},
}
# One of so many cases is tried in the quick tests.
_EVERY = [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(19, id="some")]


def tried(call: Callable[[], Any], what: str) -> None:
    """Check that a call works or says what is wrong."""
    try:
        call()
    except _MEANT:
        return
    except Exception as error:
        named = isinstance(error, kvbank.InvalidArgument) and error.metadata.keys() & {"field", "tensor"}
        if not named:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def cases(names: list[str], every: int, first: int) -> Iterator[tuple[str, str]]:
    """Names of arguments, each with labels of odd values."""
    for at, case in enumerate(product(names, ODD)):
        if (at + first) % every == 0:
            yield case


def names_of(call: Callable[..., Any]) -> list[str]:
    """Return the names of all arguments, those of a TypedDict of options too."""
    found = [each for each in inspect.signature(call).parameters.values() if each.name != "self"]
    options = [typing.get_args(each.annotation)[0] for each in found if each.kind is each.VAR_KEYWORD]
    plain = [each.name for each in found if each.kind is not each.VAR_KEYWORD]
    return plain + [name for each in options for name in typing.get_type_hints(each)]


def needed(call: Callable[..., Any], good: Good) -> dict[str, Any]:
    """Return a good value for every parameter that has no default."""
    found = inspect.signature(call).parameters.values()
    missing = [each for each in found if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    return {each.name: good[each.name] for each in missing if each.name != "self"}


@pytest.fixture
def good(make_bank: Callable[..., str], make_chunk: Make, client: kvbank.Client, digests: dict[str, str]) -> Good:
    """Return a value for every parameter of every method that must be given, with a bank that has a chunk."""
    bank = make_bank()
    chunk_id = client.write(bank, make_chunk(1), **digests).chunk_id
    return {
        **{"bank": bank, "banks": bank, "chunk_id": chunk_id, "chunk_ids": [chunk_id], "queries": np.ones(16)},
        **{"kv": None, "embedding": kvbank.EmbeddingSpec("e", 16), "chunk": make_chunk(2), "chunks": []},
        **{"filter": kvbank.Filter(), "by": "none"},
        **{"metadata": {"a": "b"}, "name": f"none-{uuid.uuid4().hex}", **digests},
    }


@pytest.mark.parametrize("every", _EVERY)
@pytest.mark.parametrize("method", _METHODS)
def test_every_argument_of_every_method(client: kvbank.Client, good: Good, method: str, every: int) -> None:
    call = getattr(client, method)
    for name, label in cases(names_of(call), every, _METHODS.index(method)):

        def calls(name: str = name, label: str = label) -> None:
            answer = call(**{**needed(call, good), name: ODD[label]()})
            if isinstance(answer, Iterator):
                list(answer)

        tried(calls, f"{method}({name}={label})")


@pytest.mark.parametrize("every", _EVERY)
@pytest.mark.parametrize("method", _METHODS)
def test_every_argument_of_every_coroutine(address: str, good: Good, method: str, every: int) -> None:
    async def calls(name: str, label: str) -> None:
        async with kvbank.connect_async(address) as client:
            call = getattr(client, method)
            answer = call(**{**needed(call, good), name: ODD[label]()})
            if isinstance(answer, AsyncIterator):
                _ = [found async for found in answer]
            else:
                await answer

    call = getattr(kvbank.AsyncClient, method)
    for name, label in cases(names_of(call), every, _METHODS.index(method)):
        tried(lambda name=name, label=label: asyncio.run(calls(name, label)), f"{method}({name}={label})")  # type: ignore[misc]


@pytest.mark.parametrize("every", _EVERY)
@pytest.mark.parametrize("method", _OF_SESSIONS)
def test_every_argument_of_every_method_of_sessions(
    client: kvbank.Client, method: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session = client.sessions.create()
    lease = client.sessions.acquire(session.session_id, "test").lease
    assert lease is not None
    file = tmp_path / "file"
    client.sessions.export(session.session_id, file)
    known: Good = {
        **{"session_id": session.session_id, "epoch": lease.epoch, "follows": 0, "turn": 0, "holder": "test"},
        **{"turns": [], "key": "none", "data": b"", "stamp": "", "path": file, "name": uuid.uuid4().hex},
    }
    call = getattr(client.sessions, method)
    for name, label in cases(names_of(call), every, _OF_SESSIONS.index(method)):

        def calls(name: str = name, label: str = label) -> None:
            answer = call(**{**needed(call, known), name: ODD[label]()})
            if isinstance(answer, Iterator):
                list(answer)

        tried(calls, f"{method}({name}={label})")


@pytest.mark.parametrize("every", _EVERY)
@pytest.mark.parametrize("model", _MODELS, ids=lambda model: model.__name__)
def test_every_field_of_every_model(
    client: kvbank.Client, make_bank: Callable[..., str], digests: dict[str, str], model: Any, every: int
) -> None:
    bank = make_bank(None)
    embedding = kvbank.EmbeddingSpec("e", 16)
    uses: Mapping[str, Callable[[Any], Any]] = {
        "Capacity": lambda value: client.update_bank(bank, capacity=value),
        "EmbeddingSpec": lambda value: client.create_bank(uuid.uuid4().hex, kv=None, embedding=value),
        "Expiry": lambda value: client.update_bank(bank, expiry=value),
        "Filter": lambda value: list(client.list_chunks(bank, filter=value)),
        "Held": lambda value: client.retrieve(bank, np.ones(16), held=value, **digests),
        "KVSpec": lambda value: client.create_bank(uuid.uuid4().hex, kv=value, embedding=embedding),
        "NewChunk": lambda value: client.write(bank, value, reader_digest="", embedder_digest="cd" * 32),
        "Policy": lambda value: client.update_bank(bank, policy=value),
        "Producer": lambda value: client.write(bank, kvbank.NewChunk(np.ones(16), producer=value), **digests),
        "Quota": lambda value: client.update_bank(bank, quota=value),
        "Range": lambda value: list(client.list_chunks(bank, filter=kvbank.Filter(metadata={"a": value}))),
    }
    fields = [each for each in dataclasses.fields(model) if each.init]
    required = {each.name for each in fields if each.default is each.default_factory is dataclasses.MISSING}
    known = _GIVEN.get(model.__name__, dict.fromkeys(required))
    assert known.keys() >= required, f"{model.__name__} needs a good value of {required - known.keys()}"
    use = uses.get(model.__name__, lambda value: value)
    for name, label in cases([each.name for each in fields], every, len(fields)):
        what = f"{model.__name__}({name}={label})"
        tried(lambda name=name, label=label: use(model(**{**known, name: ODD[label]()})), what)  # type: ignore[misc]


@pytest.mark.parametrize("every", _EVERY)
@pytest.mark.parametrize("connect", [kvbank.connect, kvbank.connect_async])
def test_every_way_to_connect(
    connect: Callable[..., Any], address: str, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, label in cases(names_of(connect), every, 0):

        def opened(name: str = name, label: str = label) -> None:
            made = connect(**{"target": address, name: ODD[label]()})
            if isinstance(made, kvbank.Client):
                made.close()
            else:
                asyncio.run(made.close())

        tried(opened, f"connect({name}={label})")


@pytest.mark.parametrize("layers", [np.array([0]), np.int64([0]), torch.tensor([0]), (np.int32(0),), {0}, range(1)])
def test_layers_may_be_any_list_of_whole_numbers(
    client: kvbank.Client, embedding: kvbank.EmbeddingSpec, digests: dict[str, str], layers: Any
) -> None:
    """Layer 0 alone, which is no truth value."""
    name = uuid.uuid4().hex
    client.create_bank(name, kv=kvbank.KVSpec(digests["reader_digest"], (0, 1), 1, 4, "fp32"), embedding=embedding)
    keys = np.ones((1, 2, 4), np.float32)
    tensors = {f"{part}.{layer}": keys for part in "kv" for layer in (0, 1)}
    tensors |= {f"pos.{layer}": np.arange(2, dtype=np.int32) for layer in (0, 1)}
    written = client.write(name, kvbank.NewChunk(np.ones(16), tensors), **digests)
    reader = digests["reader_digest"]
    (chunk,) = client.fetch(name, np.array([written.chunk_id]), layers=layers, reader_digest=reader)
    assert sorted(chunk.tensors or {}) == ["k.0", "pos.0", "v.0"]
    found = client.retrieve(name, np.ones(16), layers=layers, top_k=np.int64(1), **digests)
    assert sorted(found.chunks[written.chunk_id].tensors or {}) == ["k.0", "pos.0", "v.0"]


def enumerated(text: str) -> Any:
    """Return a string that prints as something else."""
    return Enum("Kind", {"ONE": text}, type=str)["ONE"]


def test_a_string_is_its_characters(client: kvbank.Client, embedding: kvbank.EmbeddingSpec) -> None:
    name = enumerated("of-an-enum")
    made = client.create_bank(name, kv=None, embedding=embedding, metadata={name: name}, exist_ok=True)
    assert (made.name, made.metadata) == ("of-an-enum", {"of-an-enum": "of-an-enum"})
    assert client.stats([name]).banks[0].bank.name == "of-an-enum"


@pytest.mark.parametrize("connect", [kvbank.connect, kvbank.Client])
def test_an_address_is_its_characters(address: str, connect: Callable[..., kvbank.Client]) -> None:
    with connect(enumerated(address)) as client:
        assert client.server_info().version


def test_a_folder_is_its_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kvbank.connect(enumerated("./memory")).close()
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


@pytest.mark.parametrize("times", [np.array([1], "m8[s]"), np.array([1], "M8[ns]"), [np.timedelta64(1, "ns")]])
def test_times_are_no_numbers(client: kvbank.Client, good: Good, times: Any) -> None:
    """Refuse times, of which numpy makes whole numbers without their unit."""
    with pytest.raises(kvbank.InvalidArgument, match=r"^chunk_ids: expected") as caught:
        client.delete_chunks(good["bank"], times)
    assert "64" in str(caught.value)
    with pytest.raises(kvbank.InvalidArgument, match=r"^metadata: expected"):
        kvbank.NewChunk(np.ones(16), metadata={"a": np.asarray(times)[0], "b": np.asarray(times).reshape(())})


def test_what_is_masked_is_no_number(client: kvbank.Client, good: Good, digests: dict[str, str]) -> None:
    vector = np.ma.array(np.ones(16, np.float32))
    client.retrieve(good["bank"], vector, **digests)
    vector[3] = np.ma.masked
    for name, call in (
        ("queries", lambda: client.retrieve(good["bank"], vector, **digests)),
        ("embedding", lambda: client.write(good["bank"], kvbank.NewChunk(vector), **digests)),
        ("tensors", lambda: client.write(good["bank"], kvbank.NewChunk(np.ones(16), {"k.1": vector}), **digests)),
        ("metadata", lambda: kvbank.NewChunk(np.ones(16), metadata={"a": vector[3]})),
        ("timeout", lambda: client.server_info(timeout=np.ma.masked)),
        ("chunk_ids", lambda: client.delete_chunks(good["bank"], np.ma.array([1, 2], mask=[True, False]))),
    ):
        with pytest.raises(kvbank.InvalidArgument) as caught:
            call()
        assert caught.value.metadata["field"] == name


@pytest.mark.parametrize("address", ["", "a\0b:1", "unix:a\0b", "\ud800:1", b"a:1", None])
def test_what_is_no_address_is_refused_by_a_client_itself(address: Any) -> None:
    """Refuse an address with a NUL, which would be taken for the part before it."""
    for kind in (kvbank.Client, kvbank.AsyncClient):
        with pytest.raises(kvbank.InvalidArgument, match=r"^address: expected"):
            kind(address)


def test_no_layers_are_not_all_layers(client: kvbank.Client, good: Good) -> None:
    with pytest.raises(kvbank.InvalidArgument, match=r"^layers: expected some layers, got none"):
        client.fetch(good["bank"], good["chunk_ids"], layers=np.array([], int), reader_digest=good["reader_digest"])


@pytest.mark.parametrize("timeout", [float("inf"), 10**12, np.float32(30), torch.tensor(30)])
def test_a_long_deadline_is_waited_for(address: str, good: Good, timeout: Any) -> None:
    for options, arguments in (({}, {"timeout": timeout}), ({"timeout": timeout, "stream_timeout": timeout}, {})):
        with kvbank.connect(address, **options) as client:
            (chunk,) = client.fetch(good["bank"], good["chunk_ids"], reader_digest=good["reader_digest"], **arguments)
            assert client.get_chunk(good["bank"], chunk.chunk_id, **arguments).chunk_id == chunk.chunk_id


@pytest.mark.parametrize("timeout", [float("nan"), -1, 0, "5", True, np.array([1.0, 2.0]), [3], np.complex128(5)])
def test_what_is_no_deadline_is_refused_before_anything_is_sent(unused_port: int, timeout: Any) -> None:
    with pytest.raises(kvbank.InvalidArgument, match=r"^timeout: expected a number"):
        kvbank.connect(f"127.0.0.1:{unused_port}", timeout=timeout)
    with kvbank.connect(f"127.0.0.1:{unused_port}") as client:
        with pytest.raises(kvbank.InvalidArgument, match=r"^timeout: expected a number"):
            client.get_bank("b", timeout=timeout)
        with pytest.raises(kvbank.InvalidArgument, match=r"^timeout: expected a number"):
            client.fetch("b", [1], reader_digest="r", timeout=timeout)


def test_a_folder_is_free_again_where_an_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kvbank.InvalidArgument, match=r"^stream_timeout: "):
        kvbank.connect(tmp_path / "memory", stream_timeout=-1)
    kvbank.connect(tmp_path / "memory").close()
