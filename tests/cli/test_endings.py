"""Commands end as they should in real processes on pipes, disks and encodings, also by errors that were not
foreseen."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import kvbank
from kvbank.console import ending
from tests.support import command

KVBANK = [sys.executable, "-c", "from kvbank.cli import main; main()"]


def kvbank_process(*arguments: str, environment: dict[str, str] | None = None, **streams: Any) -> Any:
    """Start the console script, with buffered streams as a person has them."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **streams}
    return subprocess.run(
        [*KVBANK, *arguments], env={**known, **(environment or {})}, check=False, timeout=120, **given
    )


def test_a_full_disk_behind_the_output() -> None:
    with open("/dev/full", "wb") as full:
        ended = kvbank_process("--help", stdout=full)
        assert (ended.returncode, ended.stderr) == (1, b"kvbank: the output: No space left on device\n")


def test_a_reader_that_has_left() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = kvbank_process("--help", stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_closed_streams_are_not_mixed_up_with_files(tmp_path: Path) -> None:
    """Files that are opened first would get the number of stdout, and what is printed would be in them."""
    shell = f"{' '.join(map(_quoted, KVBANK))} ping {tmp_path / 'folder'} >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", shell], check=False, timeout=120).returncode == 0
    with kvbank.connect(tmp_path / "folder") as client:
        assert list(client.list_banks()) == []


def _quoted(word: str) -> str:
    return f"'{word}'"


def test_letters_that_the_output_has_not_are_escaped() -> None:
    ended = kvbank_process("ping", "nobody-🙂é", environment={"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"})
    assert ended.returncode == 1
    assert ended.stderr.isascii()
    assert ended.stderr.count(b"\n") == 1


def _app(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        print("begun")
        raise error

    @app.callback()
    def root(debug: bool = False) -> None:
        pass

    return app


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (kvbank.KVBankError("no\nwonder \x1b[31m"), 1, r"no wonder \x1b[31m"),
        (ending.Failed("so it is", 7), 7, "so it is"),
        (OSError(28, "No space left on device", "a[b]", None, "c"), 1, "a[b] to c: No space left on device"),
        (PermissionError(13, "Permission denied", b"caf\xe9"), 1, r"caf\udce9: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (MemoryError(), 1, "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1"), 1, "there is not enough memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "pip install 'kvbank[worker]'"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "why"), 1, "is not utf-8: byte 0xe9"),
        (UnicodeEncodeError("ascii", "\xe9", 0, 1, "why"), 1, "cannot be said in ascii"),
        (RuntimeError("Symlink loop from 'a'"), 1, "Symlink loop from 'a'"),
        (EOFError(), 1, "nothing was done"),
        (typer.Exit(3), 3, ""),
        (typer.BadParameter("seven"), 2, "seven"),
        (SystemExit(5), 5, ""),
        (SystemExit("words"), 1, "words"),
    ],
)
def test_every_error_is_one_line_and_a_code(error: BaseException, code: int, line: str) -> None:
    ended = command.run(_app(error), "fail")
    assert ended.exit_code == code
    assert line in ended.stderr
    assert ended.stderr.count("\n") == int(bool(line))
    assert ended.stdout == "begun\n"


def test_a_defect_is_one_line_and_its_traceback_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = command.run(_app(ZeroDivisionError("by\nnothing")), "fail")
    assert ended.exit_code == 70
    found = re.fullmatch(
        r"kvbank: ZeroDivisionError: by nothing; this is a defect of kvbank, the traceback is in (.*)\n", ended.stderr
    )
    assert found is not None
    kept = Path(found[1])
    assert "Traceback" in kept.read_text()
    assert kept.stat().st_mode & 0o77 == 0
    kept.unlink()
    assert "Traceback" in command.run(_app(ZeroDivisionError()), "--debug", "fail").stderr
    monkeypatch.setenv("KVBANK_DEBUG", "1")
    assert "Traceback" in command.run(_app(kvbank.KVBankError("x")), "fail").stderr


def test_the_exit_codes_are_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    rows = [int(code) for code in re.findall(r"^\| `(\d+)` \|", text, re.MULTILINE)]
    assert rows == [0, 1, 2, 70, 130, 141]


def test_a_question_without_an_answer_does_nothing() -> None:
    app = typer.Typer()

    @app.command()
    def ask() -> None:
        typer.confirm("Sure?", abort=True, err=True)

    for answer in ("", "n\n"):
        ended = command.run(app, stdin=answer)
        assert ended.exit_code == 1
        assert ended.stderr.endswith("nothing was done: the question was not answered with yes\n")
    latin = io.TextIOWrapper(io.BytesIO(b"\xe9\nn\n"), "utf-8", errors="surrogateescape")
    assert command.run(app, stdin=latin).exit_code == 1


_BESIDE = r"""
import logging, threading
from kvbank.console import aside

class Fails:
    def __del__(self):
        raise ValueError("in a finalizer")

aside.listen()
logging.getLogger("of.others").warning("said \x1b[31m\nby a library")
Fails()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
"""


def test_what_happens_beside_a_command_is_a_line_or_nothing() -> None:
    """Records of libraries, threads that fail, finalizers that fail."""
    ended = subprocess.run([sys.executable, "-c", _BESIDE], capture_output=True, text=True, check=False, timeout=120)
    said, failed = ended.stderr.splitlines()
    assert said == r"kvbank: said \x1b[31m by a library"
    assert failed.startswith("kvbank: ZeroDivisionError: division by zero; this is a defect of kvbank, the traceback ")
    Path(failed.rpartition(" ")[2]).unlink()


_INTERRUPTED_IN_A_FINALIZER = r"""
import signal, time
from kvbank.console import aside

class Slow:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

aside.listen()
try:
    Slow()
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_is_not_swallowed_by_a_finalizer() -> None:
    command = [sys.executable, "-c", _INTERRUPTED_IN_A_FINALIZER]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (ended.stdout, ended.stderr) == ("interrupted\n", "")


def test_ctrl_c_while_a_module_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """Test that an ImportError which a module in C makes of Ctrl-C ends as Ctrl-C does."""
    app = typer.Typer()

    @app.command()
    def load() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None

    with pytest.raises(SystemExit) as ended:
        ending.run(app, arguments=[])
    assert (ended.value.code, capsys.readouterr().err) == (130, "kvbank: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
