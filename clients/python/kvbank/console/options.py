"""Options of a command that are the fields of a pydantic model, so that each is written once: name, type, choices,
description and default are the field's, and typer shows and reads them as those of every other command.

The model itself is not imported here. It checks the values, which come to it as they were given.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import typer

from kvbank.console.quantities import Quantity

Command = TypeVar("Command", bound=Callable[..., None])


def flag(name: str) -> str:
    """Return the option of a field."""
    return f"--{name.replace('_', '-')}"


def from_fields(fields: Mapping[str, Any]) -> Callable[[Command], Command]:
    """Give a command, which takes them as keywords (`**given`), an option for each field of a pydantic model.

    fields: the model's `model_fields`. An option that is not given is None; a field of a `Quantity` is given as text.
    """

    def give(command: Command) -> Command:
        own = [each for each in inspect.signature(command).parameters.values() if each.kind is not each.VAR_KEYWORD]
        options = [_option(name, field) for name, field in fields.items()]
        command.__dict__["__signature__"] = inspect.Signature([*options, *own])
        return command

    return give


def _option(name: str, field: Any) -> inspect.Parameter:
    quantity = next((each for each in field.metadata if isinstance(each, Quantity)), None)
    metavar, kind = (quantity.metavar, str) if quantity else (None, field.annotation)
    option = typer.Option(None, flag(name), help=_help(field, quantity), metavar=metavar)
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=option, annotation=kind | None)


def _help(field: Any, quantity: Quantity | None) -> str:
    """Describe a field, with the default of one that is no flag."""
    if field.is_required() or isinstance(field.default, bool) or field.default in ("", None):
        return str(field.description)
    default = quantity.write(field.default) if quantity else field.default
    return f"{field.description} Default: {default}."
