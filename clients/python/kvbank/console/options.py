"""Fields of a class become options of commands here, so that each option is written once.

`spread` is for dataclasses whose fields are annotated for typer. Fields of a pydantic model become options in two ways,
and typer shows and reads both as those of every other command. `option` is for a model whose defaults are its own:
typer shows them and checks the bounds. `from_fields` is for a model that also reads the environment or a file, which
decide over a default: what was not given is None, and the model checks what was given.

Pydantic is not imported here: the SDK is installed without it.
"""

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from itertools import chain
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

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
        options = [_checked_later(name, field) for name, field in fields.items()]
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


def option(name: str, field: Any, *, both: bool) -> inspect.Parameter:
    """Return the parameter of a field of a pydantic model, with the field's default and bounds.

    A tuple of any length is an option that may be given several times. both: a switch that is off by default can also
    be turned off by a flag. The field's `json_schema_extra` may name a `flag` other than the field's, and the `panel`
    that shows the help.
    """
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    kind = _plain(field.annotation)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    words = extra.get("flag") or flag(name)
    if kind is bool and "/" not in words and (both or default):
        words = f"{words}/--no-{words[2:]}"
    bounds = {type(each).__name__.lower(): each for each in _bounds(field.annotation, field.metadata)}
    told = typer.Option(
        words,
        help=field.description,
        show_default=kind is not bool or bool(default),
        min=getattr(bounds.get("ge"), "ge", None),
        max=getattr(bounds.get("le"), "le", None),
        rich_help_panel=extra.get("panel"),
    )
    if get_origin(kind) is list:
        default = list(default) if default else None
    wanted = kind | None if default is None else kind
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[wanted, told], default=default)


def _checked_later(name: str, field: Any) -> inspect.Parameter:
    """Return the parameter of a field of a model that decides itself what counts where the option is not given."""
    quantity = next((each for each in field.metadata if isinstance(each, Quantity)), None)
    metavar, kind = (quantity.metavar, str) if quantity else (None, _plain(field.annotation))
    told = typer.Option(None, flag(name), help=_help(field, quantity), metavar=metavar)
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=told, annotation=kind | None)


def _plain(annotation: Any) -> Any:
    """Return the type of an option: without None and bounds, and a tuple of any length as a list."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _plain(parts[0])
    if origin in (Union, types.UnionType):
        [kind] = [part for part in parts if part is not types.NoneType]
        return _plain(kind)
    if origin is tuple:
        return list[_plain(parts[0])]  # type: ignore[misc]
    return annotation


def _bounds(annotation: Any, metadata: Any) -> Iterator[Any]:
    """Yield what says how large a value may be, of a field or of the items of one."""
    for each in metadata:
        yield from getattr(each, "metadata", [each])  # a field in an annotation holds its bounds
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _bounds(parts[0], parts[1:])
    elif origin is not Literal:
        for part in parts:
            yield from _bounds(part, ())


def _help(field: Any, quantity: Quantity | None) -> str:
    """Describe a field, with the default of one that is no flag."""
    if field.is_required() or isinstance(field.default, bool) or field.default in ("", (), None):
        return str(field.description)
    default = quantity.write(field.default) if quantity else field.default
    return f"{field.description} Default: {default}."
