"""`kvbank eval passkey` asks for a number in the middle of a long prompt: plain, truncated, and by HOMER.

The module is light to import: torch comes with the command.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvbank.console.progress import progress
from model_worker.attachment.model_names import SHIPPED
from model_worker.cli.measuring import JournalFile, about, check_journal, weights_of
from model_worker.cli.places import check_plot
from model_worker.cli.quiet import load_quietly
from model_worker.cli.shown import AsJson, Shown, show, tables_of
from model_worker.settings.base import Count, CountOrZero, ModelName, Rope, Seed, described
from model_worker.settings.flags import takes
from model_worker.settings.model_run import RunsOn

# Options that say which answers are wanted: another run goes on from those that it wants too.
_WHICH = ("times", "length", "way")


class PasskeyOptions(RunsOn):
    """Options of `kvbank eval passkey`."""

    text: Annotated[
        tuple[Path, ...], described("Filler: a UTF-8 text or .gz, several times. Default: Python reference.")
    ] = ()
    model: ModelName = SHIPPED
    rope: Rope = None
    noise: Annotated[
        bool,
        described("A few sentences over and over as filler, and the fact said twice, as in HOMER's paper."),
    ] = False
    times: Annotated[tuple[Count, ...], described("Lengths in trained lengths, several times.")] = (2, 4, 8)
    length: Annotated[tuple[Count, ...], described("Lengths in tokens instead, several times.")] = ()
    trained: Annotated[
        Count | None, described("Tokens that count as the trained length; default: the model's own.")
    ] = None
    way: Annotated[
        tuple[str, ...],
        described(
            "A way by its name, such as 'homer, paper', or all that begin so, as homer; several times. Default: all."
        ),
    ] = ()
    samples: Annotated[Count, described("Prompts of each length.")] = 20
    seed: Annotated[Seed, described("Other seeds plant other facts.")] = 0
    size: Annotated[Count | None, described("HOMER: tokens of a node; default: half as trained.")] = None
    leaf: Annotated[Count | None, described("HOMER, tuned: tokens of a leaf; default: size.")] = None
    warmup: Annotated[CountOrZero | None, described("HOMER, tuned: layers before the first merge.")] = None
    merges: Annotated[Count | None, described("HOMER, tuned: heights that run layers.")] = None
    pool: Annotated[Count, described("HOMER, tuned: neighbours of a significance, odd.")] = 1
    again: Annotated[bool, described("HOMER, tuned: run the question over the result.")] = False


@takes(PasskeyOptions)
def passkey(
    options: PasskeyOptions,
    out: JournalFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also write an SVG: share of numbers by tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """Hide a fact in the middle of a long text and ask for it at the end: plain model, truncated, HOMER; in counts.

    The facts are those that kvbank-small was trained to copy, and any copying model can. With options of "HOMER, tuned"
    that way is run besides the published ones. Each answer is noted in the file of --log as it comes. With --trained
    the model is taken as one of a shorter length: HOMER's nodes and the last tokens go by that. With --noise the task
    is that of HOMER's paper, which is easier: nothing but the fact stands out, and it is said twice; --text then
    calibrates alone.

    Example: kvbank eval passkey --times 2 --times 4 --samples 5 --way "homer, balanced"
    """
    from model_worker.evaluate.figures import drawn
    from model_worker.evaluate.journal import Journal
    from model_worker.evaluate.passkey import Plan, Tuning, measure_passkeys
    from model_worker.evaluate.passkey_report import answers_line, passkey_figure, passkey_tables
    from model_worker.text_files import read_book, reference_text

    check_plot(plot)
    check_journal(out)
    tuning = Tuning(**options.model_dump(include={"size", "leaf", "warmup", "merges", "pool", "again"}))
    filler = "\n\n".join([read_book(path) for path in options.text] or [reference_text()])
    loaded, tokenizer = load_quietly(options.model, rope=options.rope, **options.loading())
    trained = options.trained or _trained(options, loaded)
    lengths = options.length or tuple(factor * trained for factor in options.times)
    plan = Plan(lengths, options.samples, options.seed, tuning, options.trained, options.way, options.noise)
    run = about("passkey", options)
    decided = {name: value for name, value in run["options"].items() if name not in _WHICH}
    journal = Journal(out, {"options": decided, "weights": weights_of(loaded, tokenizer), "text": filler})
    with progress() as bars:
        scores = measure_passkeys(loaded, tokenizer, filler, plan, journal, bars)
    found = {**run, "trained": trained, "scores": [score.document() for score in scores]}
    parts = tables_of(passkey_tables(found), answers_line(found))
    show(Shown(found, parts, drawn({"passkey.svg": passkey_figure(found)})), as_json=as_json, plot=plot)


def _trained(options: PasskeyOptions, loaded: Any) -> int:
    """Return the length that a model was trained for, which its configuration says before RoPE is scaled."""
    plain = load_quietly(options.model)[0] if options.rope else loaded
    return int(plain.config.max_position_embeddings)
