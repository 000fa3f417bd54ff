"""A model reads documents into a bank with K-V, once by content, and goes on where a run was stopped."""

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbank
from model_worker.cli.documents import ModelDocuments
from model_worker.model import MemoryModel
from tests.support import command

LINE = "Ships come and go in the harbour of Velm, where nine cranes stand. "


@pytest.fixture
def library() -> str:
    return f"library-{uuid.uuid4().hex[:8]}"


def text_of(client: kvbank.Client, bank: str, source: object) -> str:
    """Return a document as its bank has it."""
    chunks = client.list_chunks(bank, filter=kvbank.Filter(metadata={"source": str(source)}))
    return "".join(chunk.text for chunk in sorted(chunks, key=lambda chunk: chunk.start))


def test_documents_are_read_once_and_from_the_first_difference_on(
    model_folder: Path, address: str, library: str, tmp_path: Path, sea: str
) -> None:
    book, empty = tmp_path / "book.txt", tmp_path / "empty.txt"
    book.write_text(LINE * 12)
    empty.write_text(" ")

    def remember(*words: object) -> dict[str, Any]:
        run = ("remember", "--model", model_folder, "--bank", library, "--memory", address, "--json", *words)
        ended = command.run(command.application(), *run)
        assert ended.exit_code == ("empty" in ended.stderr), ended
        found: dict[str, Any] = json.loads(ended.stdout)[0]
        return found

    with kvbank.connect(address) as client:
        first = remember(book, empty)
        assert (first["known"], first["removed"], text_of(client, library, book)) == (0, 0, LINE * 12)
        again = remember(book)
        assert (again["written"], again["known"], again["removed"]) == (0, first["written"], 0)
        book.write_text(LINE * 11 + LINE.replace("nine", "nice"))
        changed = remember(book)
        assert 0 < changed["removed"] == changed["written"] < changed["known"]
        assert text_of(client, library, book) == book.read_text()
        assert client.get_bank(library).metadata["embedder"] == "lexical:idf"
    chat = ("chat", "-s", sea, "--model", model_folder, "--memory", address, "--max-new-tokens", 2, "--reads", library)
    assert f"reads {library}" in command.run(command.application(), *chat, stdin="ahoy\n").stderr


def test_a_bank_that_does_not_name_its_embedder_keeps_it(
    model_folder: Path, client: kvbank.Client, library: str
) -> None:
    with MemoryModel.from_pretrained(str(model_folder), memory=client, bank=library) as model:
        model.read(LINE)
    documents = ModelDocuments(client, library, str(model_folder), loading={})
    assert documents.add(LINE, "book", False, lambda done, total: None)[0] > 0
    documents.close()


def test_a_document_without_tokens_is_left_out(model_folder: Path, address: str, library: str, tmp_path: Path) -> None:
    """Let a tokenizer drop a sign, so that a text of it has no tokens."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "\u2603"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "snowman.txt").write_text("\u2603")
    (tmp_path / "velm.txt").write_text(LINE)
    words = ("remember", tmp_path / "snowman.txt", tmp_path / "velm.txt", "--model", model, "--bank", library)
    ended = command.run(command.application(), *words, "--memory", address, "--json")
    first, second = json.loads(ended.stdout)
    assert (ended.exit_code, "is empty" in first["error"]) == (1, True)
    assert (second["error"], second["written"] > 0) == ("", True)


def test_the_letters_of_a_passage_are_not_for_a_model(model_folder: Path, address: str, tmp_path: Path) -> None:
    (tmp_path / "velm.txt").write_text(LINE)
    words = ("remember", tmp_path / "velm.txt", "--model", model_folder, "--letters", 100, "--memory", address)
    ended = command.run(command.application(), *words)
    assert (ended.exit_code, "--letters is for a bank of texts" in ended.stderr) == (2, True)


def test_what_the_bank_has_is_not_counted_as_written(model_folder: Path, client: kvbank.Client, library: str) -> None:
    """Go back to an earlier state, whose chunks are there, behind those of a later one."""
    documents = ModelDocuments(client, library, str(model_folder), embed="lexical", loading={})
    first, *_, last = (documents.add(text, "book", True, lambda *_: None) for text in (LINE, LINE.upper(), LINE))
    assert last == (0, first[0], 0)
    documents.close()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[kvbank.Client]:
    with kvbank.connect(address) as client:
        yield client


def test_a_reading_that_was_stopped_goes_on(model_folder: Path, client: kvbank.Client, library: str) -> None:
    text, seen = LINE * 30, list[int]()

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    documents = ModelDocuments(client, library, str(model_folder), embed="lexical", loading={})
    with pytest.raises(KeyboardInterrupt):
        documents.add(text, "book", False, stop)
    half = client.get_bank(library).usage.chunks
    assert half > 0
    written, known, removed = documents.add(text, "book", False, lambda done, total: seen.append(done))
    assert (known, removed) == (half, 0)
    assert (client.get_bank(library).usage.chunks, text_of(client, library, "book")) == (half + written, text)
    assert seen[0] > len(text) // 10  # what was read long before is not read again
    documents.close()
