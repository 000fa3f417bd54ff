"""Processes of tests that are killed leave no server behind, once another one begins."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import postgres

pytestmark = pytest.mark.skipif(bool(postgres.missing()), reason=postgres.missing())
_BEGIN = """
import time
from tests.support import postgres
with postgres.database(empty=True) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def command_of(process: int) -> bytes:
    """Return the command line of a process; empty where it has ended, though init has not yet taken note of that."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_the_server_of_a_process_that_was_killed_ends_and_its_folder_goes() -> None:
    with subprocess.Popen([sys.executable, "-c", _BEGIN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip().partition("?host=")[2])
        server = int((folder / "postmaster.pid").read_text().split()[0])
        postgres.clean_up()
        assert command_of(server)  # it is left alone as long as the process lives
        process.send_signal(signal.SIGKILL)
    postgres.clean_up()
    assert not folder.parent.exists()
    assert not command_of(server)
