"""A `kvbank` for shells that costs milliseconds: a small program on the path hands its words, folder, variables and
streams to a process that has imported everything, and forks for each command."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PROGRAM = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as host:
    host.connect({address!r})
    said = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(host, [len(said).to_bytes(4, "big")], [0, 1, 2])
    host.sendall(said)
    sys.exit(int(host.makefile().read() or 70))
"""


def free_ports(count: int) -> list[str]:
    """Return ports of the loopback that were free a moment ago, for programs that take no port 0."""
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in bound:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in bound]


@contextmanager
def kvbank_on_path() -> Iterator[str]:
    """Yield a value of the variable PATH by which a shell finds that `kvbank`."""
    with tempfile.TemporaryDirectory(prefix="kvbank-") as folder:
        address, program = f"{folder}/host", Path(folder, "kvbank")
        program.write_text(_PROGRAM.format(python=sys.executable, address=address))
        program.chmod(0o700)
        command = [sys.executable, "-m", "tests.support.shell_commands", address]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as host:
            assert host.stdout is not None
            host.stdout.readline()
            try:
                yield f"{folder}{os.pathsep}{os.environ['PATH']}"
            finally:
                host.terminate()


def _host(address: str) -> None:
    """Fork for each program that connects to the address."""
    import kvbank.cli
    from memory_service.api import embedded, server  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            caller, _ = listening.accept()
            if os.fork() == 0:
                _command(caller, kvbank.cli.main)
            caller.close()


def _command(caller: socket.socket, main: object) -> None:
    """Run the command of a caller, and tell it the exit status; this does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(caller, 4, 3)
    data = b""
    while len(data) < int.from_bytes(head, "big"):
        data += caller.recv(65536)
    sys.argv, folder, variables = json.loads(data)
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    code = 70
    try:
        main()  # type: ignore[operator]
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        caller.sendall(str(code).encode())
        os._exit(0)


if __name__ == "__main__":
    _host(sys.argv[1])
