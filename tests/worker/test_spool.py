"""The service goes away and comes back: chunks wait on disk, and no generation stops."""

import os
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kvbank
from kvbank.files.durable import make_folder
from model_worker.attaching import attach
from model_worker.attachment.attachment import Attachment
from model_worker.model import MemoryModel
from model_worker.remember.memory import Memory
from model_worker.remember.service_link import ServiceLink
from model_worker.remember.spool import Spool, Spooled
from model_worker.session.unanswered import Unanswered
from model_worker.window.encoding import encode
from tests.support.restartable import Service, wait_for
from tests.worker.tiny import bank, build, tokenizer, tokens
from tests.worker.worker_process import worker

Remember = Callable[[Memory, int], None]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "data")
    yield service
    service.stop()


@pytest.fixture(scope="module")
def attachment() -> Iterator[Attachment]:
    attachment = attach(build("llama_gqa"), tokenizer())
    yield attachment
    attachment.detach()


def remember(memory: Memory, start: int) -> None:
    memory.remember([encode(memory.attachment, tokens(4, seed=start)[0].tolist(), start)])


def notice_loss(memory: Memory) -> None:
    with pytest.warns(RuntimeWarning, match="the memory service is away"):
        assert memory.recall([[5, 6]]) is None


def starts(client: kvbank.Client, name: str) -> list[int]:
    """Return the starts of the chunks in the order of arrival."""
    return [c.start for c in sorted(client.list_chunks(name), key=lambda c: c.chunk_id)]


def test_a_model_spools_without_being_told(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks wait in a folder of the user's, named by the bank's uid, which the next worker on the bank finds."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=service.address, bank="b", chunk=4, window=8) as model:
        uid = model.client.get_bank("b").uid
        service.stop()
        with pytest.warns(RuntimeWarning, match="the memory service is away"):
            model.read(tokens(8)[0].tolist())
        waiting = list((tmp_path / "state/kvbank/spool" / uid).glob("*.chunk"))
        assert len(waiting) == model.memory.stats.spooled > 0
        service.start()
        with kvbank.connect(service.address) as client:
            wait_for(client)
    with MemoryModel(build("llama_gqa"), tokenizer(), memory=service.address, bank="b", chunk=4, window=8) as model:
        model.memory.deliver_spooled()
        assert model.client.get_bank("b").usage.chunks == len(waiting)
    assert not list((tmp_path / "state/kvbank/spool" / uid).glob("*.chunk"))


def test_chunks_wait_and_arrive_once_in_order(service: Service, attachment: Attachment, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    with kvbank.connect(service.address) as client:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, spool=spool, retry_after=1e6)
        memory.open()
        remember(memory, 0)
        service.stop()
        notice_loss(memory)
        for start in (1, 2, 3):
            remember(memory, start)
        assert memory.recall([[5, 6]]) is None  # not asked again so soon
        assert (len(spool), memory.stats.written, memory.stats.spooled, memory.stats.failed_recalls) == (3, 1, 3, 2)
        shutil.copytree(spool.folder, tmp_path / "copy")
        service.start()
        wait_for(client)
        assert memory.deliver_spooled()
        assert starts(client, memory.bank) == [0, 1, 2, 3]  # type: ignore[arg-type]
        assert (len(spool), spool.size(), memory.stats.written) == (0, 0, 4)
        # A worker that died between the acknowledgement and the removal delivers again: nothing is stored twice.
        again = Memory(attachment, client, memory.bank, tokenizer(), chunk=4, spool=Spool(tmp_path / "copy"))
        again.open()
        remember(again, 4)
        assert starts(client, memory.bank) == [0, 1, 2, 3, 4]  # type: ignore[arg-type]
        assert (len(Spool(tmp_path / "copy")), again.stats.written) == (0, 1)
        [recalled] = again.recall([tokens(4, seed=2)[0].tolist()]) or [[]]
        [found] = [chunk for chunk in recalled if chunk.start == 2]
        expected = encode(attachment, tokens(4, seed=2)[0].tolist())
        assert all((found.layers[n][0] == layer.keys).all() for n, layer in expected.layers.items())


@pytest.mark.slow
def test_killed_worker_leaves_its_spool_to_the_next(service: Service, attachment: Attachment, tmp_path: Path) -> None:
    name = bank()
    service.stop()
    process = worker("die", service.address, name, tmp_path / "spool")
    process.communicate()
    assert process.returncode == -9
    assert len(Spool(tmp_path / "spool")) == 3
    service.start()
    with kvbank.connect(service.address) as client:
        memory = Memory(attachment, client, name, tokenizer(), chunk=8, spool=Spool(tmp_path / "spool"))
        memory.open()
        remember(memory, 3)
        assert starts(client, name) == [0, 1, 2, 3]


def test_spool_is_bounded(service: Service, attachment: Attachment, tmp_path: Path) -> None:
    """Chunks that do not fit are dropped, counted, and said; also when the folder cannot be written."""
    with kvbank.connect(service.address) as client:
        spool = Spool(tmp_path / "spool", max_bytes=12_000)
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, spool=spool, retry_after=1e6)
        memory.open()
        service.stop()
        notice_loss(memory)
        while memory.stats.dropped == 0:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                remember(memory, memory.stats.spooled)
        assert "its bound of 12000 bytes" in str(said[-1].message)
        assert len(spool) == memory.stats.spooled >= 1
        assert spool.size() <= 12_000
        (tmp_path / "file").touch()
        memory.spool = Spool(tmp_path / "file")
        with pytest.warns(RuntimeWarning, match="a chunk was not remembered"):
            remember(memory, 9)
        memory.spool = None
        remember(memory, 10)
        assert memory.stats.dropped == 3
        service.start()


