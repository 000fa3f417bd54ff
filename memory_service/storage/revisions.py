"""The revisions of the tables of a database, each of which is a migration of Alembic in a folder of its engine."""

from pathlib import Path

from sqlalchemy import Connection


def names(folder: Path) -> list[str]:
    """Return all revisions, oldest first; the name of a migration's file begins with its revision."""
    return sorted(path.name.split("_")[0] for path in (folder / "versions").glob("[0-9]*_*.py"))


def run(folder: Path, connection: Connection, revision: str = "head") -> None:
    """Bring the tables that a connection reaches to a revision. A transaction that the connection is in goes on."""
    # Here, because the import takes a third of a second and only older tables need it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
