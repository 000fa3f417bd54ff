"""A Redis server for the workers that need one, on a unix socket of its own."""

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
    """Run an empty Redis and yield its client; the end of the context ends the server.

    folder: where the server writes. append_only: it answers after an fsync of its log (`appendfsync always`); otherwise
    it keeps data in memory only.
    """
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
