"""How a conversation becomes text for a model, one turn at a time (pure).

A turn adds text around what the user said and never changes what was fed before, so its cost does not grow with the
conversation. What ends an answer (a chat template's end marker, the next "User:") is not part of it; the next turn
begins with as much of it as the model did not write itself.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from model_worker.errors import InputError
from model_worker.user_text import rendered

FORMATS = ("auto", "template", "plain", "continue")
_USER, _ANSWER, _AGAIN, _SYSTEM = "kvbankfirst", "kvbankanswer", "kvbanksecond", "kvbanksystem"


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The text that is put around what a user says.

    first, later: text before and behind a user's words, in the first turn and in those behind an answer. stop: text
    that ends an answer, besides the model's end tokens. begin: whether the tokenizer's beginning (`<s>`) goes in front
    of it all; a template has its own. system: text before and behind a system prompt, which stands before all turns.
    lead: text that a model writes before the words of an answer.
    """

    first: tuple[str, str]
    later: tuple[str, str]
    stop: str = ""
    begin: bool = True
    system: tuple[str, str] = ("", "\n")
    lead: str = ""

    def around(self, written: str | None) -> tuple[str, str]:
        """Return what is fed before and behind a user's words.

        written: what the model wrote last, as it wrote it (None in the first turn).
        """
        if written is None:
            return self.first
        return self.later[0][overlap(written, self.stop) :], self.later[1]

    def answer(self, written: str) -> str:
        """Return the answer in what the model wrote: without the stop text and spaces around it."""
        end = written.find(self.stop) if self.stop else -1
        if end < 0:
            end = len(written) - overlap(written, self.stop)
        return written[:end].strip()


def overlap(written: str, stop: str) -> int:
    """Measure the longest beginning of `stop` with which `written` ends, in characters."""
    return next((n for n in range(len(stop), 0, -1) if written.endswith(stop[:n])), 0)


PLAIN = PromptFormat(("User: ", "\nAssistant:"), ("\nUser: ", "\nAssistant:"), stop="\nUser:", lead=" ")
CONTINUE = PromptFormat(("", ""), ("\n", ""), stop="\n", lead=" ")


def prompt_format(name: str, tokenizer: Any, config: Any, system: bool = False) -> PromptFormat:
    """Make the format of a name. system: whether the conversation has a system prompt.

    name: `template` (the tokenizer's), `plain` ("User: ..."), `continue` (the model goes on in the user's line) or
    `auto`: the template where there is one, else `continue` for a model made for a memory (as the shipped one is) and
    `plain` for any other. Raises InputError for another name, and for a template that is not there or does not work.
    """
    if name not in FORMATS:
        raise InputError(f"format {name!r} is not one of {', '.join(FORMATS)}")
    template = getattr(tokenizer, "chat_template", None)
    if name == "template" and not template:
        raise InputError("this model's tokenizer has no chat template; use --format plain")
    if template and name in ("auto", "template"):
        found = _from_template(tokenizer)
        return _with_system(tokenizer, found) if system else found
    made_for = getattr(config, "kvbank", None)
    return CONTINUE if name == "continue" or (name == "auto" and made_for) else PLAIN


def _from_template(tokenizer: Any) -> PromptFormat:
    """Make the format of a chat template: its text around the messages of an example is the same for all messages."""
    turns = [{"role": "user", "content": _USER}]
    first = _rendered(tokenizer, turns)
    turns += [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _AGAIN}]
    later = _rendered(tokenizer, turns).partition(_ANSWER)[2]
    if first.count(_USER) != 1 or later.count(_AGAIN) != 1:
        raise InputError("this model's chat template does not show what is said as it is; use --format plain")
    before, _, after = first.partition(_USER)
    between, _, end = later.partition(_AGAIN)
    return PromptFormat((before, after), (between, end), begin=False)


def _with_system(tokenizer: Any, found: PromptFormat) -> PromptFormat:
    """Return the format of a chat template with a system prompt before the first turn.

    A template that does not show a system message as it is has the system prompt before the user's first words.
    """
    turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    with suppress(InputError):
        before, _, rest = rendered(tokenizer, turns).partition(_SYSTEM)
        between, user, behind = rest.partition(_USER)
        if user and _SYSTEM not in rest:
            end = _end_of_system(tokenizer, between)
            return replace(found, system=(before, end), first=(between[len(end) :], behind))
    return replace(found, system=(found.first[0], "\n\n"), first=("", found.first[1]))


def _end_of_system(tokenizer: Any, between: str) -> str:
    """Return the part of the text between system prompt and user's words with which the system message ends.

    Where the template does not show a system message alone, that is nothing.
    """
    with suppress(InputError):
        end = rendered(tokenizer, [{"role": "system", "content": _SYSTEM}], answer=False).partition(_SYSTEM)[2]
        return end if between.startswith(end) else ""
    return ""


def _rendered(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    try:
        return rendered(tokenizer, turns)
    except InputError as error:
        raise InputError(f"{error}; use --format plain") from error
