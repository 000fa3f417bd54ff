"""The service of an evaluation or a demo ends with the command that started it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kvbank

COMMAND = """
import sys, threading
from pathlib import Path
from model_worker.evaluate.service_process import ServiceProcess

with ServiceProcess(Path(sys.argv[1])) as service:
    print(service.address, flush=True)
    threading.Event().wait()
"""


def test_a_command_that_is_asked_to_end_stops_its_service(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path)], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        address = command.stdout.readline().strip()
        with kvbank.connect(address) as client:
            assert client.server_info().store_id
            command.send_signal(signal.SIGTERM)
            assert command.wait(60) == 128 + signal.SIGTERM
        with kvbank.connect(address, first_contact=0.5) as client, pytest.raises(kvbank.Unavailable):
            client.server_info()
