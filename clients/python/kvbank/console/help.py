"""The help of all commands is shown as it was written, without the markup of rich."""

import re
from typing import Any

# What rich takes for a tag, and the backslashes in front.
_TAG = re.compile(r"(\\*)(\[[a-z#/@][^[]*?])")


def make_literal(command: Any) -> None:
    """Escape the help of `command`, of its options and of all commands below, so that nothing in it is rich markup.

    Without that, typer takes a word in brackets, such as an extra or a metavar, for a style and leaves it out.
    """
    for parameter in command.params:
        if getattr(parameter, "help", None):
            parameter.help = literal(parameter.help)
    for name in ("help", "short_help", "epilog"):
        if getattr(command, name, None):
            setattr(command, name, literal(getattr(command, name)))
    for each in getattr(command, "commands", {}).values():
        make_literal(each)


def literal(text: str) -> str:
    """Return a text as markup that rich shows as the text. This is what `rich.markup.escape` returns; rich takes longer
    to import than many a command runs."""
    escaped = _TAG.sub(r"\1\1\\\2", text)
    return escaped + "\\" if escaped.endswith("\\") and not escaped.endswith("\\\\") else escaped
