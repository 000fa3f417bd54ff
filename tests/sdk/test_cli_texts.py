"""The commands on texts and chunks: what they print, and what they delete."""

import gzip
import io
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

import kvbank
from kvbank._cli.text_options import conditions
from kvbank.files import documents
from tests.support import command

LINES = ["The harbour was empty.", "Snow fell on\nthe old mill.", "She counted \x1b[31mcoins\u202e."]


def run(*words: Any, stdin: Any = "") -> command.Ended:
    return command.run(command.application(), *words, stdin=stdin)


@pytest.fixture
def library(client: kvbank.Client, address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVBANK_MEMORY", address)
    name = f"library-{uuid.uuid4().hex}"
    memory = kvbank.TextMemory(client, name)
    memory.add(LINES, source="novel.txt", metadata={"year": 1901, "final": True})
    memory.add("Snow is frozen water.", source="lexicon", metadata={"year": 1999})
    return name


def test_search(library: str, client: kvbank.Client) -> None:
    shown = run("search", library, "snow on the mill", "--top-k", 2).stdout
    assert [line.split()[2] for line in shown.splitlines()] == ["source", "novel.txt", "lexicon"]
    assert "Snow fell on the old mill." in shown
    found = json.loads(run("search", library, "snow", "--filter", "year>=1950", "--json").stdout)
    assert [(hit["text"], hit["metadata"]["source"], hit["score"] > 0) for hit in found] == [
        ("Snow is frozen water.", "lexicon", True)
    ]
    assert json.loads(run("search", library, "snow", "--source", "none", "--json").stdout) == []
    assert run("search", library, "?!").stdout == "nothing was found\n"
    assert all(chunk.retrieval_count == 0 for chunk in client.list_chunks(library))
    code, _, stderr = run("search", library, "snow", "--embed", "lexical:d=64")
    assert (code, "another embedder" in stderr, stderr.count("\n")) == (1, True, 1)


def test_options_of_a_model_are_not_dropped_where_there_is_none(library: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Snow fell.")
    ended = run("remember", tmp_path / "a.txt", "--bank", library, "--compressor", "tova:m=48")
    assert (ended.exit_code, "those of a --model" in ended.stderr, ended.stderr.count("\n")) == (2, True, 1)


def test_chunks_are_listed_and_shown(library: str) -> None:
    shown = run("chunk", "ls", library).stdout
    assert "\\x1b[31mcoins\\u202e" in shown
    assert len(shown.splitlines()) == 5
    some = run("chunk", "ls", library, "--filter", "final", "--limit", 2).stdout.splitlines()
    assert (len(some), some[-1]) == (4, "there are more than these 2: --limit N")
    listed = json.loads(run("chunk", "ls", library, "--source", "novel.txt", "--json").stdout)
    assert [(chunk["text"], chunk["metadata"]["year"]) for chunk in listed] == [(line, 1901) for line in LINES]
    number = listed[2]["chunk_id"]
    assert json.loads(run("chunk", "show", library, number, "--json").stdout) == listed[2]
    one = run("chunk", "show", library, number).stdout
    assert "metadata   source = novel.txt\n" in one
    assert one.endswith("She counted \\x1b[31mcoins\\u202e.\n")
    assert run("chunk", "show", library, 10**9).exit_code == 1


def test_chunks_are_deleted(library: str, client: kvbank.Client) -> None:
    asked = run("chunk", "rm", library, "--source", "novel.txt", stdin="n\n")
    assert (asked.exit_code, "Delete 3 chunks of bank" in asked.stderr) == (1, True)
    assert client.get_bank(library).usage.chunks == 4
    assert run("chunk", "rm", library, "--source", "novel.txt", "--yes").stdout == f"deleted 3 chunks of {library}\n"
    [left] = client.list_chunks(library)
    done = run("chunk", "rm", library, left.chunk_id, 10**9, "--yes", "--json")
    assert json.loads(done.stdout) == {"bank": library, "deleted": 1}
    for wrong in ((), (left.chunk_id, "--source", "a")):
        ended = run("chunk", "rm", library, *wrong, "--yes")
        assert (ended.exit_code, "and not both" in ended.stderr) == (2, True)


def test_a_document_is_forgotten_with_a_receipt(library: str, client: kvbank.Client) -> None:
    asked = run("chunk", "forget", library, "--source", "novel.txt", stdin="n\n")
    assert (asked.exit_code, "Forget 3 chunks of bank" in asked.stderr) == (1, True)
    receipt = json.loads(run("chunk", "forget", library, "--source", "novel.txt", "--yes", "--json").stdout)
    assert ([chunk["bank"] for chunk in receipt["chunks"]], receipt["places"]["rows"]) == ([library] * 3, 3)
    assert [chunk.metadata["source"] for chunk in client.list_chunks(library)] == ["lexicon"]
    again = run("chunk", "forget", library, "--source", "novel.txt", "--yes").stdout
    assert f"receipt    {receipt['receipt_id']}\n" in again
    assert "chunks     3\n" in again
    assert run("chunk", "forget", library, "--yes").exit_code == 2


def test_conditions() -> None:
    found = conditions(["a=1", 'a="1"', "b!=x=y", "c>=2", "c<3.5", "draft", "e=true"])
    assert found.metadata == {"a": [1, "1"], "c": kvbank.Range(at_least=2, below=3.5), "draft": ..., "e": [True]}
    assert found.exclude == {"b": ["x=y"]}
    for wrong in (["a>x"], [""], ["a=1", "a>1"]):
        with pytest.raises(Exception, match=r"number|condition|range"):
            conditions(wrong)


def remember(bank: str, *words: Any, **options: Any) -> command.Ended:
    return run("remember", *words, "--bank", bank, **options)


def test_documents_are_remembered_once_and_forgotten_by_name(
    library: str, client: kvbank.Client, tmp_path: Path
) -> None:
    book, notes = tmp_path / "book.txt.gz", tmp_path / "notes.md"
    book.write_bytes(gzip.compress(("\ufeff" + "The ship left the harbour at dawn. " * 90).encode()))
    notes.write_text("Buy coffee.\n\nCall Ann.\n")
    first = json.loads(remember(library, tmp_path / "*", "--json").stdout)
    assert [(each["source"], each["known"], each["error"]) for each in first] == [
        (str(book), 0, ""),
        (str(notes), 0, ""),
    ]
    again = json.loads(remember(library, book, notes, "--json").stdout)
    assert [(each["written"], each["known"]) for each in again] == [(0, each["written"]) for each in first]
    notes.write_text("Buy tea.\n")
    assert remember(library, notes).stdout == f"{notes}: 1 passages written, 0 known, 1 removed\n"
    notes.write_text("Buy milk.\n")
    assert remember(library, notes, "--keep").stdout == f"{notes}: 1 passages written, 0 known\n"
    memory = kvbank.TextMemory(client, library)
    assert [chunk.text for chunk in memory.chunks(source=str(notes))] == ["Buy tea.\n", "Buy milk.\n"]
    assert (
        "".join(chunk.text for chunk in memory.chunks(source=str(book))) == "The ship left the harbour at dawn. " * 90
    )
    assert run("chunk", "rm", library, "--source", notes, "--yes").stdout == f"deleted 2 chunks of {library}\n"


def test_stdin_has_a_name(library: str) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"Ahoy, said the captain."))
    assert remember(library, "-", "--source", "log", stdin=typed).stdout == "log: 1 passages written, 0 known\n"
    assert "Ahoy" in run("search", library, "captain", "--source", "log").stdout


