"""The memory service in processes of their own, that can be killed, traced and started again, twenty in a second.

A host process imports the service once and forks for every start; what is forked runs `kvbank serve`, or a command that
works on a folder.
"""

import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
# A start may meet a busy machine, and a clean stop a long checkpoint.
PATIENCE = 120


class StartFailed(Exception):
    """What the service said before it gave up; `code`: its exit status, negative for a signal."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"exit status {code}: {text}")
        self.code = code
        self.text = text


class ServiceHost:
    """A process that starts services and runs commands. environment: variables on top of those of this process.

    module: what the process runs.
    """

    module = "tests.support.service_process"

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvbank-proof-")
        self._starts = 0
        command = [sys.executable, "-m", self.module]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # As the commands set it before gRPC is imported, whose core would log bytes of callers as they are.
        environment = {"GRPC_VERBOSITY": "NONE"} | os.environ | (environment or {})
        self._process = subprocess.Popen(command, **pipes, text=True, env=environment, cwd=ROOT)

    def start(self, data: Path | str, **flags: Any) -> "Service":
        """Serve a data folder, or a database, and return when the service is ready.

        flags: those of `kvbank serve`; `listen` is a unix socket of its own unless it is given. The service has the
        variables by which this process reaches a bucket. Errors: StartFailed.
        """
        place = self.place()
        flags = {"data": str(data), "listen": f"unix:{place}", "min_free": 0} | flags
        bucket = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        flags["ready_file"] = f"{place}.ready"
        number = self.ask({"start": flags, "log": f"{place}.log", "environment": bucket})
        return Service(self, number, place)

    def place(self) -> Path:
        """Return a path of a start's own, for its log and the like."""
        self._starts += 1
        return Path(self._folder.name, str(self._starts))

    def run(self, *words: object, **environment: str) -> tuple[int, str]:
        """Run `kvbank WORDS` to its end; return the exit status, negative for a signal, and what it printed.

        environment: variables besides those of the host.
        """
        log = self.place().with_suffix(".log")
        number = self.ask({"run": [str(word) for word in words], "log": str(log), "environment": environment})
        ended = os.pidfd_open(number)
        assert select.select([ended], [], [], PATIENCE)[0], f"kvbank {words} does not end"
        os.close(ended)
        return self.ask({"wait": number}), log.read_text(errors="replace")

    def kill_all(self) -> None:
        """Kill what still runs, and wait for its end."""
        self.ask({"kill_all": True})

    def ask(self, request: dict[str, Any]) -> int:
        """Send one request to the host process, and return the number that it answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the host process, with the services that still run."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> "ServiceHost":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Service:
    """One start of a service or worker, made by `start` of its host; `address` is what clients connect to."""

    def __init__(self, host: ServiceHost, number: int, place: Path) -> None:
        self.process_id = number
        self._host = host
        self._log = place.with_suffix(".log")
        self._ended = os.pidfd_open(number)
        self._code: int | None = None
        ready, deadline = place.with_suffix(".ready"), time.monotonic() + PATIENCE
        while not ready.exists():
            if not self.alive():
                raise StartFailed(self.wait(), self.log())
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.003)
        self.address = ready.read_text().strip()

    def log(self) -> str:
        """Return what the service has printed."""
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        """Tell whether the service runs."""
        return self._code is None and not select.select([self._ended], [], [], 0)[0]

    def kill(self) -> None:
        """Kill the service with SIGKILL, and wait for its end."""
        if self._code is None:
            signal.pidfd_send_signal(self._ended, signal.SIGKILL)
            self.wait()

    def stop(self) -> int:
        """Stop the service with SIGTERM, wait for its end, and return its exit status."""
        signal.pidfd_send_signal(self._ended, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end, and return the exit status, negative for a signal."""
        if self._code is None:
            assert select.select([self._ended], [], [], PATIENCE)[0], "the service does not end\n" + self.log()
            os.close(self._ended)
            self._code = self._host.ask({"wait": self.process_id})
        return self._code

    def resident_bytes(self) -> int:
        """Return the memory that the service has now."""
        fields = Path(f"/proc/{self.process_id}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak_bytes(self) -> int:
        """Return the most memory that the service has had since `forget_peak`."""
        lines = Path(f"/proc/{self.process_id}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    def forget_peak(self) -> None:
        """Begin anew to look for the most memory that the service has."""
        Path(f"/proc/{self.process_id}/clear_refs").write_text("5")


def _host() -> None:
    """Start services and run commands, as requests on the input of this process ask for."""
    # All that a child would import else, at ten times the cost of its start.
    import typer  # noqa: F401

    from kvbank.console import ending  # noqa: F401
    from memory_service.api import server  # noqa: F401
    from memory_service.care import backup, repair, restore  # noqa: F401
    from memory_service.cli import serve  # noqa: F401

    serve_requests(_task)


def _task(request: dict[str, Any]) -> Callable[[], None] | list[str]:
    if "start" not in request:
        return list(request["run"])
    if "://" in request["start"]["data"]:
        from memory_service.storage.postgres import engine  # noqa: F401
    return partial(_serve, request["start"])


def serve_requests(task_of: Callable[[dict[str, Any]], Callable[[], None] | list[str]]) -> None:
    """Fork for each request on the input of this process, and say the number of the child. task_of: makes what the
    child does of the request."""
    gc.freeze()  # it is shared with the children, which would copy what their collector touches
    children: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            children.discard(request["wait"])
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        if "kill_all" in request:
            _kill(children)
            print(0, flush=True)
            continue
        task = task_of(request)
        child = os.fork()
        if child == 0:
            os.environ.update(request.get("environment", {}))
            _child(Path(request["log"]), task)
        children.add(child)
        print(child, flush=True)
    _kill(children)


def _kill(children: set[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    children.clear()


def _child(log: Path, task: Callable[[], None] | list[str]) -> None:
    """Do a task, or run the words of a command, with its output in a file; this does not return."""
    import typer

    from kvbank.console import ending
    from memory_service.cli import serve

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(0)
    code = 70
    try:
        if callable(task):
            task()
        else:
            serve.register(commands := typer.Typer())
            ending.run(commands, arguments=task)
        code = 0
    except ending.Failed as end:
        ending.say(str(end))
        code = end.code
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(flags: dict[str, Any]) -> None:
    from memory_service.cli import serve

    serve.serve(**flags | {"ready_file": Path(flags["ready_file"])})


if __name__ == "__main__":
    _host()
