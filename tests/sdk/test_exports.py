"""What `import kvbank` offers, and what it costs."""

import inspect
import json
import subprocess
import sys
import typing
from collections.abc import AsyncIterable

import pytest

import kvbank
from kvbank import _access_models, _exceptions, _models

HEAVY = ("torch", "faiss", "sqlalchemy", "transformers", "typer", "rich")


def test_every_public_class_is_exported() -> None:
    for module in (_exceptions, _models, _access_models):
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                assert name in kvbank.__all__, name


def test_every_export_exists_and_is_listed() -> None:
    for name in kvbank.__all__:
        assert getattr(kvbank, name) is not None
        assert name in dir(kvbank)
    assert not hasattr(kvbank, "nothing_of_the_kind")


def test_every_error_is_drawn_in_the_docstring() -> None:
    drawing = _exceptions.__doc__ or ""
    for name, value in vars(_exceptions).items():
        if inspect.isclass(value) and issubclass(value, Exception):
            assert f" {name} " in drawing.replace("\n", " "), name


@pytest.mark.parametrize(
    ("blocking", "other"),
    [
        (kvbank.Client, kvbank.AsyncClient),
        (kvbank.Access, kvbank.AsyncAccess),
        (kvbank.TextMemory, kvbank.AsyncTextMemory),
    ],
)
def test_both_clients_have_the_same_methods(blocking: type, other: type) -> None:
    sync, asynchronous = _methods(blocking), _methods(other)
    assert sync.keys() == asynchronous.keys()
    for name, method in sync.items():
        mirrored = inspect.signature(asynchronous[name])
        expected = inspect.signature(method)
        for parameter, taken in zip(mirrored.parameters.values(), expected.parameters.values(), strict=True):
            # What a method takes one after the other, a coroutine takes from an asynchronous source, too.
            more = parameter == taken or taken.annotation | AsyncIterable[kvbank.NewChunk] == parameter.annotation
            assert more, name
        _assert_mirrors(name, expected.return_annotation, mirrored.return_annotation, asynchronous[name])
        assert (method.__doc__ or "").strip(), name
        assert asynchronous[name].__doc__ == method.__doc__


def test_an_option_that_there_is_not_is_a_type_error() -> None:
    """Refuse it as any function does, before anything is sent."""
    spec: typing.Any = {"kv": None, "embedding": kvbank.EmbeddingSpec("e", 4), "capacaty": None}
    with kvbank.connect("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match=r"create_bank\(\) got an unexpected keyword argument 'capacaty'"):
            client.create_bank("b", **spec)
        with pytest.raises(TypeError, match=r"retrieve\(\) got an unexpected keyword argument 'layer'"):
            client.retrieve("b", [1.0], layer=[1])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'time'"):
        kvbank.connect("127.0.0.1:1", time=1)  # type: ignore[call-arg]


def _assert_mirrors(name: str, sync: typing.Any, asynchronous: typing.Any, method: typing.Any) -> None:
    if inspect.isasyncgenfunction(method):
        assert typing.get_args(sync) == typing.get_args(asynchronous), name
    else:
        assert inspect.iscoroutinefunction(method), name
        assert sync == asynchronous, name


def _methods(client: type) -> dict[str, typing.Any]:
    return {name: value for name, value in vars(client).items() if inspect.isfunction(value) and name[0] != "_"}


def test_import_needs_nothing_heavy_and_costs_little() -> None:
    """Measure the floor, gRPC and numpy, in the same process, and time of the CPU: others may be busy with it."""
    script = f"""
import json, sys, time
start = time.process_time()
import kvbank
imported = time.process_time() - start
light = [name for name in ("grpc", "numpy", *{HEAVY}) if name in sys.modules]
start = time.process_time()
import grpc, grpc.aio, numpy
floor = time.process_time() - start
start = time.process_time()
kvbank.connect
kvbank.connect_async
used = time.process_time() - start
heavy = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps([imported, light, floor, used, heavy]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported, light, floor, used, heavy = json.loads(run.stdout)
    assert light == []
    assert heavy == []
    assert imported < floor
    assert used < 3 * floor