def test_strict_raises(service: Service, attachment: Attachment) -> None:
    with kvbank.connect(service.address) as client:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, strict=True, patience=0.5)
        memory.open()
        service.stop()
        with pytest.raises(kvbank.Unavailable):
            memory.recall([[5, 6]])
        service.start()


def test_lost_service_is_asked_in_short(service: Service, attachment: Attachment, tmp_path: Path) -> None:
    """Services are asked one short question after the pause, not a write with all its retries, and come back by
    themselves."""
    with kvbank.connect(service.address) as client:
        memory = Memory(
            attachment, client, bank(), tokenizer(), chunk=4, spool=Spool(tmp_path / "spool"), retry_after=0
        )
        memory.open()
        service.stop()
        notice_loss(memory)
        begin = time.monotonic()
        with pytest.warns(RuntimeWarning, match="away"):
            remember(memory, 0)
        assert time.monotonic() - begin < 5
        service.start()
        wait_for(client)
        remember(memory, 1)
        assert starts(client, memory.bank) == [0, 1]  # type: ignore[arg-type]


def test_the_pause_is_short_again_after_an_answer(client: kvbank.Client) -> None:
    link, away = ServiceLink(client, patience=2.0, retry_after=0.05), kvbank.Unavailable("away")
    for _ in range(10):
        with pytest.warns(RuntimeWarning, match="away"):
            link.lost(away)
    assert not link.worth_trying()  # for 25 seconds
    assert link.answers_again(2.0)
    with pytest.warns(RuntimeWarning, match="away"):
        link.lost(away)
    deadline = time.monotonic() + 10
    while not link.worth_trying():
        assert time.monotonic() < deadline


@pytest.mark.slow
def test_strict_write_raises(service: Service, attachment: Attachment) -> None:
    with kvbank.connect(service.address) as client:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, strict=True, patience=0.5)
        memory.open()
        service.stop()
        with pytest.raises(kvbank.Unavailable):
            remember(memory, 1)
        service.start()


