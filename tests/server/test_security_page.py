"""docs/security.md says what is so: its commands are run as they stand there, against a real server, and its table of
rights is that of the code."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import yaml

from memory_service.domain.access import Caller, Right, Role
from memory_service.domain.rights import RIGHTS
from tests.support.shell_commands import free_ports, kvbank_on_path

TEXT = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
PORTS = ("7400", "9400")


class Block(NamedTuple):
    """A block of the page: its language, the word behind that, what it says, and the answers that stand below it."""

    language: str
    how: str
    text: str
    answers: list[str]


def blocks() -> Iterator[Block]:
    found = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for (language, how, text), after in zip(found, [*found[1:], ("", "", "")], strict=True):
        if language != "text":
            yield Block(language, how, text, after[2].splitlines() if after[0] == "text" else [])


def check(answers: list[str], said: str) -> None:
    """Check that each answer of the page is a part of a line of what was said; "..." stands for anything."""
    for answer in answers:
        words = (re.escape(word).replace(r"\.\.\.", ".*") for word in answer.split())
        assert re.search(r"[^\S\n]+".join(words), said), f"{answer!r} is not in:\n{said}"


class Reader:
    """Somebody who pastes the blocks of the page into shells, in one folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("KVBANK_")}
        self._environment |= {"PATH": stack.enter_context(kvbank_on_path())}
        self._folder, self._stack = folder, stack
        self._ports = free_ports(len(PORTS))
        (folder / "state.sh").touch()

    def paste(self, block: Block) -> None:
        text = block.text
        for port, free in zip(PORTS, self._ports, strict=True):
            text = text.replace(port, free)
        if block.language == "python":
            check(block.answers, self._said(f". ./state.sh; exec {sys.executable} -", 0, text))
        elif block.how == "serve":
            self._serve(text)
        elif block.how == "fails":
            said = [self._said(f". ./state.sh; {line}", 1) for line in text.splitlines()]
            check(block.answers, "".join(said))
        else:
            check(block.answers, self._said(f". ./state.sh\n{text}\nexport -p > state.sh", 0))

    def _said(self, script: str, ends: int, stdin: str = "") -> str:
        """Run a script of the shell, which ends with this status, and return what it said."""
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            cwd=self._folder,
            env=self._environment,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == ends, f"{script}\n{done.stdout}"
        return done.stdout

    def _serve(self, text: str) -> None:
        # A process of its own, which a signal reaches.
        script = f"kvbank() {{ exec {sys.executable} -c 'from kvbank.cli import main; main()' \"$@\"; }}; {text}"
        process = self._stack.enter_context(
            subprocess.Popen(
                ["bash", "-c", script], cwd=self._folder, env=self._environment, stdout=subprocess.PIPE, text=True
            )
        )
        self._stack.callback(process.terminate)
        assert process.stdout is not None
        assert " serving " in process.stdout.readline()


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is missing")
@pytest.mark.slow
def test_every_command_of_the_page_runs_and_answers_as_the_page_says(tmp_path: Path) -> None:
    with ExitStack() as stack:
        reader = Reader(tmp_path, stack)
        pasted = [block for block in blocks() if block.language in ("sh", "python")]
        for block in pasted:
            reader.paste(block)
    assert {block.how for block in pasted} == {"", "serve", "fails"}
    for private in [*(tmp_path / "keys").iterdir(), tmp_path / "audit.jsonl", tmp_path / "memory"]:
        assert private.stat().st_mode & 0o077 == 0, private


def test_the_files_for_other_programs_can_be_read_by_them() -> None:
    found = [yaml.safe_load(block.text) for block in blocks() if block.language == "yaml"]
    assert found[0]["kind"] == "NetworkPolicy"
    assert found[1]["scrape_configs"][0]["scheme"] == "https"


def test_the_table_of_rights_is_that_of_the_code() -> None:
    assert rights_table() in TEXT


def rights_table() -> str:
    """Write the table of rights as the page has it."""
    rows = []
    for right in get_args(Right):
        may = ["yes" if Caller("t", frozenset({role})).may(right) else "" for role in get_args(Role)]
        methods = ", ".join(f"`{method}`" for method, asked in RIGHTS.items() if asked == right)
        rows.append("| " + " | ".join([f"`{right}`", *may, methods]) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(rights_table())
