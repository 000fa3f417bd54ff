"""A PostgreSQL server of a test's own, that can be killed and started again."""

from typing import Any

from tests.support.postgres import new_server


class OwnPostgres:
    """A server that nothing else uses, with a database that is empty at first. It ends with this process."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process
        self._server: Any = new_server()

    @property
    def socket(self) -> str:
        """Return the path of the unix socket on which the server listens."""
        information = self._server.get_postmaster_info()
        return f"{information.socket_dir}/.s.PGSQL.{information.port or 5432}"

    def kill(self) -> None:
        """Kill all processes of the server with SIGKILL, and wait for their end."""
        main = self._process(self._server.get_pid())
        main.suspend()  # so that it starts no further process meanwhile
        processes = [*main.children(recursive=True), main]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait(60)

    def start(self) -> None:
        """Start the server again, which recovers from its log what was committed."""
        self._server.ensure_postgres_running()
