"""A conversation in the terminal: read a line, stream the answer, until the end of the input."""

import sys
from dataclasses import dataclass

import torch

import kvbank
from kvbank.console.ending import say
from kvbank.console.output import one_line
from model_worker.cli.messages import messages
from model_worker.cli.quiet import quiet_libraries
from model_worker.cli.terminal import Waiting, printable, stop_on_interrupt, while_loading
from model_worker.model import MemoryModel
from model_worker.session.log import Header, SessionLog
from model_worker.session.session import Session
from model_worker.session.unanswered import Unanswered

HELP = "/help this text; /quit or Ctrl-D the end; Ctrl-C stops an answer, what was said until then is kept"
# Turns that arrow up brings back, and letters that are shown of a message.
_HISTORY, _SHOWN = 100, 60


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Of one conversation; see `kvbank chat --help`. memory: how the service is called, noted in a new log."""

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


def run_chat(log: SessionLog, client: kvbank.Client, settings: ChatSettings) -> None:
    """Load the model, open the session of `log` over the service of `client`, and talk."""
    with while_loading(f"loading {settings.model}"):
        model = open_model(client, settings, log.header)
    with model:
        with Waiting("reading the session again: {done} of {total} tokens") as progress:
            session = Session.open(
                model,
                log,
                name=settings.model,
                target=settings.memory,
                window=settings.window,
                style=settings.style,
                progress=progress,
                strict=settings.strict,
            )
        with session:
            unanswered = Unanswered(log.folder)
            if not settings.plain:
                print(one_line(greeting(session)), file=sys.stderr)
                _tell_of(unanswered)
            torch.manual_seed(settings.seed)
            converse(session, settings, unanswered)


def open_model(client: kvbank.Client, settings: ChatSettings, known: Header | None) -> MemoryModel:
    """The model, attached and connected, without a bank of its own."""
    quiet_libraries()
    return MemoryModel.from_pretrained(
        settings.model,
        memory=client,
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
    for line in messages(settings.plain, [*said[-_HISTORY:], *unanswered.messages()]):
        if line == "/quit":
            return
        if line == "/help":
            print(HELP)
        elif line.startswith("/") and "\n" not in line:
            say(f"there is no command {line.split()[0]}; {HELP}")
        elif line:
            _turn(session, line, settings, unanswered)


def _turn(session: Session, line: str, settings: ChatSettings, unanswered: Unanswered) -> None:
    with (
        unanswered.saying(line),
        stop_on_interrupt() as stop,
        Waiting("reading your message: {done} of {total} tokens") as progress,
    ):
        if not settings.plain and not sys.stdin.isatty():
            _write(f"> {line}\n")
        session.say(
            line,
            on_text=_write,
            stopped=stop.is_set,
            progress=progress,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
        )
    _write("\n")  # the prompt comes back when the turn is durable


def _write(text: str) -> None:
    """Show what a model said; control characters in it must not reach the terminal."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()