def test_generation_goes_on_without_the_service(service: Service, tmp_path: Path) -> None:
    """Generation continues with what was recalled before; what leaves the window waits, and is there afterwards."""
    with kvbank.connect(service.address) as client:
        spool, name = Spool(tmp_path / "spool"), bank()
        with MemoryModel(
            build("llama_gqa"),
            tokenizer(),
            memory=client,
            bank=name,
            chunk=8,
            window=16,
            top_k=2,
            spool=spool,
            retry_after=1e6,
        ) as chat:
            cache = chat.cache()
            chat.read(tokens(32)[0].tolist())
            service.stop()
            with pytest.warns(RuntimeWarning, match="away"):
                text = chat.generate([5, 6, 7], cache=cache, max_new_tokens=30, do_sample=False, min_new_tokens=30)
            assert isinstance(text, str)
            assert chat.memory.stats.failed_recalls > 1
            assert len(spool) == (3 + 30 - 1 - cache.physical) // 8 > 0
            service.start()
            wait_for(client)
        assert len(spool) == 0  # closing delivers
        assert client.get_bank(name).usage.chunks == 4 + (3 + 30 - 1 - cache.physical) // 8


def test_a_damaged_file_does_not_hold_up_the_others(service: Service, attachment: Attachment, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    with kvbank.connect(service.address) as client:
        memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, spool=spool, retry_after=1e6)
        memory.open()
        service.stop()
        notice_loss(memory)
        for start in range(4):
            remember(memory, start)
        first, second, third, _ = sorted(spool.folder.iterdir())
        first.write_bytes(b"")
        second.write_bytes(second.read_bytes()[:-3])
        data = third.read_bytes()
        third.write_bytes(data.replace(b'\\"bank\\"', b'\\"bonk\\"', 1))
        service.start()
        wait_for(client)
        with pytest.warns(RuntimeWarning, match="set aside.*damaged"):
            assert memory.deliver_spooled()
        assert starts(client, memory.bank) == [3]  # type: ignore[arg-type]
        assert sorted(path.suffix for path in spool.folder.iterdir()) == [".aside"] * 3
        assert (len(spool), spool.size()) == (0, 0)


def test_spooled_chunks_of_another_model_are_refused(service: Service, attachment: Attachment, tmp_path: Path) -> None:
    """Banks of this model, made anew under the old name, must not get the K-V of another one, whatever worker delivers
    them."""
    spool, name = Spool(tmp_path / "spool"), bank()
    with kvbank.connect(service.address) as client:
        memory = Memory(attachment, client, name, tokenizer(), chunk=4, spool=spool, retry_after=1e6)
        memory.open()
        service.stop()
        notice_loss(memory)
        remember(memory, 0)
        service.start()
        wait_for(client)
        client.delete_bank(name)
        other = attach(build("llama_gqa", seed=1), tokenizer())
        heir = Memory(other, client, name, tokenizer(), chunk=4, spool=spool)
        heir.open()
        with pytest.warns(RuntimeWarning, match=f"set aside.*{attachment.reader.digest}"):
            remember(heir, 1)
        assert starts(client, name) == [1]
        assert len(spool) == 0
        other.detach()


def test_a_service_that_refuses_ends_no_generation(client: kvbank.Client, attachment: Attachment) -> None:
    """Banks that are full, or that were deleted, are said in a warning, and raised with strict."""
    policy, capacity = kvbank.Policy("reject"), kvbank.Capacity(chunks=1)
    memory, strict = (
        Memory(attachment, client, bank(), tokenizer(), chunk=4, strict=strict) for strict in (False, True)
    )
    for each in (memory, strict):
        each.open(policy=policy, capacity=capacity)
        remember(each, 0)
    with pytest.warns(RuntimeWarning, match="not remembered"):
        remember(memory, 1)
    with pytest.raises(kvbank.BankFull):
        remember(strict, 1)
    for each in (memory, strict):
        client.delete_bank(each.bank)  # type: ignore[arg-type]
    with pytest.warns(RuntimeWarning, match="nothing was recalled"):
        assert memory.recall([[5, 6]]) is None
    with pytest.raises(kvbank.BankNotFound):
        strict.recall([[5, 6]])
    with pytest.warns(RuntimeWarning, match="not remembered"):
        remember(memory, 2)
    assert (memory.stats.written, memory.stats.dropped, memory.stats.failed_recalls) == (1, 2, 1)


