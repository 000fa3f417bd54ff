"""A bank gets another embedder: nothing is lost, whatever happens meanwhile, and whenever the run is killed."""

import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

import kvbank
from kvbank.embed import CallableEmbedder, LexicalEmbedder
from tests.sdk.conftest import READER
from tests.support import command

LINES = [f"Line {number} of the log, {'snow' if number % 50 == 0 else 'rain'}." for number in range(150)]
OLD, NEW = "lexical:d=64", "lexical:idf,d=32"


def kept(chunk: kvbank.Chunk) -> tuple[Any, ...]:
    """Return what stays of a chunk."""
    ids = chunk.token_ids, chunk.idempotency_key
    return chunk.text, chunk.start, dict(chunk.metadata), chunk.pinned, chunk.original_length, chunk.producer, *ids


@pytest.fixture
def memory(client: kvbank.Client) -> kvbank.TextMemory:
    options: dict[str, Any] = {"metadata": {"about": "logs"}, "capacity": kvbank.Capacity(chunks=10_000)}
    memory = kvbank.TextMemory(client, f"log-{uuid.uuid4().hex}", embed=OLD, **options)
    memory.add(LINES, source="log", metadata={"year": 1901})
    return memory


def test_texts_are_found_by_the_new_embedder_and_nothing_else_changes(
    client: kvbank.Client, memory: kvbank.TextMemory
) -> None:
    before = [kept(chunk) for chunk in memory]
    done: list[tuple[int, int]] = []
    bank = kvbank.reembed(client, memory.bank, NEW, progress=lambda *given: done.append(given))
    assert (bank.name, bank.embedding.dimension, bank.capacity) == (memory.bank, 32, kvbank.Capacity(chunks=10_000))
    assert dict(bank.metadata) == {"about": "logs", "embedder": NEW}
    assert done[-1] == (150, 150)
    new = kvbank.TextMemory(client, memory.bank)
    assert [kept(chunk) for chunk in new] == before
    assert {hit.text for hit in new.search("snow", top_k=3)} == {LINES[0], LINES[50], LINES[100]}
    assert new.add(LINES, source="log").known == 150  # the keys stay
    assert [found.name for found in client.list_banks() if found.name.startswith(memory.bank)] == [memory.bank]
    assert kvbank.reembed(client, memory.bank, NEW).uid == bank.uid  # it is done


def test_what_happens_meanwhile_counts(client: kvbank.Client, memory: kvbank.TextMemory) -> None:
    """Change the bank while it is copied: each change of the old bank reaches the new one."""
    first, second, third, *_ = [chunk.chunk_id for chunk in memory]
    changes: list[Callable[[], object]] = [
        lambda: memory.add("A late line about hail.", source="late"),
        lambda: client.delete_chunks(memory.bank, [first]),
        lambda: client.pin_chunks(memory.bank, [second]),
        lambda: client.update_chunk(memory.bank, third, {"source": "moved"}),
    ]

    def meanwhile(done: int, total: int) -> None:
        assert memory.search("snow", top_k=1)[0].text in LINES  # by the old embedder
        if changes:
            changes.pop(0)()

    kvbank.reembed(client, memory.bank, NEW, progress=meanwhile)
    while changes:
        pytest.fail("not all was tried")
    new = kvbank.TextMemory(client, memory.bank)
    chunks = list(new)
    assert [chunk.text for chunk in chunks] == [*LINES[1:], "A late line about hail."]
    assert [chunk.pinned for chunk in chunks[:2]] == [True, False]
    assert dict(chunks[1].metadata) == {"source": "moved"}
    assert new.search("hail", top_k=1)[0].source == "late"


KILLED = """
import os, signal, sys
import kvbank
from kvbank.embed import CallableEmbedder, LexicalEmbedder
address, bank, dies = sys.argv[1], sys.argv[2], int(sys.argv[3])
lexical, calls = LexicalEmbedder(16), []

def embed(texts):
    calls.append(texts)
    if len(calls) == dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return lexical.embed(texts)

def progress(done, total):
    if done == total and dies == 0:
        os.kill(os.getpid(), signal.SIGKILL)

with kvbank.connect(address) as client:
    kvbank.reembed(client, bank, CallableEmbedder(embed, name="killed", dimension=16), progress=progress)
"""


