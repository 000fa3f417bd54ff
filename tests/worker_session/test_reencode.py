"""A bank gets the K-V of another model: all that it says of its chunks stays, and nothing is lost on the way."""

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import kvbank
from model_worker.attachment.layer_choice import LayerChoice, named_parts
from model_worker.cli.reencode_options import ReencodeOptions
from model_worker.cli.reencoding import reencoded
from model_worker.errors import BankMismatch
from model_worker.model import MemoryModel
from tests.support import command

from .conftest import save_model
from .conversing import CHUNK, WINDOW

LINES = "Ships come and go in the harbour of Velm. Nine cranes stand there. " * 5


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[kvbank.Client]:
    with kvbank.connect(address) as client:
        yield client


@pytest.fixture(scope="module")
def model(model_folder: Path, client: kvbank.Client) -> Iterator[MemoryModel]:
    with MemoryModel.from_pretrained(str(model_folder), memory=client, bank=(), chunk=CHUNK, window=WINDOW) as model:
        yield model


@pytest.fixture
def library(model: MemoryModel) -> str:
    """Return the name of a bank in which the first model has read a document."""
    name = f"library-{uuid.uuid4().hex[:8]}"
    model.read(LINES, memory=model.with_bank(name), source="velm.txt", metadata={"year": 1901})
    return name


def kept(chunk: kvbank.Chunk) -> tuple[Any, ...]:
    return chunk.text, chunk.start, dict(chunk.metadata), chunk.token_ids, chunk.pinned, chunk.idempotency_key


def test_the_bank_is_read_by_the_new_model_and_says_the_same(
    client: kvbank.Client, library: str, address: str, other_model_folder: Path
) -> None:
    before = list(client.list_chunks(library))
    client.pin_chunks(library, [before[1].chunk_id])
    before = list(client.list_chunks(library))
    words = ("reencode", library, "--model", other_model_folder, "--memory", address)
    done = command.run(command.application(), *words, "--json")
    assert json.loads(done.stdout)["chunks"] == len(before), done
    assert [kept(chunk) for chunk in client.list_chunks(library)] == [kept(chunk) for chunk in before]
    with MemoryModel.from_pretrained(
        str(other_model_folder), memory=client, bank=library, chunk=CHUNK, sinks=0
    ) as other:
        own = other.with_bank(f"{library}-own")
        other.read(LINES, memory=own, source="velm.txt")
        reader = {"reader_digest": other.attachment.reader.digest, "tensors": "torch"}
        found, expected = (
            client.fetch(bank, [chunk.chunk_id for chunk in client.list_chunks(bank)], **reader)
            for bank in (library, f"{library}-own")
        )
        for one, two in zip(found, expected, strict=True):  # as if it had read the document itself
            assert one.tensors is not None
            assert two.tensors is not None
            assert all((one.tensors[key] - two.tensors[key]).abs().max() < 1e-3 for key in two.tensors)
    assert command.run(command.application(), *words).exit_code == 0  # it is done
    assert [bank.name for bank in client.list_banks() if "~" in bank.name] == []


def test_a_run_that_was_stopped_goes_on_and_the_old_bank_answers_meanwhile(
    client: kvbank.Client, model: MemoryModel, library: str, other_model_folder: Path
) -> None:
    options, total = ReencodeOptions(model=str(other_model_folder)), client.get_bank(library).usage.chunks

    def stop(done: int, total: int) -> None:
        model.with_bank(library)  # its own model still has it
        if done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reencoded(client, library, options, stop)
    half = client.get_bank(f"{library}~reencode").usage.chunks
    assert 0 < half < total
    first: list[int] = []
    bank = reencoded(client, library, options, lambda done, total: first.append(done))
    assert (bank.usage.chunks, bank.usage.chunks_written) == (total, total)
    assert first[0] > half
    with pytest.raises(BankMismatch, match="another model"):
        model.with_bank(library)


def test_other_layers_of_the_same_model_are_other_kv(
    client: kvbank.Client, model: MemoryModel, library: str, model_folder: Path, tmp_path: Path
) -> None:
    parts, chosen = named_parts(model.attachment.reader), {"memory_layers": (1,), "retrieval_layers": (1,)}
    choice = LayerChoice.model_validate({"model": "tiny", "reader_parts": parts, "mode": "per_layer", **chosen})
    choice.write(tmp_path / "layers.json")
    options = ReencodeOptions(model=str(model_folder), layers=tmp_path / "layers.json")
    kv = reencoded(client, library, options, lambda done, total: None).kv
    assert kv is not None
    assert tuple(kv.layers) == (1,)


def test_texts_get_the_kv_of_a_model(client: kvbank.Client, model: MemoryModel, model_folder: Path) -> None:
    name = f"texts-{uuid.uuid4().hex[:8]}"
    kvbank.TextMemory(client, name).add(["Nine cranes stand in Velm.", "The sea is wide."], source="notes")
    reencoded(client, name, ReencodeOptions(model=str(model_folder)), lambda done, total: None)
    [found] = model.with_bank(name).recall([model.ids("Who has nine cranes?")]) or []
    assert found[-1].provenance is not None
    assert found[-1].provenance.text == "Nine cranes stand in Velm."


def test_another_compressor_or_dtype_is_heeded(
    client: kvbank.Client, library: str, model_folder: Path, model: MemoryModel
) -> None:
    """Give a bank other K-V of its own model; a bank that was begun for other K-V is refused, and one that is done is
    left alone."""

    def reencode(progress: Callable[[int, int], object] = lambda *_: None, **options: Any) -> kvbank.Bank:
        return reencoded(client, library, ReencodeOptions(model=str(model_folder), **options), progress)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    was = client.get_bank(library)
    assert reencode().uid == was.uid
    with pytest.raises(KeyboardInterrupt):
        reencode(stop, compressor="window:m=4")
    with pytest.raises(kvbank.AlreadyExists, match="another bank, model or compressor"):
        reencode(compressor="window:m=5")
    short = reencode(compressor="window:m=4")
    assert {chunk.stored_length for chunk in client.list_chunks(library)} == {4}
    assert reencode(compressor="window:m=4").uid == short.uid != was.uid
    half = reencode(compressor="window:m=4", dtype="bfloat16")
    assert half.kv is not None
    assert (half.kv.dtype, half.uid == short.uid) == ("bf16", False)


def test_a_text_without_tokens_is_refused_by_its_chunk(client: kvbank.Client, address: str, tmp_path: Path) -> None:
    """Give texts the K-V of a model that has one of them as a control token; without that text the run goes on."""
    folder, name = save_model(tmp_path / "model", 1), f"texts-{uuid.uuid4().hex[:8]}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "#"})
    tokenizer.save_pretrained(folder)
    kvbank.TextMemory(client, name).add(["Nine cranes stand in Velm.", "#"])
    words = ("reencode", name, "--model", folder, "--memory", address)
    done = command.run(command.application(), *words)
    bad = [chunk.chunk_id for chunk in client.list_chunks(name) if chunk.text == "#"]
    assert (done.exit_code, f"the text of chunk {bad[0]} has no tokens" in done.stderr) == (1, True), done
    client.delete_chunks(name, bad)
    assert command.run(command.application(), *words).exit_code == 0