def test_patience_with_a_service_that_is_silent(attachment: Attachment, tmp_path: Path) -> None:
    """Silent services take the connection and never answer. One turn costs one call's patience, then short
    questions."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        kvbank.connect(f"127.0.0.1:{listener.getsockname()[1]}") as client,
    ):
        memory = Memory(
            attachment, client, bank(), tokenizer(), chunk=4, spool=Spool(tmp_path), patience=1, retry_after=0.2
        )
        begin = time.monotonic()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for start in range(4):
                assert memory.recall([[5, 6]]) is None
                remember(memory, start)
        assert time.monotonic() - begin < 6, "eight calls of a second each"
        assert "away" in str(said[0].message)
        assert memory.stats.spooled == 4
        begin = time.monotonic()
        with pytest.raises((kvbank.DeadlineExceeded, kvbank.Unavailable)):
            memory.open()
        assert time.monotonic() - begin < 20, "by default it would be 30 s"


def test_a_spool_folder_is_synced_with_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]


def test_a_chunk_is_synced_before_its_name_and_its_name_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spool").mkdir()
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    Spool(tmp_path / "spool").put(Spooled("b", kvbank.NewChunk(np.ones(4, np.float32)), "r", "e"))
    file, folder = map(Path, synced)
    assert (file.parent, file.suffix, folder) == (tmp_path / "spool", ".tmp", tmp_path / "spool")


def test_chunks_wait_in_their_order_where_the_clock_was_set_back(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for start in (0, 4):
        spool.put(Spooled("b", kvbank.NewChunk(np.ones(4, np.float32), start=start, original_length=4), "r", "e"))
        if start == 0:
            ((path, _),) = spool
            ahead = time.time_ns() + 5 * 3600 * 10**9
            path.rename(path.with_name(f"{ahead:020d}-{path.name.partition('-')[2]}"))
    assert [spooled.chunk.start for _, spooled in spool] == [0, 4]


def test_what_a_worker_keeps_of_texts_is_its_owners_alone(tmp_path: Path) -> None:
    """Spools are closed to others, also where an earlier version left them open, and so is what was not answered."""
    spool, unanswered = tmp_path / "spool", tmp_path / "unanswered"
    spool.mkdir()
    (spool / "left.aside").touch()
    (spool / "left.aside").chmod(0o644)
    spool.chmod(0o755)
    umask = os.umask(0)
    try:
        Spool(spool).put(Spooled("b", kvbank.NewChunk(np.ones(4, np.float32)), "r", "e"))
        with suppress(OSError), Unanswered("session", unanswered).saying("ahoy"):
            raise OSError
    finally:
        os.umask(umask)
    for folder, files in ((spool, 2), (unanswered, 1)):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(list(folder.iterdir())) == files
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_folder_with_files_of_others_stays_open_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    (folder / "theirs").mkdir(parents=True)
    (folder / "theirs" / "letter").touch()
    theirs = {folder, folder / "theirs", folder / "theirs" / "letter"}
    for path in theirs:
        path.chmod(0o755)
    Spool(folder).put(Spooled("b", kvbank.NewChunk(np.ones(4, np.float32)), "r", "e"))
    assert {path.stat().st_mode & 0o777 for path in theirs} == {0o755}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir() if path not in theirs} == {0o600}


def test_a_spool_stays_where_it_was_made(
    client: kvbank.Client, attachment: Attachment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative folders are those of the moment, whatever folder the process goes to later."""
    for name in ("here", "there"):
        (tmp_path / name / "spool").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    memory = Memory(attachment, client, bank(), tokenizer(), chunk=4, spool=Spool("spool"))
    memory.open()
    memory.link.pause_for(float("inf"))
    remember(memory, 0)
    monkeypatch.chdir(tmp_path / "there")
    remember(memory, 1)
    assert [len(list((tmp_path / name / "spool").iterdir())) for name in ("here", "there")] == [2, 0]
    memory.link.pause_for(0)
    assert memory.deliver_spooled()
    assert starts(client, str(memory.bank)) == [0, 1]
