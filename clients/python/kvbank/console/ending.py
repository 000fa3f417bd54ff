"""Every command ends here. Whatever it raises becomes at most one line on stderr, and one of these exit codes.

0    done.
1    refused or failed; the line says what, and where it can, what to do.
2    wrong usage; the line names the option or argument, and the command's help.
70   a defect of kvbank (EX_SOFTWARE of sysexits.h); the line names the file that has the traceback.
130  interrupted with Ctrl-C (128 + SIGINT).
141  the reader of the output has left (128 + SIGPIPE); nothing is said.

With `--debug` or KVBANK_DEBUG=1 the traceback of every error is shown besides.
"""

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NoReturn, TypeAlias

import typer

from kvbank._exceptions import KVBankError
from kvbank.console.help import make_literal
from kvbank.console.output import one_line
from kvbank.console.streams import lost_output

FAILED, USAGE, DEFECT, INTERRUPTED, READER_LEFT = 1, 2, 70, 130, 141

# An exit code, and the line that is said with it; empty for none.
End: TypeAlias = tuple[int, str]
_NOT_CONFIRMED: End = (FAILED, "nothing was done: the question was not answered with yes")

# What an optional part of the package imports, and the extra that installs it.
_EXTRA_OF_MODULE = {
    **dict.fromkeys(("alembic", "faiss", "grpc_health", "grpc_reflection", "sqlalchemy"), "server"),
    **dict.fromkeys(("prometheus_client", "pydantic", "memory_service"), "server"),
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors", "platformdirs", "model_worker"), "worker"),
    **dict.fromkeys(("gguf", "accelerate"), "worker"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn"), "http"),
    **dict.fromkeys(("mcp", "mcp_types", "anyio"), "mcp"),
    **dict.fromkeys(("peft", "sacrebleu"), "icae"),
    **dict.fromkeys(("matplotlib", "scipy"), "eval"),
}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # torch says so in a RuntimeError


class Failed(Exception):
    """The error of a command that cannot go on. Its text is one line for people."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code


def run(app: typer.Typer, name: str = "kvbank", arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command of `app` and end the process. arguments: words of the command line; None: those of the process."""
    command = _command(app)
    context: Any = None
    interrupts: list[int] = []
    try:
        with _noted(interrupts), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            context = command.make_context(name, list(sys.argv[1:] if arguments is None else arguments))
            with context:
                command.invoke(context)
            sys.stdout.flush()
    except BaseException as error:
        debugging = bool(context is not None and context.params.get("debug")) or wants_debugging()
        if interrupts and isinstance(error, ImportError):
            error = KeyboardInterrupt()
        raise SystemExit(_tell(error, debugging)) from None
    raise SystemExit(0)


@contextmanager
def _noted(interrupts: list[int]) -> Iterator[None]:
    """Note in `interrupts` each Ctrl-C that becomes a KeyboardInterrupt.

    A module written in C that is being loaded just then turns the KeyboardInterrupt into an ImportError, which names no
    cause. Handlers that a command sets itself are left alone.
    """

    def note(number: int, frame: Any) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@lru_cache(maxsize=1)
def _command(app: typer.Typer) -> Any:
    """Return the commands of `app` with literal help. They are made once for as long as a process runs the same `app`:
    to make all of kvbank's takes as long as many a command runs."""
    command = typer.main.get_command(app)
    make_literal(command)
    return command


def wants_debugging() -> bool:
    """Return whether the environment asks for tracebacks."""
    return os.environ.get("KVBANK_DEBUG", "").lower() not in ("", "0", "false", "no")


def say(text: str) -> None:
    """Say a text beside the output, as one line on stderr."""
    print(f"kvbank: {one_line(text)}", file=sys.stderr)


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    say(str(message))


def _tell(error: BaseException, debugging: bool) -> int:
    lost = lost_output()
    # rich ends a command whose reader has left by SystemExit(1).
    if lost is not None and isinstance(error, typer.Exit | SystemExit | OSError):
        error = lost
    code, text = _explained(error)
    if debugging and not isinstance(error, typer.Exit | SystemExit):
        traceback.print_exception(error)
    elif code == DEFECT:
        text = defect(error)
    if text:
        say(text)
    return code


def _explained(error: BaseException) -> End:
    """Return exit code and line for what a command raised."""
    for kind, end in _ENDS:
        if isinstance(error, kind) and (found := end(error)) is not None:
            return found
    if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY):
        return FAILED, f"there is not enough memory: {error}"
    return DEFECT, _named(error)


