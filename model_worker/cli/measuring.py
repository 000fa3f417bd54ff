"""What the evaluations of a memory have in common as commands: their worker and service, their file, their command.

The module is light to import: torch comes with `measured_worker`.
"""

import shlex
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import kvbank
from kvbank.console.ending import Failed
from kvbank.console.options import flag
from model_worker.cli.measured_model import MeasuredModel
from model_worker.cli.places import check_writable
from model_worker.cli.quiet import load_quietly
from model_worker.errors import InputError
from model_worker.settings.base import Settings

if TYPE_CHECKING:
    from model_worker.evaluate.service_process import ServiceProcess
    from model_worker.model import MemoryModel

_CALL_S = 120.0  # a call to the service of a measurement may wait for a busy disk
_GOES_ON = "Note each finished part in this file, a JSON line each; the same command goes on from it."
JournalFile = Annotated[Path | None, typer.Option("--out", "--log", help=_GOES_ON)]
LogFile = Annotated[Path | None, typer.Option("--log", help=_GOES_ON)]  # where --out is something else
Plot = Annotated[Path | None, typer.Option(help="Also write the figures there: an SVG of one, a folder of several.")]


@contextmanager
def measured_worker(options: MeasuredModel, data: Path | None = None, **changes: Any) -> Iterator["MemoryModel"]:
    """Load the model of `options`, and attach it to a memory service of its own, as `measured_service` has one.

    data: a folder that is kept, with all that is in its store. changes: settings of the `MemoryModel` beside those of
    `options`. Raises InputError for a folder that cannot be made.
    """
    loaded = load_measured(options)
    with measured_service(data) as service, attached(loaded, options, service.address, **changes) as model:
        yield model


@contextmanager
def measured_service(data: Path | None = None) -> Iterator["ServiceProcess"]:
    """Start an empty memory service, whose folder is deleted at the end.

    The service is a process of its own, so that time and memory of the worker are the worker's. data: a folder that is
    kept instead, with all that is in its store. SIGTERM ends the block as an error does. Raises InputError for a folder
    that cannot be made.
    """
    from model_worker.evaluate.service_process import ServiceProcess

    with _terminable(), _folder(data) as folder, ServiceProcess(folder) as service:
        yield service


def load_measured(options: MeasuredModel) -> tuple[Any, Any]:
    """Load the model and the tokenizer that `options` name, without a word."""
    return load_quietly(options.model, rope=options.rope, **options.loading())


@contextmanager
def attached(loaded: tuple[Any, Any], options: MeasuredModel, address: str, **changes: Any) -> Iterator["MemoryModel"]:
    """Attach a model that was loaded to the service at an address; changes: as in `measured_worker`."""
    from model_worker.model import MemoryModel

    settings = {"strict": True, "patience": _CALL_S, **options.model_settings(), **changes}
    with (
        kvbank.connect(address, timeout=_CALL_S, tls=False) as client,
        MemoryModel(*loaded, memory=client, bank="unused", **settings) as model,
    ):
        yield model


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as an error does, so that its service is stopped and its folder deleted."""
    if threading.current_thread() is not threading.main_thread():  # no other thread may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # another one would break the cleaning up off
    raise Failed("terminated; finished parts stand in the file of --out, where one was given", 128 + number)


@contextmanager
def _folder(data: Path | None) -> Iterator[Path]:
    """Make the folder `data`, or a temporary one in its place, which is deleted at the end."""
    if data is None:
        with tempfile.TemporaryDirectory(prefix="kvbank-eval-") as folder:
            yield Path(folder)
        return
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{data} cannot be the folder of the store: {error.strerror}") from None
    yield data


def decides(model: "MemoryModel") -> dict[str, Any]:
    """Return what decides the figures of a model beside the options of a command, as plain values.

    These are its weights, its embedder, and the settings that the options left to the model's own `kvbank` entry or to
    the contents of a file.
    """
    settings, memory = model.settings, model.memory
    names = ("top_k", "recent", "query_tokens", "query", "context")
    return {
        "reader": model.attachment.reader.digest,
        "embedder": memory.embedder.digest,
        "plan": asdict(model.attachment.plan),
        "window": model.window,
        "chunk": model.chunk,
        "sinks": model.sinks,
        "min_share": settings.min_share,
        **{name: getattr(memory, name) for name in names},
    }


def weights_of(model: Any, tokenizer: Any) -> str:
    """Return the digest of all that makes a model read as it does: its weights, its rope scaling, its tokenizer."""
    from model_worker.attachment.digest import reader_of

    return reader_of(model, tokenizer).digest


def check_journal(path: Path | None) -> None:
    """Raise InputError where the journal `path` cannot be written."""
    if path is not None:
        check_writable(path)
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file that could be gone on with")


def command_of(name: str, options: Settings, group: Sequence[str] = ("eval",)) -> str:
    """Return the command line that gives these options; of files and folders their last name.

    group: the words between `kvbank` and the command's name.
    """
    words, fields = ["kvbank", *group, name], list(type(options).model_fields)
    for field in sorted(options.model_fields_set, key=lambda each: (each != "model", fields.index(each))):
        extra = type(options).model_fields[field].json_schema_extra
        word = str((extra.get("flag") if isinstance(extra, dict) else None) or flag(field))
        value = getattr(options, field)
        if isinstance(value, bool):
            words += [word if value else f"--no-{word[2:]}"]
            continue
        for each in value if isinstance(value, tuple) else (value,):
            words += [word, last_name(each)]
    return shlex.join(words)


def about(name: str, options: Settings) -> dict[str, Any]:
    """Return what the document of an evaluation says of the run: its name, its command, its model, its options.

    options: with a field `model`.
    """
    own = {field: _plain(value) for field, value in options if value is not None and value != ()}
    return {"evaluation": name, "command": command_of(name, options), "model": own["model"], "options": own}


def _plain(value: Any) -> Any:
    """Return an option as JSON has it; of files and folders their last name."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return last_name(value) if isinstance(value, str | Path) else value


def last_name(value: Any) -> str:
    """Return a value as text, and of an absolute path the last part, since other machines have other folders.

    The parts of a hybrid embedder are not looked at: a name stands for its folder.
    """
    text = str(value)
    return Path(text).name if isinstance(value, Path) or Path(text).is_absolute() else text
