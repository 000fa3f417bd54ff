"""`kvbank worker` in processes of their own, that can be killed and started again: a host process imports the libraries
of models once, and forks for every start."""

import os
import sys
from pathlib import Path
from typing import Any

from tests.support.service_process import Service, ServiceHost, serve_requests


class WorkerHost(ServiceHost):
    """A process that starts workers, each with one thread of torch."""

    module = "tests.support.worker_process"

    def work(self, model: Path, memory: str, **flags: Any) -> Service:
        """Serve a model, and return the worker when it answers requests. flags: those of `kvbank worker`. Errors:
        StartFailed."""
        place = self.place()
        said = {"model": model, "memory": memory, "listen": "127.0.0.1:0", "ready_file": f"{place}.ready"} | flags
        words = [word for name, value in said.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return Service(self, self.ask({"work": words, "log": f"{place}.log"}), place)


def _work(words: list[str]) -> None:
    from kvbank.cli import main

    sys.stdin = open(os.devnull)  # noqa: SIM115  # the host reads the other one
    sys.argv = ["kvbank", "worker", *words]
    main()


def _host() -> None:
    """Start workers, as requests on the input of this process ask for."""
    import torch

    # All that a worker would import else, which takes longer than all else of its start.
    from model_worker.http import server  # noqa: F401
    from model_worker.model import MemoryModel  # noqa: F401

    torch.set_num_threads(1)
    serve_requests(lambda request: lambda: _work(request["work"]))


if __name__ == "__main__":
    _host()
