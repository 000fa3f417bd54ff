"""A command gets its settings here, from flags and from a TOML file, as one object of a settings model.

`takes` gives a command a flag for each field of the model (`kvbank.console.options` makes the flag) and, where a file
is wanted, a file of the same names. This file owns the order: a flag decides over the file, and the file over the
default.

The flags are typer's rather than those of a parser that a library makes of the model: its help would look unlike that
of every other command, and its errors are paragraphs where a command ends in one line.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import update_wrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError

from kvbank.console.ending import USAGE, Failed, run
from kvbank.console.options import flag, option
from model_worker.errors import InputError
from model_worker.settings.base import Settings
from model_worker.settings.file import read_settings

_S = TypeVar("_S", bound=Settings)
# Parameters of a command beside its fields, which no field may be called.
_FILE, _CONTEXT = "config", "typer_context"


def takes(settings: type[_S], *, file: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator for a command whose first parameter is a `settings`: its fields become options of the command.

    file: the command also takes a TOML file with the same names, as an argument in front.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        beside = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in beside]

        def called(**values: Any) -> None:
            context = values.pop(_CONTEXT)
            path = values.pop(_FILE, None)
            given = {
                name: value for name in settings.model_fields if _is_given(context, name, value := values.pop(name))
            }
            command(_made(settings, path, given, context), **values)

        update_wrapper(called, command)
        parameters = [_parameter(_CONTEXT, typer.Context), *([_file()] if file else [])]
        parameters += [*own, *(option(name, field, both=file) for name, field in settings.model_fields.items())]
        called.__dict__["__signature__"] = inspect.Signature(parameters)
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        return called

    return decorate


def _made(settings: type[_S], path: Path | None, given: Mapping[str, Any], context: typer.Context) -> _S:
    """Return the settings of a file and of flags.

    Raises InputError for what is wrong in the file, and Failed for a wrong flag and a value that stands in neither.
    """
    read = {} if path is None else read_settings(path)
    try:
        return settings(**{**read, **given})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            more = "" if path is None else f", which {path} does not have either"
            raise missing_option(name, context.command_path, more) from None
        said = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
        if path is None or name.partition(".")[0] in given:
            wrong = f"Invalid value for '{flag(name)}': {said}"
            raise Failed(f"{wrong}; see {context.command_path} --help", USAGE) from None
        raise InputError(f"{path}: {name}: {said}") from None


def missing_option(name: str, command: str, more: str = "") -> Failed:
    """Return the error of an option that `command` cannot do without and that was not given."""
    return Failed(f"Missing option '{flag(name)}'{more}; see {command} --help", USAGE)


def _is_given(context: typer.Context, name: str, value: Any) -> bool:
    """Return whether a value comes from the person rather than from the field's default."""
    source = context.get_parameter_source(name)
    return value is not None and source is not None and not source.name.startswith("DEFAULT")


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _file() -> inspect.Parameter:
    told = typer.Argument(help="A TOML file of the options below, by the same names; an option decides over the file.")
    return _parameter(_FILE, Annotated[Path | None, told], None)


def run_program(command: Callable[..., None], name: str) -> NoReturn:
    """Run a command that is a program of its own, and end the process as `kvbank` does. name: how it is called."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    run(app, name)
