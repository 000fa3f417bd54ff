"""The memory service in a process of its own, so that it can be killed.

The process is started on the address that it had before, so that clients find it again after a kill.
"""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn, Self

from model_worker.errors import WorkerError

_START_S, _STOP_S = 60.0, 30.0
_TERMINATED = 128 + signal.SIGTERM


class ServiceProcess:
    """A `python -m memory_service` on a folder, which holds its store and its log.

    address: where the service listens, empty before the first start. record: the trace to which it records. The class
    is a context manager, which also stops the service where this process is asked to end by SIGTERM.
    """

    def __init__(self, folder: Path, record: Path | None = None):
        self.folder, self.address = folder.absolute(), ""
        self._record = record
        self._process: subprocess.Popen[bytes] | None = None
        self._handled_before: Any = None

    def start(self) -> str:
        """Start on the address that the service had before, or on a free port; return the address once it serves.

        Raises WorkerError where the service ends, or does not serve within a minute.
        """
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "memory_service", "--data", str(self.folder / "store")]
        command += ["--listen", self.address or "127.0.0.1:0", "--ready-file", str(ready)]
        command += [] if self._record is None else ["--record", str(self._record)]
        with (self.folder / "service.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self.address = self._wait_for(ready)
        except BaseException:
            self.kill()
            raise
        return self.address

    def _wait_for(self, ready: Path) -> str:
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if ready.exists() and (address := ready.read_text().strip()):
                return address
            time.sleep(0.02)
        raise WorkerError(f"the memory service did not start; see {self.folder / 'service.log'}")

    def kill(self) -> None:
        """Kill the process with SIGKILL: it can neither say goodbye nor flush anything."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """Shut the service down cleanly, and kill a service that takes longer than half a minute."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else the caller ends the block itself
            self._handled_before = signal.signal(signal.SIGTERM, _end)
        try:
            self.start()
        except BaseException:
            self._handle_as_before()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._handle_as_before()

    def _handle_as_before(self) -> None:
        if self._handled_before is not None:
            signal.signal(signal.SIGTERM, self._handled_before)
            self._handled_before = None


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(_TERMINATED)
