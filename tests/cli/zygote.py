"""A process that has imported everything and forks for each command, so that a command costs milliseconds.

Each command runs in a process of its own, on descriptors, encodings and limits of its own, and ends as the console
script does, with the interpreter's own end: what that prints is seen, too.
"""

import contextlib
import gc
import io
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
# What a command may take: more than the tiny models need, less than would harm the machine.
_ADDRESSES, _FILE = 12 << 30, 256 << 20


@dataclass(frozen=True)
class Call:
    """A command and its surroundings.

    stdin: bytes, "closed", or a folder. stdout, stderr: "kept", "full" (a full disk), "closed", or "left" (a pipe whose
    reader has left). encoding: of the standard streams. seconds: after which it gets Ctrl-C.
    """

    arguments: Sequence[str]
    stdin: bytes | str = b""
    stdout: str = "kept"
    stderr: str = "kept"
    encoding: str = "utf-8"
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 2.0


@dataclass(frozen=True)
class Ended:
    """The end of a call. interrupted: whether it got Ctrl-C."""

    code: int
    stdout: bytes
    stderr: bytes
    interrupted: bool


class Zygote:
    """The process, as seen from outside."""

    def __init__(self, *, worker: bool = True) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "KVBANK_CACHE": "nowhere",
        }
        for name in [name for name in environment if name.startswith("KVBANK_")]:
            del environment[name]
        environment["KVBANK_CACHE"] = "/nowhere"  # commands must not depend on the models of the machine
        command = [sys.executable, "-m", "tests.cli.zygote", *(["worker"] if worker else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def run(self, call: Call) -> Ended:
        """Run a command to its end."""
        with tempfile.TemporaryDirectory() as outer:
            place = str(Path(outer) / "outer" / "place")
            Path(place).mkdir(parents=True)
            request = {
                **call.__dict__,
                "stdin": call.stdin if isinstance(call.stdin, str) else None,
                "arguments": list(call.arguments),
                "environment": dict(call.environment),
                "place": place,
            }
            if isinstance(call.stdin, bytes):
                (Path(place) / "stdin").write_bytes(call.stdin)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code, interrupted = json.loads(self._process.stdout.readline())
            out, err = ((Path(place) / name) for name in ("stdout", "stderr"))
            return Ended(
                code,
                out.read_bytes() if out.exists() else b"",
                err.read_bytes() if err.exists() else b"",
                interrupted,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()  # its own end would take a second
        self._process.communicate()


def _main() -> None:
    _import_all(worker=sys.argv[1:] == ["worker"])
    gc.freeze()  # what is imported is shared with the children, which would copy what their collector touches
    # A command that is late gets its Ctrl-C when it has begun.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
            _run()
        print(json.dumps(_wait(child, request["seconds"])), flush=True)


def _import_all(worker: bool) -> None:

    from kvbank.commands import application

    application()
    if worker:
        from model_worker.attachment.loading import load_model

        load_model()


def _wait(child: int, seconds: float) -> tuple[int, bool]:
    """Exit code, and whether it got Ctrl-C; what it started ends with it."""
    interrupted = False
    with selectors.DefaultSelector() as selector:
        descriptor = os.pidfd_open(child)
        selector.register(descriptor, selectors.EVENT_READ)
        if not selector.select(seconds):
            interrupted = True
            os.kill(child, signal.SIGINT)
            if not selector.select(60):
                os.kill(child, signal.SIGKILL)
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    # A command that has just ended lets Ctrl-C end it, which a shell calls 130.
    return (130 if code == -signal.SIGINT and interrupted else code), interrupted


def _become(request: dict[str, Any]) -> None:
    """Take the arguments, streams and limits of a call."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
    os.environ.update(request["environment"])
    place = Path(request["place"])
    os.chdir(place)
    _open(0, request["stdin"] or str(place / "stdin"), place / "stdin", os.O_RDONLY)
    for number, name in ((1, "stdout"), (2, "stderr")):
        _open(number, request[name], place / name, os.O_WRONLY | os.O_CREAT)
    encoding = request["encoding"]
    for number, name, mode, errors in (
        (0, "stdin", "r", "strict"),
        (1, "stdout", "w", "strict"),
        (2, "stderr", "w", "backslashreplace"),
    ):
        stream: Any = None
        with contextlib.suppress(OSError):  # closed
            stream = open(number, mode, encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115 (a standard stream)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(line_buffering=True)
    sys.argv = ["kvbank", *request["arguments"]]


def _run() -> None:
    """Run the console script, and end without the second that the end of an interpreter with torch takes."""
    from kvbank.cli import main

    code: Any = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        main()
    except KeyboardInterrupt:  # before it began
        code = 130
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # as the interpreter does
    os._exit(code)


def _open(number: int, what: str, kept: Path, flags: int) -> None:
    if what == "closed":
        os.close(number)
        return
    if what == "left":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)
        return
    path = {"kept": str(kept), "full": "/dev/full"}.get(what, what)
    descriptor = os.open(path, flags, 0o600)
    os.dup2(descriptor, number)
    os.close(descriptor)


if __name__ == "__main__":
    _main()