def test_what_is_no_text_is_left_out_in_one_line(library: str, tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("Good.")
    wrong = {"zero.txt": b"a\0b", "latin.txt": b"caf\xe9", "cut.gz": b"\x1f\x8b\x08\0nonsense", "empty.md": b" \n"}
    reasons = ("byte 1 is zero", "byte 3 is not UTF-8", "cannot read", "is empty")
    for (name, data), reason in zip(wrong.items(), reasons, strict=True):
        (tmp_path / name).write_bytes(data)
        ended = remember(library, tmp_path / name, good)
        assert (ended.exit_code, ended.stderr.count("\n")) == (1, 1)
        assert f"1 of 2 documents were left out: {'cannot' if 'cannot' in reason else tmp_path / name}" in ended.stderr
        assert reason in ended.stderr
        assert f"{good}: " in ended.stdout
    for words, reason in (
        ((tmp_path,), "is a folder"),
        ((tmp_path / "none.txt",), "cannot read"),
        ((tmp_path / "*.none",), "no file is called"),
    ):
        ended = remember(library, *words)
        assert (ended.exit_code, ended.stderr.count("\n"), reason in ended.stderr) == (1, 1, True)
    assert remember(library, good, tmp_path / "x", "--source", "one").exit_code == 2
    with pytest.raises(kvbank.InvalidArgument, match="more than 3 bytes"):
        documents.read(str(good), largest=3)
