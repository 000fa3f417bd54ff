"""Several processes share the tests that one has collected, and nothing of a test is lost or done twice."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import Shares

ROOT = Path(__file__).parents[1]
TESTS = """
import atexit, os, signal, subprocess, sys
from pathlib import Path
import pytest

HERE = Path(__file__).parent
BOUND = sys.stderr  # as libraries do for the default of an argument

@pytest.fixture(scope="module")
def noted():
    process = os.getpid()
    atexit.register(lambda: (HERE / f"exit-{process}").touch(exist_ok=False))
    yield lambda word: (HERE / f"{word}-{process}").touch(exist_ok=False)
    (HERE / f"down-{process}").touch(exist_ok=False)

@pytest.mark.parametrize("number", range(40))
def test_passes(noted, tmp_path, number):
    noted(f"test{number}")
    (tmp_path / "file").touch(exist_ok=False)

def test_captures(capfd):
    os.system("echo of a child")
    assert capfd.readouterr().out == "of a child\\n"

def test_what_was_bound_at_the_import_is_captured(capfd):
    subprocess.run(["echo", "of a child"], stdout=BOUND)
    print("of the test", file=BOUND, flush=True)
    with pytest.raises(OSError):
        sys.stdin.read()

def test_fails():
    os.system("echo told of a failure")
    assert 1 == 2, "of purpose"

def test_dies():
    os.kill(os.getpid(), signal.SIGKILL)

def test_is_skipped():
    pytest.skip("for a reason")
"""


def test_tests_run_once_each_and_their_ends_are_told(tmp_path: Path) -> None:
    (tmp_path / "test_shared.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    start = f"import sys, pytest; sys.path[:0] = [{str(ROOT)!r}]; sys.exit(pytest.main())"
    words = ["-ra", "-p", "no:cacheprovider", "-p", "no:schemathesis", "-p", "tests.forks", "--forks", "3"]
    done = subprocess.run(
        [sys.executable, "-c", start, *words, "--basetemp", str(tmp_path / "temporary"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    last = re.sub(r" in .*", "", done.stdout.splitlines()[-1].strip("= "))
    assert last == "2 failed, 42 passed, 1 skipped"
    for told in (
        "of purpose",
        "told of a failure",
        "test_dies - The process of this test has ended with -9.",
        "reason",
    ):
        assert told in done.stdout
    names = sorted(path.name.partition("-")[0] for path in tmp_path.glob("*-*"))
    tests, processes = [name for name in names if name.startswith("test")], len(set(tmp_path.glob("exit-*")))
    assert tests == sorted(f"test{number}" for number in range(40))
    assert processes >= 2
    assert len(set(tmp_path.glob("down-*"))) == processes


@pytest.mark.parametrize(("tests", "processes"), [(10, 3), (2, 3), (7, 1)])
def test_who_has_none_left_takes_half_of_what_another_has(tests: int, processes: int) -> None:
    shares = Shares(tests, processes)
    own = [shares.take(0) for _ in range(tests)]
    assert sorted(own) == list(range(tests))
    assert own[: tests // processes] == list(range(tests // processes))
    assert [shares.take(process) for process in range(processes)] == [None] * processes
