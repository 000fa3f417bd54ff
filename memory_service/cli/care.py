"""The commands that care for a data folder: `kvbank check`, `repair`, `backup` and `restore`. This file owns what they
print, and their exit codes; the work is done in `memory_service.care`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from kvbank.console.ending import USAGE, Failed
from kvbank.console.output import print_json, print_line
from kvbank.console.progress import progress
from memory_service.cli.errors import told
from memory_service.cli.findings import line, number, print_problems, summary, transferred


def _folder(data: Path) -> Path:
    """Refuse a URL, of which a path has one slash. Errors: Failed."""
    if str(data).startswith(("postgresql:/", "postgres:/")):
        text = "this is for folders; for a database there are kvbank check, kvbank repair, kvbank store copy --live"
        raise Failed(f"{text} and the tools of PostgreSQL", USAGE)
    if str(data).startswith("s3:/"):
        raise Failed("s3:// is no place for data; name a data folder", USAGE)
    return data


_OBJECTS = "s3://BUCKET/PREFIX of the payloads of a database."
Data = Annotated[Path, typer.Argument(metavar="DATA", help="Data folder.", callback=_folder)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to an application."""
    for command in (check, repair, backup, restore):
        app.command()(command)


def check(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Data folder, served or not, a backup (also s3://...), or postgresql://..."
        ),
    ],
    objects: Annotated[str, typer.Option(help=_OBJECTS)] = "",
    fast: Annotated[
        bool, typer.Option("--fast", help="Look only at existence and size of payloads; read none.")
    ] = False,
    sample: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Payloads of a database to read, spread over all; 0: all.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare records, payloads and index. Changes nothing; works while servers serve what is checked.

    Ends with 0 when nothing is wrong, with 1 when something is.

    Example: kvbank check /var/lib/kvbank --fast
    """
    from memory_service.care.any_check import check as run
    from memory_service.care.copying.places import Place

    with told(), progress(not as_json) as show:
        findings = run(Place(data, objects), fast=fast, sample=sample, progress=show)
    ok = not findings.problems
    if as_json:
        problems = [asdict(problem) for problem in findings.problems]
        print_json({"ok": ok, "totals": findings.totals, "problems": problems})
    else:
        print_line(
            f"{summary(findings.totals)}: {number(len(findings.problems), 'problem') if not ok else 'no problem'}"
        )
        print_problems(findings.problems)
    raise typer.Exit(0 if ok else 1)


def repair(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Data folder that is not served, or postgresql://...")],
    objects: Annotated[str, typer.Option(help=_OBJECTS)] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Mend what `check` finds: in a folder whose server is stopped, or in a database while services go on.

    Damaged chunks go to quarantine (record and file), files that no chunk owns and bad snapshots of the index are
    removed, usage is counted anew. Ends with 0 when all is mended.

    Example: kvbank repair /var/lib/kvbank --dry-run
    """
    from memory_service.care.any_repair import repair as run
    from memory_service.care.copying.places import Place

    with told(), progress(not as_json) as show:
        repaired = run(Place(data, objects), dry_run=dry_run, progress=show)
    if as_json:
        done = [{"done": deed, **asdict(problem)} for deed, problem in repaired.done]
        left = [asdict(problem) for problem in repaired.left]
        print_json({"ok": not repaired.left, "dry_run": dry_run, "done": done, "left": left})
    else:
        for deed, problem in repaired.done:
            print_line(f"{'would be ' if dry_run else ''}{deed}: {line(problem)}")
        for problem in repaired.left:
            print_line(f"left: {line(problem)}")
        if not repaired.done and not repaired.left:
            print_line("nothing to mend")
    raise typer.Exit(1 if repaired.left else 0)


def backup(
    data: Data,
    place: Annotated[str, typer.Argument(metavar="DEST", help="Folder to make, or s3://BUCKET/PREFIX.")],
    base: Annotated[Path | None, typer.Option(help="Older backup: link its files where they are the same.")] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a folder, also while a server serves it; every payload is verified as it is copied.

    DEST appears when all of it is durable; until then it is DEST.partial, which the next run takes up. A prefix of a
    bucket has one backup: the next run there sends what is new. Ends with 1 when chunks are damaged: they are left out
    and listed, the rest is kept.

    Example: kvbank backup /var/lib/kvbank /backups/today --base /backups/yesterday
    """
    from memory_service.care.backup import backup as run

    with told(), progress(not as_json) as show:
        findings = run(data, place, base=base, progress=show)
    ok = not findings.problems
    if as_json:
        problems = [asdict(problem) for problem in findings.problems]
        print_json({"ok": ok, "backup": place, "totals": findings.totals, "problems": problems})
    else:
        print_line(f"{place}: {summary(findings.totals)}{transferred(findings.totals)}")
        print_problems(findings.problems)
    raise typer.Exit(0 if ok else 1)


def restore(
    source: Annotated[
        str, typer.Argument(metavar="BACKUP", help="What `backup` made: a folder or s3://BUCKET/PREFIX.")
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Data folder to make; missing or empty.", callback=_folder)
    ],
    skip_damaged: Annotated[bool, typer.Option("--skip-damaged", help="Restore the rest of a damaged backup.")] = False,
    migrate: Annotated[bool, typer.Option("--migrate", help="Upgrade a backup of an older schema.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup in place, after all of it was verified.

    Chunks keep their ids; the folder gets a new store id, so that what clients
    have cached of the old one is not used.

    Example: kvbank restore /backups/today /var/lib/kvbank
    """
    from memory_service.care.restore import restore as run

    with told(), progress(not as_json) as show:
        store_id, findings = run(source, data, skip_damaged=skip_damaged, migrate=migrate, progress=show)
    ok = bool(store_id)
    if as_json:
        problems = [asdict(problem) for problem in findings.problems]
        report = {"ok": ok, "data": data, "store_id": store_id, "totals": findings.totals, "problems": problems}
        print_json(report)
    elif ok:
        left_out = f"; left out: {len(findings.problems)}" if findings.problems else ""
        print_line(f"{data}: {summary(findings.totals)}{left_out}; store id {store_id}")
        print_problems(findings.problems)
    else:
        print_line(f"{source} is damaged, nothing was restored; --skip-damaged restores the rest")
        print_problems(findings.problems)
    raise typer.Exit(0 if ok else 1)
