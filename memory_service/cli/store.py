"""The commands for whole stores: `kvbank store copy`."""

from dataclasses import asdict
from typing import Annotated

import typer

from kvbank.console.output import print_json, print_line
from kvbank.console.progress import progress
from memory_service.cli.errors import told
from memory_service.cli.findings import print_problems, summary, transferred

_OBJECTS = "s3://BUCKET/PREFIX of the payloads, where {} is a database."
store = typer.Typer(no_args_is_help=True, help="Move whole stores between a folder and a database.")


@store.command()
def copy(
    source: Annotated[
        str, typer.Argument(metavar="FROM", help="Data folder that is not served, backup, or postgresql://...")
    ],
    target: Annotated[
        str, typer.Argument(metavar="TO", help="Folder to make, or postgresql://... of an empty database.")
    ],
    from_objects: Annotated[str, typer.Option(help=_OBJECTS.format("FROM"))] = "",
    to_objects: Annotated[str, typer.Option(help=_OBJECTS.format("TO"))] = "",
    skip_damaged: Annotated[bool, typer.Option("--skip-damaged", help="Leave out what is damaged.")] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Copy a database as it is now, though services have it open.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Copy all of a store: banks, chunks, sessions, tenants, keys, receipts.

    Every row and payload is compared with its checksum, and read back. TO is not served before all of it is there; a
    run that was interrupted is called again, and goes on. Ids stay; the copy has a store id of its own.

    Example: kvbank store copy ./memory postgresql://kvbank@db/kvbank --to-objects s3://my-bucket/kvbank
    """
    from memory_service.care.copying import places
    from memory_service.care.copying.ends import Mark
    from memory_service.care.copying.places import Place
    from memory_service.care.copying.run import copy as run

    with told(), progress(not as_json) as show:
        whence = places.check(Place(source, from_objects), "--from-objects")
        where = places.check(Place(target, to_objects), "--to-objects")
        with (
            places.reading(whence, live=live) as read,
            places.making(where, Mark(read.store_id, read.title)) as made,
        ):
            whole, findings = run(read, made, skip_damaged=skip_damaged, progress=show)
            title, store_id = made.title, made.store_id
    if as_json:
        problems = [asdict(problem) for problem in findings.problems]
        report = {"ok": whole, "to": title, "store_id": store_id, "totals": findings.totals, "problems": problems}
        print_json(report)
    elif whole:
        left_out = f"; left out: {len(findings.problems)}" if findings.problems else ""
        print_line(f"{title}: {summary(findings.totals)}{transferred(findings.totals)}{left_out}; store id {store_id}")
        print_problems(findings.problems)
    else:
        print_line(f"{read.title} is damaged, and the copy is not finished; repair it, or go on with --skip-damaged")
        print_problems(findings.problems)
    raise typer.Exit(0 if whole else 1)
