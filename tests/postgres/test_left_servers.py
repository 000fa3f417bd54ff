"""Processes of tests that are killed leave no server behind, once another one begins."""

import os
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


@pytest.mark.slow
def test_the_server_of_a_process_that_was_killed_ends_and_its_folder_goes() -> None:
    with subprocess.Popen([sys.executable, "-c", _BEGIN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip().partition("?host=")[2])
        server = int((folder / "postmaster.pid").read_text().split()[0])
        postgres.clean_up()
        os.kill(server, 0)  # it is left alone as long as the process lives
        process.send_signal(signal.SIGKILL)
    postgres.clean_up()
    assert not folder.parent.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
