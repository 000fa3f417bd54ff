"""A Redis of our own on a unix socket; persistence as the worker asks."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry


@contextmanager
def running(folder: str, *, append_only: bool) -> Iterator[redis.Redis]:
    """append_only: every answer after an fsync of the log (appendfsync always); otherwise memory only."""
    short = tempfile.mkdtemp()
    socket = f"{short}/redis.sock"
    options = ["--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder, "--daemonize", "no"]
    options += ["--appendonly", "yes" if append_only else "no", "--appendfsync", "always"]
    with subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL) as process:
        try:
            patient = Retry(ConstantBackoff(0.05), 200)
            client = redis.Redis(
                unix_socket_path=socket, retry=patient, retry_on_error=[ConnectionError, FileNotFoundError]
            )
            while not Path(socket).exists() and process.poll() is None:
                pass
            client.ping()
            yield client
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree(short)
