"""Variables of the environment that switch something on or off are read here."""

import os

from kvbank._arguments import expected

# Whether calls are spread over several addresses, where `connect` is not told so.
SPREAD = "KVBANK_SPREAD"
_WORDS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


def switch(variable: str) -> bool | None:
    """Return what a variable says; None where it is not set, or empty. Errors: InvalidArgument for another word."""
    said = os.environ.get(variable)
    if not said:
        return None
    if said.lower() not in _WORDS:
        raise expected(variable, "1 or 0", said)
    return _WORDS[said.lower()]
