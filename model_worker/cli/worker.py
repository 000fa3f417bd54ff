"""`kvbank worker` begins here, with the checks that need no model.

The module is light to import: torch and the server come with the call.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbank.console.output import print_line
from kvbank.serving.listening import Listening, address_of, write_address
from kvbank.serving.service import check_asks_for_keys, service_address
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
    target = service_address(memory)
    place = Listening("the worker", options.listen, options.tls_cert, options.tls_key, options.insecure)
    place.check()
    model_folder(options.model)  # what can be said at once is said before a model is loaded
    listening = place.socket()
    address = address_of(listening)
    # A key in the environment would be the worker's own.
    os.environ.pop("KVBANK_API_KEY", None)

    from model_worker.cli.quiet import quiet_libraries
    from model_worker.http.server import serve
    from model_worker.serve.served import Bounds, Served

    quiet_libraries()
    name = options.name or options.model
    served = Served(
        name,
        target,
        bounds=Bounds(options.running, options.waiting, options.max_new_tokens, options.max_body),
        needs_key=place.needs_key,
        own_only=place.own_only,
        window=options.window,
        recent=options.recent,
        why=options.trace,
    )

    def ready() -> None:
        print_line(f"kvbank worker serving {name} on {place.scheme}://{address}/v1 with the memory at {target}")
        sys.stdout.flush()
        if ready_file is not None:
            write_address(ready_file, address)

    load = _loading(options, target, place.needs_key)
    serve(served, load, listening, ready=ready, grace=options.grace, tls=place.tls)


def _loading(options: WorkerOptions, target: str, needs_keys: bool) -> "Callable[[], MemoryModel]":
    """Return a function that loads the model; callers of the worker bring clients of their own.

    needs_keys: whether the service has to ask for keys.
    """

    def load() -> "MemoryModel":
        if needs_keys:
            check_asks_for_keys(target)
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
