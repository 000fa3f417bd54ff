"""Fields of a class become options of commands here, so that each option is written once.

`spread` is for dataclasses whose fields are annotated for typer. `from_fields` is for a pydantic model: name, type,
choices, description and default are the field's, and typer shows and reads them as those of every other command. The
model itself is not imported here; it checks the values, which come to it as they were given.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from itertools import chain
from typing import Any, TypeVar, cast, get_type_hints

import typer

from kvbank.console.quantities import Quantity

Command = TypeVar("Command", bound=Callable[..., None])


def flag(name: str) -> str:
    """Return the option that a field becomes: "--min-free" for `min_free`."""
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


def spread(command: Command) -> Command:
    """Give a command the options that are fields of its parameters of dataclasses, in the place of these parameters.

    The fields are annotated as parameters of a command are; the command is called with objects of the dataclasses.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters = signature.parameters.values()
    groups: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}

    @wraps(command)
    def spreading(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind)})
        command(**given)

    spread_out = [_of_fields(groups[each.name]) if each.name in groups else [each] for each in parameters]
    spreading.__dict__["__signature__"] = signature.replace(parameters=list(chain.from_iterable(spread_out)))
    return cast(Command, spreading)


def _of_fields(kind: Any) -> list[inspect.Parameter]:
    """Return a parameter for each field of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    return [each.replace(annotation=hints[each.name]) for each in inspect.signature(kind).parameters.values()]


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