def test_a_run_that_was_killed_goes_on(address: str, client: kvbank.Client, memory: kvbank.TextMemory) -> None:
    before, beside = [kept(chunk) for chunk in memory], f"{memory.bank}~reembed"
    for dies, copied in ((2, 64), (0, 150)):  # at the second batch, and with all copied, before the switch
        run = [sys.executable, "-c", KILLED, address, memory.bank, str(dies)]
        assert subprocess.run(run, check=False, timeout=120).returncode == -signal.SIGKILL
        assert (client.get_bank(beside).usage.chunks, memory.count()) == (copied, 150)
        assert memory.search("snow", top_k=1)[0].text in LINES
    with pytest.raises(kvbank.AlreadyExists, match="for another bank or embedder"):
        kvbank.reembed(client, memory.bank, NEW)
    seen: list[int] = []

    def embed(texts: list[str]) -> np.ndarray:
        seen.append(len(texts))
        return LexicalEmbedder(16).embed(texts)

    kvbank.reembed(client, memory.bank, CallableEmbedder(embed, name="killed", dimension=16))
    assert seen == []  # all was copied
    new = kvbank.TextMemory(client, memory.bank, embed=CallableEmbedder(embed, name="killed", dimension=16))
    assert [kept(chunk) for chunk in new] == before
    assert client.get_bank(memory.bank).usage.chunks_written == 150


def test_kv_pins_expiry_and_producers_go_along(
    client: kvbank.Client, make_bank: Callable[..., str], make_chunk: Callable[..., kvbank.NewChunk], digests: dict
) -> None:
    name, day = make_bank(), timedelta(days=1)
    made = kvbank.Producer("tova:m=4", context="window", measured_loss=0.5)
    chunks = [
        make_chunk(1, text="snow on the mill", producer=made, pinned=True),
        make_chunk(2, text="rain in the harbour", expiry=kvbank.Expiry(day)),
        make_chunk(3, text="hail", expiry=kvbank.Expiry(day, renew=True)),
    ]
    client.write_many(name, chunks, **digests)
    old = list(client.list_chunks(name))
    with_kv = client.fetch(name, [chunk.chunk_id for chunk in old], reader_digest=READER)
    bank = kvbank.reembed(client, name, "lexical:d=32")
    new = list(client.list_chunks(name))
    assert [kept(chunk) for chunk in new] == [kept(chunk) for chunk in old]
    again = client.fetch(name, [chunk.chunk_id for chunk in new], reader_digest=READER)
    for before, after in zip(with_kv, again, strict=True):
        assert before.tensors.keys() == after.tensors.keys()  # type: ignore[union-attr]
        for key, tensor in before.tensors.items():  # type: ignore[union-attr]
            assert tensor.tobytes() == after.tensors[key].tobytes()  # type: ignore[index]
    expiring = [chunk.expire_time for chunk in (*old[1:2], *new[1:2]) if chunk.expire_time is not None]
    assert abs(expiring[0] - expiring[1]) < timedelta(minutes=1)
    assert (new[0].expire_time, new[2].expiry) == (None, kvbank.Expiry(day, renew=True))
    assert bank.kv is not None
    assert kvbank.TextMemory(client, name).search("mill", top_k=1)[0].text == "snow on the mill"


def test_a_bank_without_texts_is_refused_by_name(client: kvbank.Client, make_bank: Callable[..., str]) -> None:
    name = make_bank(dtype=None)
    client.write(name, kvbank.NewChunk(np.ones(16)), reader_digest="", embedder_digest="cd" * 32)
    with pytest.raises(kvbank.FailedPrecondition, match=f"{name}.*has no text for chunk"):
        kvbank.reembed(client, name, NEW)
    assert [bank.name for bank in client.list_banks() if bank.name.startswith(name)] == [name]
    with pytest.raises(kvbank.BankNotFound):
        kvbank.reembed(client, "no bank", NEW)


def test_the_command(address: str, client: kvbank.Client, memory: kvbank.TextMemory) -> None:
    words = ("reembed", memory.bank, "--memory", address, "--embed")
    ended = command.run(command.application(), *words, NEW, "--json")
    assert json.loads(ended.stdout)["dimension"] == 32
    assert command.run(command.application(), *words, NEW).stdout.startswith(f"{memory.bank}: 150 chunks are found by")
    wrong = command.run(command.application(), *words, "lexical:x")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
