"""A disk of 100 MB, filled to the brim: writes are refused, reads go on, deleting makes room again.

`mounted`: a tmpfs, which needs the right to mount; `shim`: the fault layer counts the bytes of the folder.
"""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import kvbank
from tests.faults.shim import Shim
from tests.proof.big import DIGESTS, EMBEDDING, KV, MIB, BigChunks
from tests.proof.content import READER, vector_of
from tests.support.service_process import ServiceHost
from tests.support.waiting import wait_until

SIZE = 100 * MIB
BANK = "b"


@pytest.fixture
def mounted(tmp_path) -> Iterator[tuple[Path, ServiceHost]]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"mount cannot be run ({error}); the test with the fault layer stands for it")
    if done.returncode:
        pytest.skip(f"may not mount ({done.stderr.decode().strip()}); the test with the fault layer stands for it")
    try:
        with ServiceHost() as host:
            yield folder, host
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def shim(disk: Shim, faulty_host: ServiceHost) -> tuple[Path, ServiceHost]:
    disk.limit(SIZE)
    return disk.root, faulty_host


@pytest.fixture(params=[pytest.param("mounted", marks=pytest.mark.slow), "shim"])
def small_disk(request) -> tuple[Path, ServiceHost]:
    return request.getfixturevalue(request.param)


def _fill(client: kvbank.Client, chunks: BigChunks) -> list[int]:
    """Write until a write is refused."""
    written: list[int] = []
    while len(written) * chunks.payload <= SIZE:
        try:
            written.append(client.write(BANK, chunks.new(), **DIGESTS).chunk_id)
        except kvbank.DiskFull:
            return written
    raise AssertionError("a disk of 100 MB took more than that")


def _check(client: kvbank.Client, chunks: BigChunks, ids: list[int]) -> None:
    """Check that the chunks can be fetched, and found by searching."""
    assert [chunk.chunk_id for chunk in client.list_chunks(BANK)] == ids
    for begin in range(0, len(ids), 20):
        part = ids[begin : begin + 20]
        assert all(map(chunks.same, client.fetch(BANK, part, reader_digest=READER)))
    assert set(client.retrieve(BANK, vector_of(bytes(16)), **DIGESTS).chunks) <= set(ids)


@pytest.mark.parametrize("min_free", [20 * MIB, pytest.param(0, marks=pytest.mark.slow)])
def test_a_full_disk(small_disk, min_free):
    """SQLite or the file system finds the disk full, because nothing is kept back."""
    folder, host = small_disk
    chunks = BigChunks(MIB)
    service = host.start(folder / "data", min_free=min_free)
    with kvbank.connect(service.address) as client:
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING)
        ids = _fill(client, chunks)
        assert len(ids) > (SIZE - min_free) // chunks.payload * 0.8
        _check(client, chunks, ids)
        with pytest.raises(kvbank.DiskFull):
            client.write(BANK, chunks.new(), **DIGESTS)
        if min_free:
            gone, ids = ids[:15], ids[15:]
            assert client.delete_chunks(BANK, gone) == 15
            _wait_for_room(client, chunks, ids)
            ids += [client.write(BANK, chunks.new(), **DIGESTS).chunk_id for _ in range(10)]
        _check(client, chunks, ids)
    service.kill()
    service = host.start(folder / "data", min_free=min_free)
    with kvbank.connect(service.address) as client:
        _check(client, chunks, ids)


class Brimful:
    """A small disk on which others take all that is left, and give it back."""

    def __init__(self, folder: Path, shim: Shim | None) -> None:
        self._filler, self._shim, self._folder = folder / "filler", shim, folder

    def fill(self) -> None:
        if self._shim is not None:
            self._shim.limit(0)
            return
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            for size in (MIB, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))

    def empty(self) -> None:
        if self._shim is not None:
            self._shim.limit(None)
        self._filler.unlink(missing_ok=True)


@pytest.fixture(params=[pytest.param("mounted", marks=pytest.mark.slow), "shim"])
def brimful(request) -> tuple[Path, ServiceHost, Brimful]:
    folder, host = request.getfixturevalue(request.param)
    return folder, host, Brimful(folder, request.getfixturevalue("disk") if request.param == "shim" else None)


def test_on_a_disk_that_others_fill_reads_go_on(brimful):
    """Retrievals are counted when there is room again; what can be deleted is, and nothing is lost."""
    folder, host, others = brimful
    chunks, rounds = BigChunks(4096), 30
    service = host.start(folder / "data")
    with kvbank.connect(service.address) as client:
        client.create_bank(BANK, kv=KV, embedding=EMBEDDING, capacity=kvbank.Capacity(chunks=50))
        ids = [client.write(BANK, chunks.new(), **DIGESTS).chunk_id for _ in range(20)]
        others.fill()
        for _ in range(rounds):
            client.retrieve(BANK, vector_of(bytes(16)), top_k=20, **DIGESTS)
            assert client.get_chunk(BANK, ids[0]).retrieval_count <= rounds
            assert [chunk.chunk_id for chunk in client.list_chunks(BANK)] == ids
            assert len(client.explain_eviction(BANK, need=31)) > 0
            assert all(map(chunks.same, client.fetch(BANK, ids, reader_digest=READER)))
            assert client.get_bank(BANK).usage.chunks == client.stats([BANK]).banks[0].bank.usage.chunks == 20
        with pytest.raises(kvbank.DiskFull):
            client.write(BANK, chunks.new(), **DIGESTS)
        with suppress(kvbank.DiskFull):
            assert client.delete_chunks(BANK, ids[:5]) == 5
            ids = ids[5:]
        _check(client, chunks, ids)
        assert len(service.log().splitlines()) < 300, service.log()
        others.empty()
        wait_until(lambda: client.get_chunk(BANK, ids[0]).retrieval_count >= rounds)
        ids.append(client.write(BANK, chunks.new(), **DIGESTS).chunk_id)
        _check(client, chunks, ids)


def _wait_for_room(client: kvbank.Client, chunks: BigChunks, ids: list[int]) -> None:
    """Files are removed in the background."""

    def written() -> bool:
        with suppress(kvbank.DiskFull):
            ids.append(client.write(BANK, chunks.new(), **DIGESTS).chunk_id)
            return True
        return False

    wait_until(written)
