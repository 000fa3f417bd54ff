"""`kvbank worker` begins here, with the checks that need no model.

The module is light to import: torch and the server come with the call.
"""

import os
import shlex
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import kvbank
from kvbank.console.ending import USAGE, Failed
from kvbank.console.output import print_line
from kvbank.wire.addresses import is_own
from model_worker.attachment.model_names import lasting, model_folder
from model_worker.cli.worker_options import WorkerOptions
from model_worker.settings.flags import takes

if TYPE_CHECKING:
    from model_worker.model import MemoryModel

Memory = Annotated[
    str, typer.Option("--memory", "-m", envvar="KVBANK_MEMORY", help="Memory service: HOST:PORT of `kvbank serve`.")
]


@takes(WorkerOptions)
def worker(
    options: WorkerOptions,
    memory: Memory = "127.0.0.1:7400",
    ready_file: Annotated[Path | None, typer.Option(help="Write the address here when requests are answered.")] = None,
) -> None:
    """Serve a model that remembers to clients of OpenAI's API.

    A caller's key (Authorization: Bearer KEY) goes to the memory service as
    it is: the worker has no rights of its own.

    Example: kvbank worker --model smollm2 --memory 127.0.0.1:7400 --listen 127.0.0.1:8000
    """
    target = _service(memory)
    _check_listen(options)
    model_folder(options.model)  # what can be said at once is said before a model is loaded
    listening = _listening(options.listen)
    address = _address(listening)
    # A key in the environment would be the worker's own.
    os.environ.pop("KVBANK_API_KEY", None)

    from model_worker.cli.quiet import quiet_libraries
    from model_worker.http.server import serve
    from model_worker.serve.served import Bounds, Served

    quiet_libraries()
    scheme = "http" if options.tls_cert is None else "https"
    name = options.name or options.model
    served = Served(
        name,
        target,
        bounds=Bounds(options.running, options.waiting, options.max_new_tokens, options.max_body),
        needs_key=not (options.insecure or is_own(options.listen)),
        window=options.window,
        recent=options.recent,
    )

    def ready() -> None:
        print_line(f"kvbank worker serving {name} on {scheme}://{address}/v1 with the memory at {target}")
        sys.stdout.flush()
        if ready_file is not None:
            _write(ready_file, address)

    tls = None if options.tls_cert is None or options.tls_key is None else (options.tls_cert, options.tls_key)
    serve(served, _loading(options, target), listening, ready=ready, grace=options.grace, tls=tls)


def _loading(options: WorkerOptions, target: str) -> "Callable[[], MemoryModel]":
    """Return a function that loads the model; callers of the worker bring clients of their own."""

    def load() -> "MemoryModel":
        if not (options.insecure or is_own(options.listen)):
            _check_keys(target)
        from model_worker.attachment.loading import device_named
        from model_worker.model import MemoryModel

        return MemoryModel.from_pretrained(
            lasting(options.model),
            memory=target,
            bank=(),
            device=device_named(options.device),
            dtype=options.dtype,
            adapter=options.adapter,
            local=options.local,
            compressor=options.compressor,
            **options.model_settings(),
        )

    return load


def _check_keys(target: str) -> None:
    """Refuse a service that asks for no key, for a worker that others can reach. Raises Failed."""
    with kvbank.connect(target) as client, suppress(kvbank.Unauthenticated):
        client.server_info()
        raise Failed(
            f"the service at {target} asks for no key, so whoever reaches this worker would be the owner of its store: "
            "make a key first (kvbank key create), listen on 127.0.0.1, or allow it by --insecure"
        )


def _service(memory: str) -> str:
    """Return the address of the memory service. Raises Failed for a folder and for a unix socket."""
    target = kvbank.parse_target(memory)
    if isinstance(target, Path):
        raise Failed(
            f"--memory {memory} is a folder, and a worker needs a service: kvbank serve --data {shlex.quote(memory)} "
            "--listen 127.0.0.1:7400, then --memory 127.0.0.1:7400",
            USAGE,
        )
    if target.startswith("unix:"):
        raise Failed(
            f"--memory {memory} is a unix socket, on which every caller of the worker would be the owner of the store: "
            "let the service listen on HOST:PORT",
            USAGE,
        )
    return target


def _check_listen(options: WorkerOptions) -> None:
    """Refuse what is no address, and one that others can reach without TLS. Raises Failed."""
    host, _, port = options.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise Failed(f"--listen {options.listen} is not HOST:PORT", USAGE)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise Failed("a certificate has a key: give both, --tls-cert and --tls-key", USAGE)
    for option, file in (("--tls-cert", options.tls_cert), ("--tls-key", options.tls_key)):
        if file is not None and not file.is_file():
            raise Failed(f"{option}: there is no file {file}", USAGE)
    if not (options.insecure or options.tls_cert or is_own(options.listen)):
        raise Failed(
            f"{options.listen} can be reached by others: give the worker a certificate (--tls-cert, --tls-key), listen "
            "on 127.0.0.1, or allow it as it is by --insecure",
            USAGE,
        )


def _listening(listen: str) -> socket.socket:
    """Return a socket that listens at an address. Raises Failed where it cannot be had."""
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, int(port)), family=family)
    except OSError as error:
        raise Failed(f"cannot listen on {listen}: {error.strerror}") from None


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _write(ready_file: Path, address: str) -> None:
    """Write the address into a file that has it whole as soon as it is there."""
    temporary = ready_file.with_suffix(".tmp")
    temporary.write_text(address + "\n")
    temporary.rename(ready_file)
