"""Commands of care, run as a person runs them, and data folders that are looked at and damaged between them."""

import contextlib
import json
import shutil
import sqlite3

from tests.support import command


def run(*arguments, code=0):
    """Run a command and return what it printed; a refusal is one line on stderr."""
    result = command.run(command.application(), *arguments)
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert code != 1 or result.stderr.count("\n") <= 1
    return result


def answer(*arguments, code=0):
    return json.loads(run(*arguments, "--json", code=code).stdout)


def refusal(*arguments, code=1):
    result = run(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("kvbank: ")
    return result.stderr


def kinds(found):
    return sorted({problem["kind"] for problem in found["problems"]})


def clean(folder):
    for options in ([], ["--fast"]):
        found = answer("check", folder, *options)
        assert found["ok"], found
        assert found["problems"] == []
    return found["totals"]


def tree(folder, *, without=()):
    """Name -> (size, time of the last change). Not by content: opening SQLite's files here would drop its locks."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(without)
    }


@contextlib.contextmanager
def database(data):
    connection = sqlite3.connect(data / "metadata.db", isolation_level=None)
    yield connection
    connection.close()


def execute(data, *statements):
    with database(data) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount != 0, statement


def file_of(data, chunk_id=2):
    return next((data / "payloads").glob(f"*/*/{chunk_id}.safetensors"))


def flip(path, place=-20):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def set_column(data, column, value):
    table = "contents" if column in ("text", "token_ids", "embedding", "payload") else "chunks"
    with database(data) as connection:
        before = connection.execute(f"SELECT hex({column}) FROM {table} WHERE chunk_id = 2").fetchone()
        connection.execute(f"UPDATE {table} SET {column} = {value} WHERE chunk_id = 2")
        assert connection.execute(f"SELECT hex({column}) FROM {table} WHERE chunk_id = 2").fetchone() != before


def make_unreadable(file):
    """Alone in its folder, which the disk then does not give."""
    shutil.rmtree(file.parent)
    file.parent.symlink_to(file.parent)