def _exited(error: SystemExit) -> End:
    if isinstance(error.code, int):
        return error.code, ""
    return int(bool(error.code)), str(error.code or "")


def _aborted(error: typer.Abort) -> End:
    """Tell Ctrl-C at a question, which typer turns into an Abort, from an answer of no."""
    return (INTERRUPTED, "interrupted") if isinstance(error.__context__, KeyboardInterrupt) else _NOT_CONFIRMED


def _not_installed(error: ModuleNotFoundError) -> End | None:
    extra = extra_of(error.name)
    return (FAILED, missing(error.name, extra)) if extra else None


def _not_stored(error: OSError) -> End | None:
    return None if error.errno is None else (FAILED, storage_error(error))


def _not_encoded(error: UnicodeEncodeError) -> End:
    return FAILED, f"{error.object[error.start : error.end]!r} cannot be said in {error.encoding}"


def _not_decoded(error: UnicodeDecodeError) -> End:
    return FAILED, f"what was read is not {error.encoding}: byte {error.object[error.start]:#x}"


def _in_a_loop(error: RuntimeError) -> End | None:
    """Explain what Path.resolve raises before Python 3.13 for links that lead to each other."""
    return (FAILED, str(error)) if str(error).startswith("Symlink loop") else None


# How a command ends that raised one of these. The first that fits and gives an end counts.
_ENDS: tuple[tuple[type[BaseException], Callable[[Any], End | None]], ...] = (
    (typer.Exit, lambda error: (error.exit_code, "")),
    (SystemExit, _exited),
    (KeyboardInterrupt, lambda error: (INTERRUPTED, "interrupted")),
    (typer.Abort, _aborted),
    (EOFError, lambda error: _NOT_CONFIRMED),
    (typer.TyperException, lambda error: (error.exit_code, _usage(error))),
    (Failed, lambda error: (error.code, str(error))),
    (ModuleNotFoundError, _not_installed),
    (KVBankError, lambda error: (FAILED, str(error))),
    (BrokenPipeError, lambda error: (READER_LEFT, "")),
    (OSError, _not_stored),
    (UnicodeEncodeError, _not_encoded),
    (UnicodeDecodeError, _not_decoded),
    (UnicodeError, lambda error: (FAILED, f"what was read is no text: {error}")),
    (RuntimeError, _in_a_loop),
)


def defect(error: BaseException) -> str:
    """Return the line for an error that is a defect of this program, and write its traceback to a file."""
    return f"{_named(error)}; this is a defect of kvbank, the traceback is {_kept(error)}"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(str(error), 400)}"


def storage_error(error: OSError) -> str:
    """Return the line for an error of the system: which file it is about, if it says so, and what is wrong."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    if not names and error.errno == errno.ENOENT:  # of os.getcwd, which names none
        names = ["the working folder"]
    return ": ".join([*([" to ".join(names)] if names else []), error.strerror or str(error)])


def _usage(error: typer.TyperException) -> str:
    text = error.format_message().replace(": Value error, ", ": ")  # as pydantic begins the errors of a choice
    context = getattr(error, "ctx", None)
    if not text or context is None:
        return text
    return f"{text.rstrip('.')}; see {context.command_path} --help"


def extra_of(module: str | None) -> str | None:
    """Return the extra that installs a module; None for one that no extra does."""
    return _EXTRA_OF_MODULE.get((module or "").partition(".")[0])


def missing(module: str | None, extra: str | None) -> str:
    """Return the line for a module that is not installed."""
    return f"module {module!r} is not installed: pip install 'kvbank[{extra}]'"


def _kept(error: BaseException) -> str:
    """Write the traceback to a new file, and return where it is, as a part of a sentence."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="kvbank-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError as trouble:
        return f"nowhere, since no file could be written ({trouble.strerror}): KVBANK_DEBUG=1 shows it"
    return f"in {path}"
