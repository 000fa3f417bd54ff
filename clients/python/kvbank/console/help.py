"""The help of all commands is shown as it was written, without the markup of rich."""

from typing import Any


def make_literal(command: Any) -> None:
    """Escape the help of `command`, of its options and of all commands below, so that nothing in it is rich markup.

    Without that, typer takes a word in brackets, such as an extra or a metavar, for a style and leaves it out.
    """
    from rich.markup import escape

    for parameter in command.params:
        if getattr(parameter, "help", None):
            parameter.help = escape(parameter.help)
    for name in ("help", "short_help", "epilog"):
        if getattr(command, name, None):
            setattr(command, name, escape(getattr(command, name)))
    for each in getattr(command, "commands", {}).values():
        make_literal(each)
