"""A Redis server for the workers that need one, on a unix socket or a port of the loopback of its own."""

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry


@contextmanager
def running(folder: str, *, append_only: bool, tcp: bool = False) -> Iterator[redis.Redis]:
    """Run an empty Redis and yield its client; the end of the context ends the server.

    folder: where the server writes. append_only: it answers after an fsync of its log (`appendfsync always`); otherwise
    it keeps data in memory only. tcp: the client calls over TCP.
    """
    short = tempfile.mkdtemp()
    path, port = f"{short}/redis.sock", _free_port() if tcp else 0
    options = ["--bind", "127.0.0.1", "--port", str(port), "--unixsocket", path, "--save", "", "--dir", folder]
    options += ["--daemonize", "no"]
    options += ["--appendonly", "yes" if append_only else "no", "--appendfsync", "always"]
    with subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL) as process:
        try:
            patient = Retry(ConstantBackoff(0.05), 200)
            place = {"host": "127.0.0.1", "port": port} if tcp else {"unix_socket_path": path}
            client = redis.Redis(**place, retry=patient, retry_on_error=[ConnectionError, FileNotFoundError])
            while not Path(path).exists() and process.poll() is None:
                pass
            client.ping()
            yield client
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree(short)


def _free_port() -> int:
    """Return a port of the loopback that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
