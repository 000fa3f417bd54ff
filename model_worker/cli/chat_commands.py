"""What a person may ask of a conversation besides an answer: the commands of a chat that begin with a slash."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import kvbank
from kvbank.console.ending import say
from model_worker.cli.chat_memory import bank_of, why
from model_worker.cli.terminal import Waiting, printable
from model_worker.errors import InputError
from model_worker.session.session import Session

_AGAIN = "reading the session again: {done} of {total} tokens"
# Letters of a message that are shown in a list, and turns in one.
_SHOWN, _TURNS = 60, 10


@dataclass
class Talk:
    """A conversation in a terminal."""

    session: Session


def obey(talk: Talk, line: str) -> None:
    """Do what a line says that begins with a slash. Raises InputError for what makes no sense, and what is raised."""
    word, _, argument = line.partition(" ")
    command = COMMANDS.get(word)
    if command is None:
        say(f"there is no command {word}; {HELP}")
        return
    command(talk, argument.strip())


def show_help(talk: Talk, argument: str) -> None:
    """Print what there is."""
    print(HELP)


def show_why(talk: Talk, argument: str) -> None:
    """Print what the last answer came from. argument: how many chunks to show; empty for five."""
    print(why(talk.session, argument))


def show_memory(talk: Talk, argument: str) -> None:
    """Print what the session has in its bank."""
    print(bank_of(talk.session))


def show_turns(talk: Talk, argument: str) -> None:
    """Print the numbers of the last turns, and how they begin. argument: how many; empty for ten."""
    for turn in talk.session.turns[-_number(argument, _TURNS) :]:
        text = "(forgotten)" if turn.status == "forgotten" else " ".join(turn.text("user").split())
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
        print(printable(f"{turn.number:6}  {shown or '(a part of the next message)'}"))


def undo(talk: Talk, argument: str) -> None:
    """Go on as if the last turn had not been said."""
    said = [turn for turn in talk.session.turns if turn.status != "part"]
    if not said:
        raise InputError("nothing was said yet")
    before = said[-2].number if len(said) > 1 else 0
    with Waiting(_AGAIN) as progress:
        talk.session.rewind(before, progress)
    say(f"turn {said[-1].number} is taken back; it is kept until it is forgotten")


def fork(talk: Talk, argument: str) -> None:
    """Begin another session with all that was said. argument: its name."""
    if not argument:
        raise InputError("/fork NAME: the new session needs a name")
    made = talk.session.fork(argument)
    say(f"session {made.name!r} has all that was said here; talk there: kvbank chat --session {made.name}")


def forget(talk: Talk, argument: str) -> None:
    """Delete a turn for good, after a question in a terminal. argument: the number of the turn."""
    number = _number(argument, None)
    turn = next((turn for turn in talk.session.turns if turn.number == number), None)
    if turn is None:
        raise InputError(f"there is no turn {number}; /turns lists them")
    if sys.stdin.isatty() and input(f"Forget turn {number} for good? [y/N] ").strip().lower() not in ("y", "yes"):
        return
    with Waiting(_AGAIN) as progress:
        receipt = talk.session.forget(number, progress=progress)
    say(_receipt(receipt))


def _receipt(receipt: kvbank.Receipt) -> str:
    """Return one line about what was forgotten."""
    turns = f"{receipt.turns} turn{'' if receipt.turns == 1 else 's'}"
    again = f", {receipt.chunks_to_make_again} of them made again without it" if receipt.chunks_to_make_again else ""
    counts = f"{turns}, {receipt.tokens:,} tokens, {receipt.chunk_count:,} chunks{again}"
    return f"forgotten: {counts}; receipt {receipt.receipt_id}"


def _number(argument: str, default: int | None) -> int:
    """Return a whole number of at least 1 that a person typed. Raises InputError."""
    if not argument and default is not None:
        return default
    if not argument.isdecimal() or not int(argument):
        raise InputError(f"{argument!r} is no number of a turn; /turns lists them")
    return int(argument)


COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "/help": show_help,
    "/why": show_why,
    "/memory": show_memory,
    "/turns": show_turns,
    "/undo": undo,
    "/fork": fork,
    "/forget": forget,
}
HELP = (
    "/why [N] what the last answer came from, in N chunks; /memory what the session has in its bank; /turns lists what "
    "was said; /undo takes the last turn back; /fork NAME begins another session with all that was said; /forget N "
    "deletes turn N for good; /help this text; /quit or Ctrl-D the end; Ctrl-C stops an answer, what was said until "
    "then is kept"
)
