"""A source that is read again after its chunks have gone is stored again; nothing else comes back, or twice."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.errors import InputError
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.remember.spool import Spool
from model_worker.window.encoding import encode
from tests.support.clocks import HOUR, Hands
from tests.support.restartable import Service, wait_for
from tests.worker.tiny import bank, build, tokenizer, tokens

BOOK = tokens(40, seed=4)[0].tolist()


@pytest.fixture(scope="module")
def attachment() -> Iterator[Attachment]:
    attachment = attach(build("llama_gqa"), tokenizer())
    yield attachment
    attachment.detach()


def stored(client: kvbank.Client, memory: Memory) -> list[int]:
    """Return the source as the bank has it."""
    found = sorted(client.list_chunks(str(memory.bank)), key=lambda chunk: chunk.start)
    return [token for chunk in found for token in chunk.token_ids]


def forget(client: kvbank.Client, memory: Memory) -> None:
    client.delete_chunks(str(memory.bank), [chunk.chunk_id for chunk in client.list_chunks(str(memory.bank))])


@pytest.fixture(scope="module")
def model(client: kvbank.Client) -> Iterator[MemoryModel]:
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=client, bank=(), chunk=8, window=16, top_k=2) as model:
        yield model


def test_reading_again_stores_what_was_deleted(model: MemoryModel, client: kvbank.Client) -> None:
    """Reading stores the chunks each time; also when recall differs by then, and with it the K-V of the same tokens."""
    memory = model.with_bank(bank(), source="book")
    for time in range(3):
        model.read(BOOK, memory=memory)
        assert stored(client, memory) == BOOK
        assert memory.stats.written == 5 * (time + 1)
        model.read(BOOK, memory=memory)  # all there: nothing is stored
        assert stored(client, memory) == BOOK
        assert memory.stats.written == 5 * (time + 1)
        model.read(tokens(24, seed=9)[0].tolist(), memory=model.with_bank(str(memory.bank)))  # other recalls next time
        forget(client, memory)
    assert memory.stats.gone == 0


def test_what_was_stored_again_is_known_for_good(attachment: Attachment, tmp_path: Path) -> None:
    """Delete and read again, and read once more when the service knows the key of what was deleted no longer."""
    hands = Hands()
    for days in (0, 3):
        hands.go_on(days * 24 * HOUR)
        with LocalServer(tmp_path, clock=hands.clock()) as server, kvbank.connect(server.address) as client:
            memory = Memory(attachment, client, "b", tokenizer(), chunk=8, source="book", strict=True)
            memory.open()
            memory.remember([encode(attachment, BOOK[:8])])
            if not days:
                forget(client, memory)
                memory.remember([encode(attachment, BOOK[:8])])
            assert stored(client, memory) == BOOK[:8]


def test_reading_again_after_some_were_deleted(model: MemoryModel, client: kvbank.Client) -> None:
    memory = model.with_bank(bank(), source="book")
    model.read(BOOK, memory=memory)
    client.delete_chunks(str(memory.bank), [min(chunk.chunk_id for chunk in client.list_chunks(str(memory.bank)))])
    model.read(BOOK, memory=memory)
    assert stored(client, memory) == BOOK
    assert memory.stats.written == 6


def test_reading_again_after_an_eviction(model: MemoryModel, client: kvbank.Client) -> None:
    """Banks of three keep the same of a second reading as of a first."""
    memory = Memory(model.attachment, client, bank(), model.tokenizer, model.settings, source="book")
    memory.open(capacity=kvbank.Capacity(chunks=3))
    for _ in range(2):
        model.read(BOOK, memory=memory)
        assert memory.stats.evicted > 0
        assert client.get_bank(str(memory.bank)).usage.chunks <= 3
        assert BOOK[-8:] == stored(client, memory)[-8:]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_crash_in_the_middle_of_reading_again(model: MemoryModel, client: kvbank.Client, strict: bool) -> None:
    """Reading begins anew in another process; what was stored again before the crash is not stored twice."""
    memory = model.with_bank(bank(), source="book", strict=strict)
    model.read(BOOK, memory=memory)
    forget(client, memory)
    model.read(BOOK[:16], memory=memory)
    other = model.with_bank(str(memory.bank), source="book", strict=strict)
    model.read(BOOK, memory=other)
    assert stored(client, other) == BOOK
    assert other.stats.written == 3


def test_read_again_while_the_service_is_away(tmp_path: Path, attachment: Attachment) -> None:
    """Chunks wait under the keys of the first reading, and are stored when they are delivered."""
    service = Service(tmp_path / "data")
    spool = Spool(tmp_path / "spool")
    with kvbank.connect(service.address) as client:
        memory = Memory(attachment, client, "b", tokenizer(), chunk=8, source="book", spool=spool, retry_after=1e6)
        memory.open()
        seen = [encode(attachment, BOOK[at : at + 8], at) for at in range(0, 40, 8)]
        memory.remember(seen)
        forget(client, memory)
        service.stop()
        with pytest.warns(RuntimeWarning, match="away"):
            memory.remember(seen)
        assert len(spool) == 5
        service.start()
        wait_for(client)
        assert memory.deliver_spooled()
        assert stored(client, memory) == BOOK
        assert (len(spool), memory.stats.written, memory.stats.gone) == (0, 10, 0)
    service.stop()


def test_what_was_delivered_and_deleted_since_stays_deleted(
    client: kvbank.Client, attachment: Attachment, tmp_path: Path
) -> None:
    """Keys without a source are a chunk's own: the worker died between the acknowledgement and the removal."""
    memory = Memory(attachment, client, bank(), tokenizer(), chunk=8, spool=Spool(tmp_path))
    memory.open()
    assert memory.spool is not None
    chunk = memory.new_chunk(encode(attachment, BOOK[:8]))
    memory.spool.put(memory.addressed(str(memory.bank), chunk))
    [waiting] = memory.spool.folder.iterdir()
    copy = waiting.read_bytes()
    assert memory.deliver_spooled()
    assert stored(client, memory) == BOOK[:8]
    forget(client, memory)
    waiting.write_bytes(copy)
    assert memory.deliver_spooled()
    assert stored(client, memory) == []
    assert (len(memory.spool), memory.stats.gone) == (0, 1)


@pytest.mark.parametrize("recall", ["attend", "reread"])
def test_a_document_is_read_once_under_its_name_and_forgotten_by_it(client: kvbank.Client, recall: str) -> None:
    name, words = bank(), " ".join(f"w{token}" for token in BOOK)
    made = MemoryModel(
        build("llama_gqa"), tokenizer(), memory=client, bank=name, chunk=8, window=16, recall=recall, metadata={"a": 1}
    )
    with made as model:
        texts = kvbank.TextMemory(client, name)
        for _ in range(2):
            assert model.read(words, source="book", metadata={"b": 2}) == len(BOOK)
        model.read(words, source="copy")
        model.read(words)
        assert [texts.count(source=source) for source in ("book", "copy", None)] == [5, 5, 15]
        [hit] = texts.search(f"w{BOOK[0]} w{BOOK[1]}", source="book", top_k=1)
        assert (dict(hit.chunk.metadata), hit.chunk.start) == ({"a": 1, "b": 2, "source": "book"}, 0)
        assert texts.delete(source="book") == 5
        model.read(words, source="book")
        assert (texts.count(source="book"), texts.count()) == (5, 15)
        with pytest.raises(InputError, match="the document is 'book'"):
            model.read(words, source="book", metadata={"source": "other"})
        with pytest.raises(InputError, match="source is"):
            model.read(words, source=5)  # type: ignore[arg-type]
        assert model.settings.source is None
