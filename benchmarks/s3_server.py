"""The floor of a bucket: a server that speaks S3 and keeps all in memory, in a process of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from benchmarks.lines import Worker, serve

BUCKET = "benchmarks"


@contextmanager
def bucket(folder: Path) -> Iterator[str]:
    """Run the server with an empty bucket of this name, and yield its URL. folder: where its log is written."""
    with Worker(__name__, log=folder / "s3_server.log") as worker:
        yield worker.call("url")


def _main() -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    connection = HTTPConnection(host, port)
    connection.request("PUT", f"/{BUCKET}")
    connection.getresponse().read()
    serve({"url": lambda: f"http://{host}:{port}"})
    server.stop()


if __name__ == "__main__":
    _main()
