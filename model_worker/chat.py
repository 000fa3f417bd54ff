"""A conversation in the terminal: read a line, stream the answer, until the end of the input."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvbank._cli.ending import say
from kvbank._cli.streams import typed
from model_worker.model import MemoryModel
from model_worker.session import Session
from model_worker.session_log import Header, SessionLog
from model_worker.terminal import printable, stop_on_interrupt, warnings_in_one_line
from model_worker.unanswered import Unanswered

HELP = "/help this text; /quit or Ctrl-D the end; Ctrl-C stops an answer, what was said until then is kept"
# Turns that arrow up brings back, and letters that are shown of a message.
_HISTORY, _SHOWN = 100, 60


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Of one conversation; see `kvbank chat --help`."""

    session: str
    sessions: Path
    memory: str
    model: str = "kvbank-small"
    window: int | None = None
    local: str | None = None
    top_k: int | None = None
    compressor: str = "none"
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    style: str = "auto"
    strict: bool = False
    plain: bool = False


def run_chat(settings: ChatSettings) -> None:
    """Open the session, talk, close it."""
    with warnings_in_one_line(), SessionLog.open(settings.sessions, settings.session) as log:
        known = log.header
        with open_model(settings, known) as model:
            session = Session.open(
                model,
                log,
                name=settings.model,
                target=settings.memory,
                window=settings.window,
                style=settings.style,
                strict=settings.strict,
            )
            with session:
                unanswered = Unanswered(log.folder)
                if not settings.plain:
                    print(greeting(session), file=sys.stderr)
                    _tell_of(unanswered)
                torch.manual_seed(settings.seed)
                converse(session, settings, unanswered)


def open_model(settings: ChatSettings, known: Header | None) -> MemoryModel:
    """The model, attached and connected, without a bank of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return MemoryModel.from_pretrained(
        settings.model,
        memory=settings.memory,
        bank=(),
        window=settings.window,
        local=settings.local,
        chunk=known.chunk if known else None,
        top_k=settings.top_k,
        compressor=settings.compressor,
    )


def greeting(session: Session) -> str:
    """One line about where a session stands."""
    turns = sum(not turn.part for turn in session.log.turns)
    began = f"goes on after {turns} turn{'s' * (turns > 1)}" if turns else "begins"
    known = f"{session.left:,} tokens in bank {session.header.bank}" if session.left else "nothing in its bank yet"
    return f"session {session.header.name!r} {began}, {known}; /help for help"


def _tell_of(unanswered: Unanswered) -> None:
    messages = unanswered.messages()
    if messages:
        which = "a message was" if len(messages) == 1 else f"{len(messages)} messages were"
        last = messages[-1] if len(messages[-1]) <= _SHOWN else messages[-1][:_SHOWN] + "..."
        say(f"{which} not answered, the last: {last!r}; arrow up brings it back, all stand in {unanswered.path}")


def converse(session: Session, settings: ChatSettings, unanswered: Unanswered) -> None:
    """One turn a line, until the lines end."""
    said = [turn.text for turn in session.log.turns if not turn.part]
    for line in _lines(settings.plain, [*said[-_HISTORY:], *unanswered.messages()]):
        if line == "/quit":
            return
        if line == "/help":
            print(HELP)
        elif line.startswith("/"):
            print(f"there is no command {line.split()[0]}; {HELP}", file=sys.stderr)
        elif line:
            _turn(session, line, settings, unanswered)


def _turn(session: Session, line: str, settings: ChatSettings, unanswered: Unanswered) -> None:
    with unanswered.saying(line), stop_on_interrupt() as stop:
        session.say(
            line,
            on_text=_write,
            stopped=stop.is_set,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
        )
    _write("\n")  # the prompt comes back when the turn is durable


def _write(text: str) -> None:
    """Show what a model said; control characters in it must not reach the terminal."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def _lines(plain: bool, history: Sequence[str]) -> Iterator[str]:
    """What is typed, or comes through a pipe, by lines. history: what arrow up brings back."""
    if not sys.stdin.isatty():
        for line in map(typed, sys.stdin):
            if line.strip() and not plain:
                _write(f"> {line.strip()}\n")
            yield line.strip()
        return
    import readline  # gives `input` its line editing

    for line in history:
        readline.add_history(line)
    while True:
        try:
            yield typed(input("" if plain else "> ")).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # an answer is stopped elsewhere; here it drops the line, and arrow up brings it back
            if dropped := readline.get_line_buffer().strip():
                readline.add_history(dropped)
            print()
