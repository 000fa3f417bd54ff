"""A conversation in the terminal reads a line and streams the answer, until the input ends.

The module imports torch; `kvbank chat` imports it once the service has answered.
"""

import sys

import torch

import kvbank
from kvbank.console.ending import say
from kvbank.console.output import one_line
from model_worker.attachment.loading import device_named
from model_worker.attachment.model_names import SHIPPED
from model_worker.cli.chat_commands import Talk, obey
from model_worker.cli.chat_options import ChatOptions
from model_worker.cli.messages import messages
from model_worker.cli.new_embedder import new_embedder
from model_worker.cli.quiet import quiet_libraries
from model_worker.cli.targets import in_use
from model_worker.cli.terminal import Waiting, printable, stop_on_interrupt
from model_worker.embed import name_of
from model_worker.embed.spec import lasting_spec
from model_worker.model import MemoryModel
from model_worker.session.begun_with import BegunWith
from model_worker.session.preset import SessionPreset
from model_worker.session.session import Session
from model_worker.session.unanswered import Unanswered

# Turns that arrow up brings back, and letters that are shown of a message.
_HISTORY, _SHOWN = 100, 60
# One in so many tokens of an answer is looked at for `/why`: to look at each would take a seventh of the time.
_LOOKED_AT = 8


def run_chat(model: MemoryModel, name: str, options: ChatOptions, known: BegunWith | None) -> None:
    """Open the session of a name with `model`, over the model's service, and talk until the input ends.

    options: with the name of the model. known: what the session was begun with; None for a new one.
    """
    with model:
        preset = SessionPreset.of(model.model, model.chunk, window=options.window, recent=options.recent)
        with Waiting("reading the session again: {done} of {total} tokens") as progress:
            try:
                session = Session.open(
                    model,
                    name=name,
                    window=preset.window,
                    style=options.style,
                    progress=progress,
                    strict=options.strict,
                    system=options.system,
                    bank=options.bank,
                    reads=options.reads,
                    model_name=options.model or SHIPPED,
                    embed=embedder_of(options, known),
                    adapter=options.adapter or "",
                    why=_LOOKED_AT,
                    **preset.memory,
                )
            except kvbank.LeaseHeld as error:
                raise in_use(name, error.holder) from None
        with session:
            unanswered = Unanswered(session.info.session_id)
            if not options.plain:
                print(one_line(greeting(session)), file=sys.stderr)
                _tell_of(unanswered)
            torch.manual_seed(options.seed)
            converse(session, options, unanswered)


def open_model(client: kvbank.Client, options: ChatOptions, known: BegunWith | None) -> MemoryModel:
    """Return the model, attached and connected, without a bank: the session brings one.

    options: with the name of the model. known: what a session that goes on was begun with, whose chunks keep their
    size.
    """
    quiet_libraries()
    options = options.model_copy(update={"embed": embedder_of(options, known)})
    return MemoryModel.from_pretrained(
        options.model or SHIPPED,
        memory=client,
        bank=(),
        device=device_named(options.device),
        dtype=options.dtype,
        adapter=options.adapter,
        local=options.local,
        chunk=known.chunk if known else None,
        compressor=options.compressor,
        **options.model_settings(),
    )


def embedder_of(options: ChatOptions, known: BegunWith | None) -> str:
    """Return by what chunks are found: what was asked for, else what the session was begun with.

    A new session of which nothing is asked goes by what `new_embedder` says.
    """
    if options.embed is not None:
        return lasting_spec(options.embed)
    if known is not None:
        return known.embed or "lexical"
    return new_embedder()


def greeting(session: Session) -> str:
    """Return one line about where a session stands."""
    turns = sum(turn.status != "part" for turn in session.turns)
    began = f"goes on after {turns} turn{'s' * (turns > 1)}" if turns else "begins"
    known = f"{session.left:,} tokens in bank {session.info.bank}" if session.left else "nothing in its bank yet"
    if others := session.memory.memory.others.names:
        known += f", reads {', '.join(others)}"
    by = session.info.settings.get("embed") or name_of(session.memory.memory.embedder)
    return f"session {session.info.name!r} {began}, {known}, found by {by}; /help for help"


def _tell_of(unanswered: Unanswered) -> None:
    messages = unanswered.messages()
    if messages:
        which = "a message was" if len(messages) == 1 else f"{len(messages)} messages were"
        last = messages[-1] if len(messages[-1]) <= _SHOWN else messages[-1][:_SHOWN] + "..."
        say(f"{which} not answered, the last: {last!r}; arrow up brings it back, all stand in {unanswered.path}")


def converse(session: Session, options: ChatOptions, unanswered: Unanswered) -> None:
    """Read messages until they end; each is a turn, or one of the commands that begin with a slash.

    In a terminal a turn that fails is told, and the conversation goes on; a pipe ends with it.
    """
    said = [turn.text("user") for turn in session.turns if turn.status not in ("part", "forgotten")]
    talk = Talk(session)
    for line in messages(options.plain, [*said[-_HISTORY:], *unanswered.messages()]):
        if line == "/quit":
            return
        try:
            if line.startswith("/") and "\n" not in line:
                obey(talk, line)
            elif line:
                _turn(session, line, options, unanswered)
        except kvbank.KVBankError as error:
            if not sys.stdin.isatty():
                raise
            say(f"{error}; arrow up brings back what was not answered")


def _turn(session: Session, line: str, options: ChatOptions, unanswered: Unanswered) -> None:
    with (
        unanswered.saying(line),
        stop_on_interrupt() as stop,
        Waiting("reading your message: {done} of {total} tokens") as progress,
    ):
        if not options.plain and not sys.stdin.isatty():
            _write(f"> {line}\n")
        session.say(
            line,
            on_text=_write,
            stopped=stop.is_set,
            progress=lambda done, total: progress(done, total) if total > session.window.tokens else None,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
        )
    _write("\n")  # the prompt comes back when the turn is durable


def _write(text: str) -> None:
    """Show what a model said; its control characters are escaped, so that no terminal obeys them."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()
